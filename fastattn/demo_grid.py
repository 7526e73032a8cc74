"""The demo's grid: attention with each feature against float64, and its time and memory beside torch's call."""

from __future__ import annotations

import functools
import math
import multiprocessing
import signal
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastattn
from fastattn import reference

SIDES = ("ours", "peer")
MIN_REPEATS, MAX_REPEATS, CASE_SECONDS = 3, 15, 1.5
CHILD_SECONDS = 60.0
MASK_ROWS = 64
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """One cell of the grid; `options` name the features, `build` turns them into arguments."""

    name: str
    length: int
    batch: int = 1
    heads: int = 4
    kv_heads: int = 4
    head_dim: int = 64
    features: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)  # arguments that are not tensors


# Realistic sizes for each feature: at the sizes of tests only the overhead of a call would be timed. The dense rows are
# for comparison, because torch's call is as fast there.
QUICK = (
    Case("causal", 512, options={"causal": True}),
    Case("causal, window 256", 2048, options={"causal": True, "window": (255, 0)}),
    Case("causal, 4 documents", 2048, features=("segment_ids",), options={"causal": True}),
    Case("padded batch", 512, batch=4, features=("key_lengths",)),
    Case("bias with gradient", 1024, features=("bias",)),
    Case("softcap, sinks", 512, features=("sinks",), options={"causal": True, "softcap": 20.0}),
)
FULL = (
    Case("full", 1024),
    Case("causal", 1024, options={"causal": True}),
    Case("causal, 1 key head of 4", 1024, kv_heads=1, options={"causal": True}),
    Case("causal, window 256", 2048, options={"causal": True, "window": (255, 0)}),
    Case("causal, 4 documents", 2048, features=("segment_ids",), options={"causal": True}),
    Case("padded batch", 512, batch=4, features=("key_lengths",)),
    Case("causal, ALiBi", 1024, features=("alibi_slopes",), options={"causal": True}),
    Case("bias with gradient", 512, features=("bias",)),
    Case("softcap, sinks", 512, features=("sinks",), options={"causal": True, "softcap": 20.0}),
)


@dataclass(frozen=True)
class Measured:
    """One row of the table. Times are milliseconds and memory bytes of one forward and backward pass.

    `error` and `allowed` belong to the output or gradient with the largest share of its limit. `peer` is "sdpa", or
    "formula" where torch's call cannot express the case. Memory is the peak above the inputs, None if not measured.
    """

    name: str
    shape: str
    worst: str
    error: float
    allowed: float
    backend: str
    peer: str
    ms: float
    peer_ms: float
    memory: int | None
    peer_memory: int | None

    @property
    def passed(self) -> bool:
        return self.error <= self.allowed

    @property
    def verdict(self) -> str:
        """ "ok" or what is wrong."""
        return "ok" if self.passed else f"wrong: {self.worst}"


def measure(case: Case, device: torch.device, dtype: torch.dtype, seed: int) -> Measured:
    """Check a case against float64, then measure its time and memory, interleaved with torch's."""
    inputs = make_inputs(case, device, dtype, seed)
    worst, error, allowed = _worst_error(case, inputs)
    ms, peer_ms = _interleaved_ms([make_step(case, side, inputs) for side in SIDES], device)
    memory, peer_memory = (peak_memory(case, side, device, dtype, seed) for side in SIDES)
    chosen = fastattn.explain(**_arguments(case, inputs))
    return Measured(
        name=case.name,
        shape=f"{case.batch}x{case.heads}x{case.length}x{case.head_dim}",
        worst=worst,
        error=error,
        allowed=allowed,
        backend=chosen.backend,
        peer="sdpa" if _sdpa_can(case) else "formula",
        ms=ms,
        peer_ms=peer_ms,
        memory=memory,
        peer_memory=peer_memory,
    )


