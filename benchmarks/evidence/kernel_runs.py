"""Direct calls of one backend's kernels, for probes and the first run on a GPU.

A backend here is its module, `fastattn.backends.cuda` or another with the same functions: on a CPU the torch backend,
or the CUDA one over an emulated extension, runs the same code that a GPU will.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from measure.errors import excess

DTYPE = torch.bfloat16
ONE_PASS_HEAD_DIM = (
    128  # the largest head dim of the one-pass backward: has_one_pass of csrc/attention_tiles.h
)
NAMES = ("out", "lse", "dquery", "dkey", "dvalue")
Results = dict[str, Tensor]


class NotThis(Exception):
    """The kernels do not support the call; the message is the reason."""


class NoOnePass(NotThis):
    """There is no one-pass backward at this head dim, by design."""


class SwitchedOff(NotThis):
    """FASTATTN_DISABLE switches the requested kernels off."""


@dataclass
class Operands:
    """Inputs of a call and its gradient, (B, H, S, D) or, packed, (T, H, D)."""

    query: Tensor
    key: Tensor
    value: Tensor
    dout: Tensor

    @classmethod
    def draw(
        cls,
        device: torch.device,
        *,
        batch: int = 1,
        heads: int = 2,
        kv_heads: int | None = None,
        seqlen_q: int,
        seqlen_k: int | None = None,
        head_dim: int,
        seed: int = 0,
    ) -> Operands:
        """Normal numbers from a seed, rounded to DTYPE."""
        generator = torch.Generator(device).manual_seed(seed)
        kv_heads, seqlen_k = kv_heads or heads, seqlen_k or seqlen_q
        shapes = [(batch, heads, seqlen_q, head_dim), *[(batch, kv_heads, seqlen_k, head_dim)] * 2]
        return cls(
            *(
                torch.randn(shape, generator=generator, device=device).to(DTYPE)
                for shape in (*shapes, shapes[0])
            )
        )

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """query, key, value."""
        return self.query, self.key, self.value


def _call(operands: Operands, options: dict[str, Any], cu_seqlens: Tensor | None) -> Any:
    from fastattn.spec import AttentionCall, VarlenCall

    causal = "bottom_right" if options.get("causal") else "none"
    scale = operands.query.shape[-1] ** -0.5
    if cu_seqlens is None:
        return AttentionCall(*operands.inputs, causal=causal, scale=scale)
    return VarlenCall(*operands.inputs, cu_seqlens, cu_seqlens, causal=causal, scale=scale)


def _spec(call: Any, needs: Any = None) -> Any:
    from fastattn.spec import AttentionCall, AttentionSpec

    return AttentionSpec.of(call if isinstance(call, AttentionCall) else call.as_one_sequence(), needs)


def _check(ops: ModuleType, spec: Any) -> None:
    """NotThis where the backend says that it cannot run this on the GPU at hand."""
    reason = ops.why_not(spec) if spec.device == "cuda" else None
    if reason is not None:
        raise NotThis(str(reason))


def _check_one_pass(ops: ModuleType, head_dim: int) -> None:
    """SwitchedOff where FASTATTN_DISABLE excludes the requested one-pass backward."""
    from fastattn import backends
    from fastattn.backends import switches
    from fastattn.backends.cuda import attention as cuda_attention

    off = switches.switched_off("cuda", "one_pass")
    if ops is backends.cuda_backend and head_dim in cuda_attention.ONE_PASS_HEAD_DIMS and off is not None:
        raise SwitchedOff(str(off))


def forward(ops: ModuleType, operands: Operands, cu_seqlens: Tensor | None = None, **options: Any) -> Results:
    """out and lse by a backend's forward kernels."""
    call = _call(operands, options, cu_seqlens)
    run, spec = ops.attention_fwd if cu_seqlens is None else ops.varlen_fwd, _spec(call)
    _check(ops, spec)
    out, lse = run(spec, call)
    return {"out": out, "lse": lse}


