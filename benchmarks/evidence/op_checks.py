"""Checks of the other ops against float64: packed sequences, softmax and the losses, on each backend."""

from __future__ import annotations

import inspect
import itertools
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from evidence.findings import Finding, announce_call, attempt, backends_here, finding
from measure.errors import ratios_of
from measure.protocols import REFUSED
from measure.rounding import terms_of_one_key

HEAD_DIMS = (16, 64, 80, 128)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MOST_CALLS, MOST_FAILURES = 400, 5  # calls of one op and backend; failures of it that are reported


class OpCall:
    """One call of an op: its differentiable inputs, and the op and its oracle as functions of them."""

    def __init__(
        self,
        tensors: dict[str, Tensor],
        ours: Callable[..., Tensor],
        oracle: Callable[..., Tensor],
        text: str,
        gradient: bool = True,
        terms: Callable[[Tensor], dict[str, Tensor]] | None = None,
    ) -> None:
        self.tensors, self.ours, self.oracle, self.text = tensors, ours, oracle, text
        self.gradient, self.terms = (
            gradient,
            terms,
        )  # terms: of gradients that cancel, from the upstream gradient

    def run(self, call: Callable[..., Tensor], dtype: torch.dtype, **extra: Any) -> dict[str, Tensor]:
        """out, and the gradient of every input from an upstream gradient drawn from a fixed seed."""
        leaves = {n: t.detach().to(dtype).requires_grad_(self.gradient) for n, t in self.tensors.items()}
        out = call(*leaves.values(), **extra)
        if not self.gradient:
            return {"out": out}
        grads = torch.autograd.grad(out, tuple(leaves.values()), self.upstream_grad(out).to(out.dtype))
        return {"out": out.detach(), **{"d" + name: grad for name, grad in zip(leaves, grads)}}

    @staticmethod
    def upstream_grad(out: Tensor) -> Tensor:
        """A random upstream gradient of `out`."""
        generator = torch.Generator(out.device).manual_seed(5)
        return torch.randn(out.shape, generator=generator, device=out.device)


def check_ops(
    device: torch.device, seconds: float, seed: int, names: Sequence[str] | None = None
) -> Iterator[Finding]:
    """Random calls of every op, each with an equal share of the time and at least one call."""
    chosen = list(OPS) if names is None else list(names)
    for name in chosen:
        number = list(OPS).index(name)
        yield from _check_op(name, device, seconds / len(chosen), seed + number)


def _check_op(name: str, device: torch.device, seconds: float, seed: int) -> Iterator[Finding]:
    end = time.monotonic() + seconds
    draw = random.Random(seed)
    generator = torch.Generator(device).manual_seed(seed)
    results: dict[str, list[float]] = {}
    refusals: dict[str, str] = {}
    failures: Counter[str] = Counter()
    for count in itertools.count():
        call = OPS[name](draw, generator, device, 1000 if device.type == "cuda" else 40)
        for backend in _backends(call, device):
            announce_call("ops", backend, f"{name} {call.text}", device)
            found, wrong = attempt(lambda: _worst(call, backend), device)  # noqa: B023
            if found is None:
                if REFUSED in str(wrong):
                    refusals[backend] = str(wrong)
                    continue
                failures[backend] += 1
                if failures[backend] <= MOST_FAILURES:
                    yield finding("ops", "failed", f"{name}: {wrong} in {call.text}", backend=backend)
                continue
            worst, where = found
            results.setdefault(backend, []).append(worst)
            if worst > 1:
                detail = f"{name}: {where} at {worst:.3g} of what is allowed: {call.text}"
                yield finding("ops", "failed", detail, backend=backend)
        if time.monotonic() > end or count >= MOST_CALLS:
            break
    yield from _summaries(name, results, refusals, failures)


def _summaries(
    name: str, results: dict[str, list[float]], refusals: dict[str, str], failures: Counter[str]
) -> Iterator[Finding]:
    for backend in results.keys() | failures.keys():
        ratios = results.get(backend, [])
        failed = sum(ratio > 1 for ratio in ratios) + failures[backend]
        detail = f"{name}: {len(ratios) + failures[backend]} calls, {failed} failed"
        detail += f"; worst {max(ratios):.2f} of what is allowed" if ratios else ""
        yield finding("ops", "failed" if failed else "passed", detail, backend=backend, summary=True)
    for backend in refusals.keys() - results.keys() - failures.keys():
        yield finding("ops", "skipped", f"{name}: {refusals[backend]}", backend=backend)


def _backends(call: OpCall, device: torch.device) -> list[str]:
    """The device's backends if the op takes a backend's name, else the one that the op chooses."""
    return backends_here(device) if "backend" in inspect.signature(call.ours).parameters else ["auto"]


def _worst(call: OpCall, backend: str) -> tuple[float, str]:
    """The largest share of the allowed error that a result uses, and the result's name."""
    dtype = next(iter(call.tensors.values())).dtype
    golden, plain = call.run(call.oracle, torch.float64), call.run(call.oracle, dtype)
    actual = call.run(call.ours, dtype, **({} if backend == "auto" else {"backend": backend}))
    terms = call.terms(call.upstream_grad(golden["out"])) if call.terms else {}
    ratios = ratios_of(actual, plain, golden, dtype, lambda: call.run(call.oracle, dtype), terms)
    top = max(ratios, key=lambda name: ratios[name])
    return ratios[top], top


