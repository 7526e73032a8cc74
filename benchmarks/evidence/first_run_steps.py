"""The launches and comparisons of first_run.py's steps, at a GPU's sizes or at small ones.

Steps take a backend's module, so that a CPU runs them on the torch backend or over the emulated extension. Where a
softmax gives one key a weight of exactly 1, the output is that key's value bit by bit, so copies are checked without a
tolerance.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from types import ModuleType

import torch
from torch import Tensor

from evidence import kernel_runs
from evidence.kernel_runs import NAMES, NoOnePass, NotThis, Operands, Results, SwitchedOff
from measure.processes import announce

StepResult = tuple[bool | None, str]  # whether it passed (None where it is switched off), and the finding
PANEL = 64  # columns of a tensor map's box, one swizzle of 128 bytes in 16-bit numbers
PACKED = (1, 63, 65, 129)
HEAD_DIMS, PANEL_DIMS, VIEW_DIMS = (64, 128, 256), (64, 128, 192, 256), (8, 72, 136)


@dataclass(frozen=True)
class Scale:
    """Sizes: those of a GPU, or small ones."""

    long: int  # the length for the error rule
    one_pass: int  # the length for the one-pass backward
    heads: int  # its batch times heads
    launches: int
    bytes_rows: int  # rows of the copied views

    @classmethod
    def of(cls, device: torch.device, launches: int = 1000) -> Scale:
        """A GPU's, or a CPU's."""
        if device.type == "cuda":
            return cls(long=16_384, one_pass=32_768, heads=64, launches=launches, bytes_rows=300)
        return cls(long=300, one_pass=200, heads=2, launches=2, bytes_rows=70)


def _judged(
    actual: Results, operands: Operands, cu_seqlens: Tensor | None = None, causal: bool = False
) -> StepResult:
    worst, name = kernel_runs.worst_of(actual, operands, cu_seqlens, causal=causal)
    return worst <= 1.0, f"{name} {worst:.2f} of what is allowed"


def one_tile(ops: ModuleType, device: torch.device, scale: Scale) -> Iterator[StepResult]:
    """One block, one tile of keys or little more: copies, products, softmax, store."""
    for causal in (False, True):
        operands = Operands.draw(device, heads=1, seqlen_q=128, head_dim=128)
        good, text = _judged(kernel_runs.forward(ops, operands, causal=causal), operands, causal=causal)
        yield good, f"{'causal' if causal else 'full'}: {text}"


def one_hot_panels(ops: ModuleType, device: torch.device, scale: Scale) -> Iterator[StepResult]:
    """With all weights equal and V one in a single column, out is one in that column and zero in every other."""
    for dim in PANEL_DIMS:
        wrong = []
        for column in range(PANEL // 2 - 3, dim, PANEL):
            operands = Operands.draw(device, heads=1, seqlen_q=128, head_dim=dim)
            operands.query.zero_()
            operands.value.zero_()[..., column] = 1
            out = kernel_runs.forward(ops, operands)["out"]
            if not torch.equal(out, operands.value[:, :, :1].expand_as(out)):
                seen = out[0, 0, 0].nonzero()[:, 0].tolist()
                wrong.append(f"column {column} came out in {seen[:8]}")
        yield not wrong, f"D{dim}: " + ("; ".join(wrong) or f"{dim // PANEL} panels")


def _backward(ops: ModuleType, operands: Operands, passes: int, seconds: int) -> StepResult:
    """The gradients in one or two passes, compared with the reference."""
    made = kernel_runs.residuals(operands)
    head_dim, length = operands.query.shape[-1], operands.query.shape[-2]
    words = f"D{head_dim} S{length}, {'two passes' if passes == 2 else 'one pass'}"
    announce(seconds, words)
    grads, refused = _in_passes(passes, lambda: kernel_runs.backward(ops, operands, made))
    if grads is None:
        return refused[0], f"{words}: {refused[1]}"
    good, text = _judged(grads, operands)
    return good, f"{words}: {text}"


def _in_passes(passes: int, run: Callable[[], Results]) -> tuple[Results | None, StepResult]:
    """The results of run() in one or two passes, or None and the result of the step.

    NoOnePass is correct only at head dims without a one-pass backward. Another NotThis ends the step.
    """
    try:
        with kernel_runs.passes(passes):
            return run(), (True, "")
    except NoOnePass as reason:
        return None, (True, f"there is none, as designed ({reason})")
    except SwitchedOff as reason:
        return None, (None, f"switched off ({reason})")
    except ValueError as error:
        if passes == 1 and "one_pass" in str(error):
            return None, (False, f"the one-pass backward is missing ({error})")
        raise


def small_backward(ops: ModuleType, device: torch.device, scale: Scale) -> Iterator[StepResult]:
    """Every head dim whose warpgroups reallocate registers, D64 first; in two passes, then in one."""
    for number in (2, 1):
        for dim in HEAD_DIMS:
            yield _backward(
                ops, Operands.draw(device, heads=1, seqlen_q=128, head_dim=dim), number, seconds=15
            )


def views(ops: ModuleType, device: torch.device, scale: Scale) -> Iterator[StepResult]:
    """Memory orders in which a head's stride is below a row's, few columns, one row, one head."""
    for dim in VIEW_DIMS:
        for name, rows, heads in (
            ("rows", scale.bytes_rows, 3),
            ("one row", 1, 3),
            ("one head", scale.bytes_rows, 1),
        ):
            wrong = []
            for order in ("bhsd", "bshd", "sbhd", "slice"):
                operands, expected = _selecting(device, heads, rows, dim, order)
                out = kernel_runs.forward(ops, operands)["out"]
                if not torch.equal(out, expected):
                    rows_off = int((out != expected).any(-1).sum())
                    wrong.append(f"{order}: {rows_off} of {out[..., 0].numel()} rows differ")
            yield (
                not wrong,
                f"D{dim}, {name}: " + ("; ".join(wrong) or "the same bytes in four memory orders"),
            )


def _selecting(device: torch.device, heads: int, rows: int, dim: int, order: str) -> tuple[Operands, Tensor]:
    """Operands whose query i has all its weight on key i modulo the number of keys, and the expected out."""
    keys = min(dim, rows)
    operands = Operands.draw(device, batch=2, heads=heads, seqlen_q=rows, seqlen_k=keys, head_dim=dim)
    unit = 40.0 * dim**0.25  # scores of 1600 and 0: every other key has weight 0 in any precision
    places = torch.arange(rows, device=device)
    operands.query.zero_()[:, :, places, places % keys] = unit
    operands.key.zero_()[:, :, range(keys), range(keys)] = unit
    expected = operands.value[:, :, places % keys]
    return Operands(*(_in_order(tensor, order) for tensor in (*operands.inputs, operands.dout))), expected


def _in_order(tensor: Tensor, order: str) -> Tensor:
    """The same (B, H, S, D) numbers with another memory order; a slice lies within wider rows and more heads."""
    if order == "slice":
        wide = tensor.new_full(
            (*tensor.shape[:1], tensor.shape[2], tensor.shape[1] + 1, tensor.shape[3] + 8), torch.nan
        )
        view = wide[:, :, 1:, 8:].transpose(1, 2)
        return view.copy_(tensor)
    places = ["bhsd".index(letter) for letter in order]
    back = [order.index(letter) for letter in "bhsd"]
    return tensor.permute(places).contiguous().permute(back)


def packed_forward(ops: ModuleType, device: torch.device, scale: Scale) -> Iterator[StepResult]:
    """Packed sequences around a tile's edge: within the rule, and bitwise the same beside neighbours of NaN."""
    for dim in HEAD_DIMS:
        operands, cu_seqlens = _packed(device, dim)
        made = kernel_runs.forward(ops, operands, cu_seqlens, causal=True)
        good, text = _judged(made, operands, cu_seqlens, causal=True)
        yield good, f"D{dim}: {text}"

        def run(each: Operands) -> Results:
            return kernel_runs.forward(ops, each, cu_seqlens, causal=True)  # noqa: B023

        yield _beside_nan(run, made, operands, cu_seqlens, dim)


