"""Softmax calls that every backend's kernels are tested with, and their reference."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastattn import reference_losses
from fastattn.spec import SoftmaxCall

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CASES: dict[str, tuple[tuple[int, ...], int, dict[str, Any]]] = {
    "plain": ((3, 7, 21), -1, {}),
    "log, scale": ((3, 7, 21), -1, {"log": True, "scale": 2.5}),
    "causal": ((2, 9, 13), -1, {"causal": True}),
    "causal, more rows than columns": ((2, 13, 9), -1, {"causal": True, "log": True}),
    "causal over rows": ((2, 9, 13), -2, {"causal": True}),
    "causal over neither": ((4, 5, 6), 0, {"causal": True, "mask": (5, 6)}),
    "mask": ((2, 3, 5, 17), -1, {"mask": (2, 1, 1, 17), "scale": -0.5}),
    "mask, causal, log": ((2, 3, 9, 9), -1, {"mask": (3, 1, 9), "causal": True, "log": True}),
    "first dim": ((11, 6), 0, {"scale": 0.5}),
    "middle dim": ((3, 11, 6), 1, {"log": True}),
}


def call_of(x: Tensor, dim: int, **options: Any) -> SoftmaxCall:
    """The normalised call of some options."""
    mask = options.get("mask")
    mask = None if mask is None else mask[(None,) * (x.dim() - mask.dim())]
    scale, causal, log = options.get("scale", 1.0), options.get("causal", False), options.get("log", False)
    return SoftmaxCall(x, mask, dim % x.dim(), scale, causal, log, x.dtype)


def inputs(name: str, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, int, dict[str, Any]]:
    """(x, dout, dim, options) of a case."""
    shape, dim, options = CASES[name]
    options = dict(options)
    if "mask" in options:
        options["mask"] = torch.rand(options["mask"], device=device) < 0.6
    x, dout = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
    return x, dout, dim, options


def reference(x: Tensor, dout: Tensor, dim: int, **options: Any) -> tuple[Tensor, Tensor]:
    """(out, dx) in plain torch, in x's dtype."""
    leaf = x.detach().requires_grad_()
    out = reference_losses.softmax(leaf, dim, **options)
    return out, torch.autograd.grad(out, leaf, dout)[0]
