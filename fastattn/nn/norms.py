"""Norms over the last dimension: RMSNorm with a fused gradient on a CPU, and norms recomputed in the backward."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastattn import torch_compat
from fastattn.nn.linear import plainly_on_cpu, remade

FUSED_DTYPES = (torch.float32, torch.float64)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension; with `unit_offset`, as in Gemma, * (1 + weight).

    The weight is initialised so that the factor is 1. Arithmetic is in float32 at least, and the result has x's dtype.
    Zhang and Sennrich 2019, "Root Mean Square Layer Normalization".

    Args:
        dim: size of the last dimension.
        eps: added to the mean square.
        unit_offset: whether the weight is kept as its difference from 1.
        device, dtype: of the weight.
    """

    def __init__(
        self,
        dim: int,
        eps: float = 1e-6,
        *,
        unit_offset: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps, self.unit_offset = eps, unit_offset
        make = torch.zeros if unit_offset else torch.ones
        self.weight = nn.Parameter(make(dim, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) -> (..., dim)."""
        return rms_norm(x, self.weight, self.eps, unit_offset=self.unit_offset)

    def extra_repr(self) -> str:
        """The options in use."""
        shown = f"{self.weight.shape[0]}, eps={self.eps}"
        return shown + ", unit_offset=True" if self.unit_offset else shown


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, unit_offset: bool = False) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight, or * (1 + weight) with `unit_offset`: (..., N) x (N,) -> (..., N)."""
    if unit_offset:
        weight = 1.0 + weight.to(torch.promote_types(weight.dtype, torch.float32))
    if plainly_on_cpu(x, weight) and x.dtype == weight.dtype and x.dtype in FUSED_DTYPES and x.numel():
        if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
            out: Tensor = _RMSNorm.apply(x, weight, eps)
            return out
        return x.mul(_reciprocal(x, eps)).mul_(weight)
    dtype = torch.promote_types(x.dtype, weight.dtype)
    return F.rms_norm(x.to(dtype), weight.shape, weight.to(dtype), eps).to(x.dtype)


def _reciprocal(x: Tensor, eps: float) -> Tensor:
    """1 / sqrt(mean(x^2) + eps), (..., 1)."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()


class _RMSNorm(torch.autograd.Function):
    """The gradient is LayerNorm's with a mean of 0, whose kernel reads each operand once, and the term that LayerNorm
    takes away with the mean.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        reciprocal = _reciprocal(x, eps)
        ctx.save_for_backward(x, weight, reciprocal)
        ctx.eps = eps
        return x.mul(reciprocal).mul_(weight)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, reciprocal = ctx.saved_tensors
        needs_dx, needs_dweight, _ = ctx.needs_input_grad
        if torch.is_grad_enabled():  # a graph of the gradient is made of operations that have one
            wanted = [t for t, needs in ((x, needs_dx), (weight, needs_dweight)) if needs]
            out = F.rms_norm(x, weight.shape, weight, ctx.eps)
            grads = iter(torch.autograd.grad(out, wanted, dout, create_graph=True))
            return next(grads) if needs_dx else None, next(grads) if needs_dweight else None, None
        dx, dweight = torch_compat.rms_norm_backward(
            dout, x, weight, reciprocal, needs_dx=needs_dx, needs_dweight=needs_dweight
        )
        return dx, dweight, None


def normalised(norm: nn.Module, x: Tensor) -> Tensor:
    """norm(x), which the linear layers that take it recompute in their backward instead of saving it."""
    if not torch_compat.has_hooks(norm):  # with hooks, what it does is not only the formula
        if type(norm) is nn.LayerNorm:
            return remade(partial(_layer_norm, norm.normalized_shape, norm.eps), x, norm.weight, norm.bias)
        if type(norm) is RMSNorm:
            return remade(partial(_rms_norm, norm.eps, norm.unit_offset), x, norm.weight)
    out: Tensor = norm(x)
    return out


def _layer_norm(
    shape: tuple[int, ...], eps: float, x: Tensor, weight: Tensor | None, bias: Tensor | None
) -> Tensor:
    return F.layer_norm(x, shape, weight, bias, eps)


def _rms_norm(eps: float, unit_offset: bool, x: Tensor, weight: Tensor) -> Tensor:
    return rms_norm(x, weight, eps, unit_offset=unit_offset)
