"""The error rule every kernel is held to."""

from __future__ import annotations

import torch
from torch import Tensor


def assert_within_rule(
    actual: Tensor, plain: Tensor, golden: Tensor, name: str = "result", dtype: torch.dtype | None = None
) -> None:
    """max|actual - golden| <= 2 max|plain - golden| + eps max|golden|.

    Args:
        actual: what a kernel computed.
        plain: the formula in the kernel's dtype in plain torch, scores and weights materialised.
        golden: the same in float64.
        name: for the message.
        dtype: whose eps; that of `plain` by default.
    """
    assert actual.shape == golden.shape, f"{name}: shape {tuple(actual.shape)}, not {tuple(golden.shape)}"
    actual, plain_64, golden = (t.detach().double().cpu() for t in (actual, plain, golden))
    infinite = golden.isinf()
    assert torch.equal(actual[infinite], golden[infinite]), f"{name}: differs where the reference is infinite"
    actual, plain_64, golden = (t.masked_fill(infinite, 0) for t in (actual, plain_64, golden))
    assert not actual.isnan().any(), f"{name}: has NaN"
    if not golden.numel():
        return
    error = (actual - golden).abs().max().item()
    eps = torch.finfo(dtype or plain.dtype).eps
    allowed = 2 * (plain_64 - golden).abs().max().item() + eps * golden.abs().max().item()
    assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"