def _varlen(draw: random.Random, generator: torch.Generator, device: torch.device, longest: int) -> OpCall:
    import fastattn
    from fastattn import reference

    lengths = [draw.choice([0, 1, 17, longest // 2, longest]) for _ in range(draw.randint(1, 4))]
    lengths += [] if sum(lengths) else [17]
    cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)
    kv_heads, group, dim = draw.choice([1, 2]), draw.choice([1, 4]), draw.choice(HEAD_DIMS)
    options: dict[str, Any] = {"causal": draw.random() < 0.5}
    if draw.random() < 0.3:
        options["window"] = (draw.choice([3, 40]), 0)
    dtype, most = draw.choice(DTYPES), max(lengths)
    tensors = {
        name: _normal((sum(lengths), heads, dim), dtype, generator, device)
        for name, heads in (("query", kv_heads * group), ("key", kv_heads), ("value", kv_heads))
    }

    def ours(query: Tensor, key: Tensor, value: Tensor, backend: str = "auto") -> Any:
        return fastattn.attention_varlen(
            query, key, value, cu_seqlens, cu_seqlens, most, most, **options, backend=backend
        )

    def oracle(query: Tensor, key: Tensor, value: Tensor) -> Any:
        return reference.attention_varlen(query, key, value, cu_seqlens, cu_seqlens, **options)

    def terms(dout: Tensor) -> dict[str, Tensor]:
        """The terms of dquery and dkey in rows that see one key."""
        found = []
        for start, stop in itertools.pairwise(cu_seqlens.tolist()):
            query, key, value, upstream = (
                t[start:stop].transpose(0, 1)[None] for t in (*tensors.values(), dout)
            )
            none = torch.zeros_like(upstream[..., 0])
            pair = terms_of_one_key(query, key, value, upstream, none, **options)
            found.append([t[0].transpose(0, 1) for t in pair])
        return {name: torch.cat(parts) for name, parts in zip(("dquery", "dkey"), zip(*found))}

    text = f"lengths {lengths}, {kv_heads * group}/{kv_heads}x{dim} {dtype} {options}"
    return OpCall(tensors, ours, oracle, text, terms=terms)


def _softmax(draw: random.Random, generator: torch.Generator, device: torch.device, longest: int) -> OpCall:
    import fastattn
    from fastattn import reference

    widest = 70_000 if device.type == "cuda" else 300
    columns = draw.choice([1, 33, 256, 1000, widest])
    options: dict[str, Any] = {"causal": draw.random() < 0.4, "log": draw.random() < 0.3, "scale": 0.7}
    rows, dtype = draw.choice([1, 7, 64]), draw.choice(DTYPES)

    def ours(x: Tensor, backend: str = "auto") -> Tensor:
        return fastattn.softmax(x, **options, backend=backend)

    def oracle(x: Tensor) -> Tensor:
        # log: no gradient is compared, since masked entries are -inf
        return reference.softmax(x, **options)

    tensors = {"x": _normal((rows, columns), dtype, generator, device)}
    return OpCall(tensors, ours, oracle, f"{rows}x{columns} {dtype} {options}", gradient=not options["log"])


def _losses(linear: bool) -> Callable[[random.Random, torch.Generator, torch.device, int], OpCall]:
    def make(draw: random.Random, generator: torch.Generator, device: torch.device, longest: int) -> OpCall:
        import fastattn
        from fastattn import reference

        rows = draw.choice([1, 5, 60])
        classes = draw.choice([2, 97, 32_000 if device.type == "cuda" else 300])
        dtype, smoothing = draw.choice(DTYPES), draw.choice([0.0, 0.1])
        target = torch.randint(classes, (rows,), generator=generator, device=device)
        target[:: draw.choice([2, 9])] = -100
        function: Any = fastattn.linear_cross_entropy if linear else fastattn.cross_entropy
        reference_op: Any = reference.linear_cross_entropy if linear else reference.cross_entropy

        extras: dict[str, Any] = {}
        if draw.random() < 0.5:
            weight = torch.rand(classes, generator=generator, device=device)
            extras = {"class_weight": weight, "z_loss": draw.choice([0.0, 1e-3])}

        def ours(*inputs: Tensor) -> Any:
            return function(*inputs, target, label_smoothing=smoothing, reduction="sum", **extras)

        def oracle(*inputs: Tensor) -> Any:
            return reference_op(*inputs, target, label_smoothing=smoothing, **extras).sum()

        if not linear:
            tensors = {"logits": _normal((rows, classes), dtype, generator, device)}
        else:
            tensors = {
                "hidden": _normal((rows, 48), dtype, generator, device),
                "weight": _normal((classes, 48), dtype, generator, device) * 48**-0.5,
            }
        kind = f"smoothing {smoothing}" + (f", class weights, z-loss {extras['z_loss']}" if extras else "")
        return OpCall(tensors, ours, oracle, f"{rows}x{classes} {dtype} {kind}")

    return make


def _normal(
    shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator, device: torch.device
) -> Tensor:
    return torch.randn(shape, generator=generator, device=device).to(dtype)


OPS: dict[str, Callable[[random.Random, torch.Generator, torch.device, int], OpCall]] = {
    "varlen": _varlen,
    "softmax": _softmax,
    "cross-entropy": _losses(linear=False),
    "linear-cross-entropy": _losses(linear=True),
}