def backward(
    ops: ModuleType, operands: Operands, made: Results, cu_seqlens: Tensor | None = None, **options: Any
) -> Results:
    """The gradients by a backend's backward kernels, from a forward's results, whoever made them.

    Within `passes(1)`: NoOnePass at a head dim above ONE_PASS_HEAD_DIM, SwitchedOff where FASTATTN_DISABLE names it,
    and ValueError where the one-pass backward is missing at another head dim.
    """
    from fastattn.spec import GradsNeeded

    call, needs = _call(operands, options, cu_seqlens), GradsNeeded()
    run, spec = ops.attention_bwd if cu_seqlens is None else ops.varlen_bwd, _spec(call, needs)
    _check(ops, spec)
    _check_one_pass(ops, spec.head_dim)
    try:
        grads = run(spec, call, made["out"], made["lse"], operands.dout, None, needs)
    except ValueError as error:
        if "one_pass" in str(error) and spec.head_dim > ONE_PASS_HEAD_DIM:
            raise NoOnePass(str(error)) from None
        raise
    return {"dquery": grads.query, "dkey": grads.key, "dvalue": grads.value}


@contextlib.contextmanager
def passes(number: int) -> Iterator[None]:
    """Inside, the CUDA backward takes `number` passes, 1 or 2, at every head dim."""
    from fastattn.backends.cuda import attention as cuda_attention

    before = cuda_attention.ONE_PASS_HEAD_DIMS
    cuda_attention.ONE_PASS_HEAD_DIMS = frozenset(range(8, 257, 8) if number == 1 else ())
    try:
        yield
    finally:
        cuda_attention.ONE_PASS_HEAD_DIMS = before


def reference_results(
    operands: Operands,
    dtype: torch.dtype,
    cu_seqlens: Tensor | None = None,
    gradients: bool = True,
    **options: Any,
) -> Results:
    """out, lse and the gradients by the reference in a dtype."""
    from fastattn import reference

    leaves = [t.detach().to(dtype).requires_grad_(gradients) for t in operands.inputs]
    if cu_seqlens is None:
        out, lse = reference.attention(*leaves, **options, return_lse=True)
    else:
        query, key, value = leaves
        out, lse = reference.attention_varlen(
            query, key, value, cu_seqlens, cu_seqlens, **options, return_lse=True
        )
    found = {"out": out.detach(), "lse": lse.detach()}
    if gradients:
        found |= dict(zip(NAMES[2:], torch.autograd.grad(out, leaves, operands.dout.to(dtype))))
    return found


def residuals(operands: Operands, cu_seqlens: Tensor | None = None, **options: Any) -> Results:
    """Residuals of a correct forward: out and lse in float64, rounded."""
    exact = reference_results(operands, torch.float64, cu_seqlens, gradients=False, **options)
    return {"out": exact["out"].to(operands.query.dtype), "lse": exact["lse"].float()}


def worst_of(
    actual: Results, operands: Operands, cu_seqlens: Tensor | None = None, **options: Any
) -> tuple[float, str]:
    """The largest share of the allowed error that a result uses, and the result's name."""
    gradients = any(name in actual for name in NAMES[2:])
    golden, plain = (
        reference_results(operands, dtype, cu_seqlens, gradients, **options)
        for dtype in (torch.float64, operands.query.dtype)
    )
    ratios = {
        name: excess(value, plain[name], golden[name], operands.query.dtype) for name, value in actual.items()
    }
    top = max(ratios, key=lambda name: ratios[name])
    return ratios[top], top


def cu_seqlens_of(lengths: Sequence[int], device: torch.device) -> Tensor:
    """The cu_seqlens of packed sequences."""
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)


def backend_for(device: torch.device, name: str = "cuda") -> ModuleType:
    """A backend's module; NotThis where it cannot run. A CPU rehearses the extension on the torch backend."""
    from fastattn import backends, extension

    if name == "cuda" and device.type != "cuda":
        return backends.torch_backend
    if name == "cuda" and extension.state().info is None:
        raise NotThis(str(extension.state().reason))
    return backends.BACKENDS[backends.NAMES.index(name)]
