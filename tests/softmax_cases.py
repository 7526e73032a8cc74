"""Softmax calls that every backend's kernels are tested with, and their reference."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastattn.backends import layout, triton
from fastattn.reference import softmax
from fastattn.spec import SoftmaxCall
from numerics import assert_within_rule, plain_in_any_order

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


def call_for_kernels(x: Tensor, dim: int, **options: Any) -> SoftmaxCall:
    """The same as the op gives it to a backend with kernels."""
    call = call_of(x, dim, **options)
    return layout.with_diagonal_as_mask(call) if layout.masks_diagonal(triton, call) else call


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
    out = softmax(leaf, dim, **options)
    return out, torch.autograd.grad(out, leaf, dout)[0]


SCALES = (-1.0, 0.0, 1.0, 2.5, 1e-50)  # the last is 0 in float32


def non_finite(columns: int, device: str = "cpu") -> tuple[Tensor, Tensor, dict[str, Any]]:
    """(x, dout, options) of rows with -inf, inf and NaN, one of them under a mask, and of rows of nothing else."""
    x = torch.randn(9, columns, device=device)
    x[0, 0] = x[1, -1] = x[2, ::2] = x[3] = -torch.inf
    x[4, 0], x[5], x[6, 1], x[7, 1] = torch.inf, torch.inf, torch.nan, -torch.inf
    x[7, 2] = torch.nan
    mask = torch.ones(9, columns, dtype=torch.bool, device=device)
    mask[:, 3] = mask[8, ::2] = False
    x[8, ::2] = torch.nan
    return x, torch.randn(9, columns, device=device), {"mask": mask}


def assert_hidden_as_in_the_reference(
    x: Tensor, dout: Tensor, actual: tuple[Tensor, Tensor], **options: Any
) -> None:
    """NaN is where the reference has it, the rest within the rule; what is hidden is constant, without gradient."""
    golden = reference(x.double(), dout.double(), -1, **options)
    unknown = [result.isnan() for result in golden]

    def known(results: tuple[Tensor, Tensor]) -> list[Tensor]:
        return [result.masked_fill(hole, 0) for result, hole in zip(results, unknown)]

    plain = plain_in_any_order(lambda: known(reference(x, dout, -1, **options)), known(golden))
    for name, result, hole in zip(("out", "dx"), actual, unknown):
        assert torch.equal(result.isnan(), hole), name
    for name, *three in zip(("out", "dx"), known(actual), plain, known(golden)):
        assert_within_rule(*three, name)
    out, dx = actual
    hidden = (x == -torch.inf) | ~options["mask"]
    assert bool((out[hidden] == (-torch.inf if options.get("log") else 0.0)).all())
    assert not dx[hidden].any()
