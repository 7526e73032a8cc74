"""Predictions for a kernel: cycles per 64 x 128 scores, the unit that bounds it, the rate of its products."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from fastattn.integers import cdiv
from fastattn.tune.cycles import machine
from fastattn.tune.cycles.loops import Loop, hot_loops
from fastattn.tune.cycles.resources import Resources, resources_of
from fastattn.tune.cycles.sass import Function, functions_of
from fastattn.tune.cycles.simulate import WARPGROUP, Barrier, Residence, Use, replay

SCORES = 64 * 128  # of one warpgroup: the unit of all figures
PRODUCTS = {"forward": 2, "dkdv": 4, "dq": 3, "backward": 5}  # of each score; backward is all in one pass
STATISTICS = 8  # bytes of a query's log-sum-exp and delta
ELEMENT = 2  # bytes
UNITS = {"tensor": "tensor core", "exp2": "MUFU", "issue": "issue", "shared": "shared memory"}
LOCAL = "local"  # the kind of loads and stores of spilled registers
PRODUCER = "USETMAXREG"  # in kernels where one warpgroup only copies


@dataclass(frozen=True)
class Kernel:
    """The description of a kernel that the model needs."""

    name: str
    direction: str  # of PRODUCTS
    head_dim: int
    stationary: int  # rows of scores of a block that are fixed during the loop
    shared: int = 0  # bytes of shared memory of a block; 0 is unknown, and one block is resident
    products: int | None = None  # of each score, if not the direction's
    copies: bool = False  # whether the shared-memory cycles of arriving operands are counted


@dataclass(frozen=True)
class Prediction:
    """One kernel by the model. None of it is measured."""

    name: str
    direction: str
    head_dim: int
    cycles: float  # a multiprocessor's per 64 x 128 scores
    floor: float  # cycles of the products alone
    bound: str  # the unit in use most
    share: float  # of the cycles in which that unit is in use
    tflops: float  # rate of the kernel's products
    registers: int  # a thread
    spills: int  # loads and stores of local memory in the code
    instructions: int  # of a warp in one pass of the loop
    warpgroups: int  # resident, that run the loop


def predict(function: Function, resources: Resources, kernel: Kernel) -> Prediction:
    """Replay the hot loop of a kernel; ValueError where it has none with matrix products."""
    chosen = steady_loops(function)
    if not chosen:
        raise ValueError(f"{kernel.name}: no loop with matrix products")
    opcodes = [instruction.opcode for instruction in function.instructions]
    producer = any(opcode.startswith(PRODUCER) for opcode in opcodes)
    warpgroups = max(1, resources.threads // WARPGROUP - producer)
    products = kernel.products or PRODUCTS[kernel.direction]
    flop = sum(loop.flop for loop in chosen) / len(chosen)
    scores = flop / (2 * kernel.head_dim * products)  # of a warpgroup in one pass
    streamed = scores * warpgroups / kernel.stationary
    copied = _copied_bytes(kernel, streamed) / machine.SHARED_BYTES / warpgroups if kernel.copies else 0.0
    residence = Residence(warpgroups, _blocks(resources, kernel.shared), copied)
    use = replay(chosen, residence)
    cycles = use.cycles * SCORES / scores
    work = 2 * kernel.head_dim * products * SCORES
    bound = bounding_unit(use)
    return Prediction(
        kernel.name, kernel.direction, kernel.head_dim, cycles, work / machine.TENSOR_FLOP, UNITS[bound],
        getattr(use, bound), work / cycles * machine.CLOCK_HZ * machine.MULTIPROCESSORS / 1e12, resources.registers,
        sum(instruction.kind.name == LOCAL for instruction in function.instructions),
        round(sum(len(loop.body) for loop in chosen) / len(chosen)), warpgroups * residence.blocks,
    )  # fmt: skip


def bounding_unit(use: Use) -> str:
    """The unit in use most, by its name in Use."""
    return max(UNITS, key=lambda unit: getattr(use, unit))


def predict_cubin(cubin: bytes, kernel: Kernel, function: str = "") -> Prediction:
    """The kernel of a cubin; `function` selects one of several by a part of its name."""
    found = [each for each in functions_of(cubin) if function in each.name]
    if len(found) != 1:
        raise ValueError(f"{kernel.name}: {len(found)} functions in the cubin match {function!r}, needs one")
    return predict(found[0], resources_of(cubin).get(found[0].name, Resources()), kernel)


def steady_loops(function: Function) -> list[Loop]:
    """The loop over unmasked tiles: the one with the fewest instructions per product.

    Where each warpgroup runs a loop of its own and they synchronise by named barriers, these loops: each waits at
    barriers at which another arrives.
    """
    found = hot_loops(function)
    for index, loop in enumerate(found):
        for other in found[index + 1 :]:
            if _partners(loop, other):
                return [loop, other]
    return [min(found, key=lambda loop: len(loop.body) / loop.flop)] if found else []


def _partners(loop: Loop, other: Loop) -> bool:
    waits, arrives = _named(loop)
    other_waits, other_arrives = _named(other)
    return bool(waits & other_arrives and arrives & other_waits and not waits & arrives)


def _named(loop: Loop) -> tuple[set[str], set[str]]:
    """The barriers between warpgroups that a loop waits at, and those that it arrives at."""
    found = [barrier for each in loop.body if (barrier := Barrier.of(each)) is not None]
    between = [each for each in found if not each.ping_pong and not each.with_writer and each.threads]
    return {each.name for each in between if each.waits}, {each.name for each in between if not each.waits}


def _copied_bytes(kernel: Kernel, streamed: float) -> float:
    """Bytes copied in one pass of a block: two operands of each row; of queries their statistics; dq sums."""
    row = 2 * kernel.head_dim * ELEMENT
    row += STATISTICS if kernel.direction in ("dkdv", "backward") else 0
    row += 4 * kernel.head_dim if kernel.direction == "backward" else 0
    return streamed * row


def _blocks(resources: Resources, shared: int) -> int:
    """The number of resident blocks of a multiprocessor."""
    if not shared or not resources.registers or not resources.threads:
        return 1
    registers = cdiv(resources.registers, 8) * 8 * resources.threads
    by_shared = machine.SHARED_MEMORY // (shared + machine.BLOCK_RESERVED)
    return max(1, min(machine.REGISTERS // registers, by_shared, machine.THREADS // resources.threads))


NAME = re.compile(
    r"attention_(fwd_sm90|bwd_dq|bwd_dkdv_split|bwd_dkdv|bwd_fused)\w*?Shape\w*?I(13__nv_bfloat16|6__half)"
)
ARGUMENT = re.compile(r"L(?:i|b|NS_\d+[A-Za-z]+E)(\d+)E")
DIRECTIONS = {"fwd_sm90": "forward", "bwd_dq": "dq", "bwd_fused": "backward"}
ONE_GRADIENT = {1: ("dk", 3), 2: ("dv", 2)}  # KeyGradients: products of a pass for one of them


def cuda_kernel(mangled: str) -> Kernel | None:
    """The description of a CUDA kernel by the template arguments in its name; None for other kernels."""
    match = NAME.search(mangled)
    if match is None:
        return None
    family, dtype = match[1], "bfloat16" if "bfloat" in match[2] else "float16"
    head_dim, first, second, *rest = (int(number) for number in ARGUMENT.findall(mangled[match.end() :])[:5])
    queries, keys = (first, second) if family in ("fwd_sm90", "bwd_dq") else (second, first)
    direction = DIRECTIONS.get(family, "dkdv")
    cluster = rest.pop() if family == "fwd_sm90" and len(rest) > 1 else 1
    softcap = family != "bwd_fused" and family != "bwd_dkdv_split" and bool(rest and rest[-1])
    label, products = ONE_GRADIENT.get(rest[0], ("", None)) if family == "bwd_dkdv" and rest else ("", None)
    words = [
        "cuda",
        dtype,
        f"D{head_dim}",
        direction,
        label,
        f"{queries}x{keys}",
        "softcap" if softcap else "",
        f"cluster {cluster}" if cluster > 1 else "",
    ]
    stationary = queries if direction in ("forward", "dq") else keys
    return Kernel(
        " ".join(filter(None, words)), direction, head_dim, stationary, products=products, copies=True
    )


def predict_cuda(cubin: bytes) -> list[Prediction]:
    """The attention kernels of the CUDA extension in a cubin."""
    resources = resources_of(cubin)
    found = [(function, cuda_kernel(function.name)) for function in functions_of(cubin)]
    return [
        predict(function, resources.get(function.name, Resources()), kernel)
        for function, kernel in found
        if kernel is not None and hot_loops(function)
    ]


def table(predictions: Sequence[Prediction]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """(columns, rows) of a printed table."""
    columns = ("kernel", "cycles", "products", "bound by", "TFLOP/s", "registers", "spills", "instructions")
    rows: list[tuple[str, ...]] = [
        (p.name, f"{p.cycles:.0f}", f"{p.floor:.0f}", f"{p.bound} {p.share:.2f}", f"{p.tflops:.0f}",
         str(p.registers), str(p.spills), str(p.instructions))
        for p in predictions
    ]  # fmt: skip
    return columns, rows