def packed_backward(ops: ModuleType, device: torch.device, scale: Scale) -> Iterator[StepResult]:
    """The same of the gradients, in two passes and in one."""
    for dim in HEAD_DIMS:
        operands, cu_seqlens = _packed(device, dim)
        made = kernel_runs.residuals(operands, cu_seqlens, causal=True)
        for number in (2, 1):
            announce(20, f"D{dim}, passes {number}")

            def run(each: Operands) -> Results:
                with kernel_runs.passes(number):  # noqa: B023
                    return kernel_runs.backward(ops, each, made, cu_seqlens, causal=True)  # noqa: B023

            grads, refused = _in_passes(number, lambda: run(operands))  # noqa: B023
            if grads is None:
                yield refused[0], f"D{dim}, one pass: {refused[1]}"
                continue
            good, text = _judged(grads, operands, cu_seqlens, causal=True)
            yield good, f"D{dim}, passes {number}: {text}"
            yield _beside_nan(run, grads, operands, cu_seqlens, dim)


def _packed(device: torch.device, dim: int) -> tuple[Operands, Tensor]:
    drawn = Operands.draw(device, heads=2, seqlen_q=sum(PACKED), head_dim=dim)
    tensors = (t[0].transpose(0, 1).contiguous() for t in (*drawn.inputs, drawn.dout))
    return Operands(*tensors), kernel_runs.cu_seqlens_of(PACKED, device)


