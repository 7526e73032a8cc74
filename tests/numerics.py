"""The error rule every kernel is held to."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))  # the checks of a device share these

from measure.rounding import (
    MORE_ORDERS,
    SUM_ORDERS,
    OtherOrder,
    error_of_terms,
    plain_in_any_order,
    terms_of_score_gradients,
)

__all__ = [
    "MORE_ORDERS",
    "SUM_ORDERS",
    "OtherOrder",
    "assert_within_rule",
    "plain_in_any_order",
    "share_bound",
    "terms_of_score_gradients",
]

observe: Callable[[str, float, float], None] | None = None  # gets (name, error, allowed) of each comparison


def assert_within_rule(
    actual: Tensor,
    plain: Tensor,
    golden: Tensor,
    name: str = "result",
    dtype: torch.dtype | None = None,
    terms: Tensor | None = None,
) -> None:
    """max|actual - golden| <= 2 max|plain - golden| + eps max|golden|.

    Args:
        actual: what a kernel computed.
        plain: the formula in the kernel's dtype in plain torch, scores and weights materialised; in float32 the result
            of `plain_in_any_order`.
        golden: the same in float64.
        name: for the message.
        dtype: whose eps; that of `plain` by default.
        terms: for elements that are sums of terms which cancel, the sum of each one's terms without their signs, as
            from `terms_of_score_gradients`: such a sum may be exact in plain torch by chance, and so counts as wrong
            by eps(float32) max|terms| at least.
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
    of_plain = 2 * (plain_64 - golden).abs().max().item()
    if terms is not None:
        of_plain = max(of_plain, error_of_terms(terms, dtype or plain.dtype))
    allowed = of_plain + eps * golden.abs().max().item()
    if observe is not None:
        observe(name, error, allowed)
    assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"


def share_bound(p: float, count: int, deviations: float = 6.0) -> float:
    """How far the share of `count` independent events of chance `p` may be from p.

    Six standard deviations of the binomial: the normal law's chance of more is 2e-9.
    """
    return float(deviations * (p * (1 - p) / count) ** 0.5)