def make_inputs(case: Case, device: torch.device, dtype: torch.dtype, seed: int) -> Tensors:
    """The tensor arguments of a case and `dout`, the gradient its output receives; the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, grad: bool = True) -> Tensor:
        tensor = torch.randn(*shape, generator=generator, device="cpu").to(device, dtype)
        return tensor.requires_grad_(grad)

    batch, heads, length, dim = case.batch, case.heads, case.length, case.head_dim
    inputs = {
        "query": normal(batch, heads, length, dim),
        "key": normal(batch, case.kv_heads, length, dim),
        "value": normal(batch, case.kv_heads, length, dim),
        "dout": normal(batch, heads, length, dim, grad=False),
    }
    if "bias" in case.features:
        inputs["bias"] = normal(1, heads, length, length)
    if "sinks" in case.features:
        inputs["sinks"] = normal(heads)
    if "alibi_slopes" in case.features:
        inputs["alibi_slopes"] = torch.tensor([2.0 ** -(1 + h) for h in range(heads)], device=device)
    if "segment_ids" in case.features:
        inputs["segment_ids"] = (torch.arange(length, device=device) * 4 // length).expand(batch, length)
    if "key_lengths" in case.features:
        inputs["key_lengths"] = torch.tensor(
            [length * (b + 1) // (2 * batch) for b in range(batch)], device=device
        )
    return inputs


def make_step(case: Case, side: str, inputs: Tensors) -> Callable[[], Tensors]:
    """A function that runs one forward and backward pass: "ours", "peer" (torch's call if it can), or "formula"."""
    leaves = {name: tensor for name, tensor in inputs.items() if tensor.requires_grad}
    if side == "peer" and _sdpa_can(case):
        forward = _sdpa(case, inputs)
    else:
        attention: Callable[..., Any] = reference.attention
        if side == "ours":
            attention = fastattn.attention
        forward = functools.partial(attention, **_arguments(case, inputs))

    def step() -> Tensors:
        out = forward()
        grads = torch.autograd.grad(out, list(leaves.values()), inputs["dout"])
        return {"out": out.detach()} | {f"grad of {name}": grad for name, grad in zip(leaves, grads)}

    return step


def _arguments(case: Case, inputs: Tensors) -> dict[str, Any]:
    return {name: tensor for name, tensor in inputs.items() if name != "dout"} | case.options


def _sdpa_can(case: Case) -> bool:
    return "sinks" not in case.features and "softcap" not in case.options


def _sdpa(case: Case, inputs: Tensors) -> Callable[[], Tensor]:
    """torch's call with the equivalent dense mask or bias, which is built outside the timing."""
    plain_causal = not case.features and "window" not in case.options and case.options.get("causal", False)
    mask = None if plain_causal else _dense_mask(case, inputs)
    return functools.partial(
        F.scaled_dot_product_attention,
        inputs["query"],
        inputs["key"],
        inputs["value"],
        attn_mask=mask,
        is_causal=plain_causal,
        enable_gqa=case.kv_heads != case.heads,
    )


def _dense_mask(case: Case, inputs: Tensors) -> Tensor | None:
    """The dense mask or bias equivalent to the case's features, built in slices to keep peak memory low."""
    if "bias" in inputs:
        return inputs["bias"]
    if not case.features and not case.options:
        return None
    device, length = inputs["query"].device, case.length
    keys = torch.arange(length, device=device)
    slopes, ids, lengths = (inputs.get(name) for name in ("alibi_slopes", "segment_ids", "key_lengths"))
    rows, heads = case.batch if lengths is not None else 1, 1 if slopes is None else case.heads
    mask = torch.empty(
        rows, heads, length, length, device=device, dtype=torch.bool if slopes is None else slopes.dtype
    )
    for start in range(0, length, MASK_ROWS):
        queries = keys[start : start + MASK_ROWS, None]
        visible = torch.ones(rows, 1, len(queries), length, device=device, dtype=torch.bool)
        if case.options.get("causal"):
            visible &= keys <= queries
        if "window" in case.options:
            visible &= queries - keys <= case.options["window"][0]
        if ids is not None:
            visible &= ids[0, queries] == ids[0]
        if lengths is not None:
            visible &= keys < lengths[:, None, None, None]
        if slopes is not None:
            bias = -slopes[:, None, None] * (queries - keys).abs()
            visible = bias.masked_fill(~visible, -torch.inf)
        mask[:, :, start : start + MASK_ROWS] = visible
    return mask if slopes is None else mask.to(inputs["query"].dtype)


def _worst_error(case: Case, inputs: Tensors) -> tuple[str, float, float]:
    """(name, error, allowed) of the result nearest its limit, all largest absolute differences over a tensor.

    Allowed is twice the larger error of torch's formula and torch's fused call in the same dtype, plus four units in
    the last place of the largest expected value. The tests allow one unit on fixed inputs; the others are a margin for
    untested seeds and processors.
    """

    def double(tensor: Tensor) -> Tensor:
        wide = tensor.detach().double() if tensor.is_floating_point() else tensor
        return wide.requires_grad_(tensor.requires_grad)

    golden = make_step(case, "formula", {name: double(tensor) for name, tensor in inputs.items()})()
    plain = [make_step(case, side, inputs)() for side in ("formula", "peer")]
    actual = make_step(case, "ours", inputs)()
    limits = []
    for name, true in golden.items():
        error = _difference(actual[name], true)
        rounding = 4 * torch.finfo(actual[name].dtype).eps * true.abs().max().item()
        allowed = 2 * max(_difference(results[name], true) for results in plain) + rounding
        limits.append((name, error if math.isfinite(error) else math.inf, allowed))
    return max(limits, key=lambda limit: limit[1] / limit[2])


def _difference(actual: Tensor, true: Tensor) -> float:
    return (actual.double() - true).abs().max().item()


def _interleaved_ms(steps: list[Callable[[], Tensors]], device: torch.device) -> list[float]:
    """Median milliseconds of each step; interleaved, so that changes of the machine's speed affect all."""
    times: list[list[float]] = [[] for _ in steps]
    for step in steps:
        step()
    started = time.perf_counter()
    while len(times[0]) < MIN_REPEATS or (
        len(times[0]) < MAX_REPEATS and time.perf_counter() - started < CASE_SECONDS
    ):
        for step, taken in zip(steps, times):
            begin = time.perf_counter()
            step()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            taken.append(1e3 * (time.perf_counter() - begin))
    return [statistics.median(taken) for taken in times]


def peak_memory(case: Case, side: str, device: torch.device, dtype: torch.dtype, seed: int) -> int | None:
    """Bytes that one forward and backward pass needs at its peak above its inputs; None where it cannot be measured.

    On a GPU this is the allocator's peak. On a CPU the pass runs in a forked process, and it is the growth of the peak
    resident size, which includes all allocations.
    """
    if device.type == "cuda":
        step = make_step(case, side, make_inputs(case, device, dtype, seed))
        step()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        return torch.cuda.max_memory_allocated(device) - before
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return None
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "fastattn.cli"])
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_report_growth, args=(sender, case, side, dtype, seed), daemon=True)
    with _ctrl_c_ignored():
        child.start()
    sender.close()
    try:
        return int(receiver.recv()) if receiver.poll(CHILD_SECONDS) else None
    except EOFError:  # the child process died, for example out of memory
        return None
    finally:
        child.kill()
        child.join()


@contextmanager
def _ctrl_c_ignored() -> Iterator[None]:
    """Processes started in this context ignore Ctrl-C permanently; the demo handles it and ends them."""
    if threading.current_thread() is not threading.main_thread():  # where handlers cannot be set
        yield
        return
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)


def _report_growth(sender: Connection, case: Case, side: str, dtype: torch.dtype, seed: int) -> None:
    import resource

    cpu = torch.device("cpu")
    small = replace(case, length=32)
    make_step(small, side, make_inputs(small, cpu, dtype, seed))()  # loads code and starts threads
    step = make_step(case, side, make_inputs(case, cpu, dtype, seed))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    results = step()
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    del results
    sender.send(grown * (1 if sys.platform == "darwin" else 1024))
