"""The gradient of an RMSNorm by LayerNorm's kernel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .lookup import find

_layer_norm_backward: Any = find("torch.ops.aten.native_layer_norm_backward")


def rms_norm_backward(
    dout: Tensor, x: Tensor, weight: Tensor, reciprocal: Tensor, *, needs_dx: bool, needs_dweight: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of x * reciprocal * weight, reciprocal = 1 / sqrt(mean(x^2) + eps): dx (..., N) and dweight (N,).

    LayerNorm's kernel with a mean of 0, which takes the mean of dout * weight away as well.

    Fallback: the formula by torch's operations.
    """
    if _layer_norm_backward is None:
        scaled, normed = dout * weight, x * reciprocal
        dx = dweight = None
        if needs_dx:
            dx = (scaled - normed * (scaled * normed).mean(-1, keepdim=True)) * reciprocal
        if needs_dweight:
            dweight = (dout * normed).flatten(0, -2).sum(0)
        return dx, dweight
    size = weight.shape[0]
    zeros = torch.zeros_like(reciprocal)
    dx, dweight, _ = _layer_norm_backward(
        dout.contiguous(), x, [size], zeros, reciprocal, weight, None, [needs_dx, needs_dweight, False]
    )
    if needs_dx:
        dx.addcmul_(reciprocal, (dout @ weight).unsqueeze(-1), value=1 / size)
    return dx if needs_dx else None, dweight if needs_dweight else None