def _beside_nan(
    run: Callable[[Operands], Results], clean: Results, operands: Operands, cu_seqlens: Tensor, dim: int
) -> StepResult:
    """Each sequence keeps its bits while all others are NaN."""
    bounds = cu_seqlens.tolist()
    wrong = []
    for first, end in pairwise(bounds):
        outside = torch.ones(bounds[-1], dtype=torch.bool, device=cu_seqlens.device)
        outside[first:end] = False
        spoiled = Operands(
            *(t.masked_fill(outside[:, None, None], torch.nan) for t in (*operands.inputs, operands.dout))
        )
        for name, value in run(spoiled).items():
            part = (slice(None), slice(first, end)) if name == "lse" else slice(first, end)
            if not torch.equal(value[part], clean[name][part]):
                wrong.append(f"{name} of the sequence of {end - first}")
    return not wrong, f"D{dim}: " + (
        "NaN reaches " + ", ".join(wrong) if wrong else "neighbours of NaN reach nothing"
    )


def long_forward(ops: ModuleType, device: torch.device, scale: Scale) -> Iterator[StepResult]:
    """Sums over many keys: wgmma's additions round differently from float32 additions."""
    for dim, causal in ((64, False), (128, False), (128, True)):
        operands = Operands.draw(device, heads=1, seqlen_q=scale.long, head_dim=dim)
        good, text = _judged(kernel_runs.forward(ops, operands, causal=causal), operands, causal=causal)
        yield good, f"D{dim} S{scale.long}{' causal' if causal else ''}: {text}"


def long_backward(ops: ModuleType, device: torch.device, scale: Scale) -> Iterator[StepResult]:
    """The gradients at the same length."""
    for dim, number in ((64, 2), (128, 2), (64, 1), (128, 1)):
        yield _backward(
            ops, Operands.draw(device, heads=1, seqlen_q=scale.long, head_dim=dim), number, seconds=30
        )


def captured_forward(ops: ModuleType, device: torch.device, scale: Scale) -> Iterator[StepResult]:
    """The process's first call of the extension, during graph capture: its set-up must be allowed there."""
    operands = Operands.draw(device, seqlen_q=200, head_dim=128)
    yield _captured(lambda: kernel_runs.forward(ops, operands, causal=True), operands, device)


def captured_backward(ops: ModuleType, device: torch.device, scale: Scale) -> Iterator[StepResult]:
    """The same of the backward, from a forward of the reference."""
    operands = Operands.draw(device, seqlen_q=200, head_dim=128)
    made = kernel_runs.residuals(operands, causal=True)
    yield _captured(lambda: kernel_runs.backward(ops, operands, made, causal=True), operands, device)


def _captured(run: Callable[[], Results], operands: Operands, device: torch.device) -> StepResult:
    if device.type != "cuda":
        results = run()
    else:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = run()
        graph.replay()
        torch.cuda.synchronize()
        for name, again in run().items():
            if not torch.equal(again, results[name]):
                return False, f"{name} of the replay is not that of a call"
    good, text = _judged(results, operands, causal=True)
    return good, text + ("" if device.type == "cuda" else " (a plain call: there are no graphs on a CPU)")


def many_launches(ops: ModuleType, device: torch.device, scale: Scale) -> Iterator[StepResult]:
    """The one-pass backward repeatedly: blocks wait for one another, and every run must give the same bits."""
    yield _launched(ops, device, scale)


def beside(ops: ModuleType, device: torch.device, scale: Scale) -> Iterator[StepResult]:
    """The same while another stream holds half the multiprocessors: fewer blocks run at once than are launched."""
    if device.type != "cuda":
        yield _launched(ops, device, scale)
        return
    from evidence import hold

    # Loading or allocating later may wait for the held blocks, which wait for this process.
    good, text = _launched(ops, device, replace(scale, launches=2))
    if not good:
        yield False, f"before any multiprocessor is held: {text}"
        return
    with hold.half_of(device) as held:
        good, text = _launched(ops, device, scale)
        yield (
            good and held.holding(),
            f"beside {held.blocks} held multiprocessors: {text}"
            + ("" if held.holding() else "; they ended too early"),
        )


def _launched(ops: ModuleType, device: torch.device, scale: Scale) -> StepResult:
    batch = max(scale.heads // 16, 1)
    operands = Operands.draw(
        device, batch=batch, heads=scale.heads // batch, seqlen_q=scale.one_pass, head_dim=128
    )
    made = kernel_runs.forward(ops, operands, causal=True)
    started, different, done = time.monotonic(), 0, 0
    with kernel_runs.passes(1):
        first = kernel_runs.backward(ops, operands, made, causal=True)
        for done in range(1, scale.launches):
            announce(15, f"launch {done}")
            again = kernel_runs.backward(ops, operands, made, causal=True)
            different += not all(torch.equal(again[name], first[name]) for name in NAMES[2:])
    took = time.monotonic() - started
    text = f"{done + 1} launches of S{scale.one_pass} with {scale.heads} heads in {took:.0f} s, {different} differ"
    return different == 0, text


def nothing(ops: ModuleType, device: torch.device, scale: Scale) -> Iterator[StepResult]:
    """A step whose command runs other steps under a tool."""
    raise NotThis("it runs other steps under compute-sanitizer")
    yield False, ""
