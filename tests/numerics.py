"""The error rule every kernel is held to."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))  # the checks of a device share these

from measure.rounding import (
    MORE_ORDERS,
    SUM_ORDERS,
    OtherOrder,
    error_of_terms,
    plain_by_orders,
    plain_in_any_order,
    terms_of_one_key,
    terms_of_score_gradients,
)

__all__ = [
    "MORE_ORDERS",
    "SUM_ORDERS",
    "OtherOrder",
    "assert_attention_within_rule",
    "assert_each_within_rule",
    "assert_within_rule",
    "plain_in_any_order",
    "share_bound",
    "terms_of_one_key",
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
    error, allowed = _error_and_allowed(actual, plain, golden, name, dtype or plain.dtype, terms)
    if observe is not None:
        observe(name, error, allowed)
    assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"


def assert_each_within_rule(
    actual: Mapping[str, Tensor],
    run: Callable[[], dict[str, Tensor]],
    golden: Mapping[str, Tensor],
    label: str,
    dtype: torch.dtype,
    terms: Mapping[str, Tensor] | None = None,
) -> None:
    """Hold results by name to `assert_within_rule`.

    In float32 other orders of summation are tried one by one, at most MORE_ORDERS, until every result is within the
    rule: plain torch's error is then the largest in the orders so far.

    Args:
        actual: what is judged.
        run: computes `plain` of the same names.
        golden: the same in float64.
        label: for the message, before the result's name.
        dtype: whose eps.
        terms: of the results whose terms cancel.
    """
    assert actual.keys() == golden.keys()
    waiting = list(actual)
    found: dict[str, tuple[float, float]] = {}
    for plain in plain_by_orders(run, dict(golden), MORE_ORDERS):
        for name in waiting:
            three = actual[name], plain[name], golden[name]
            found[name] = _error_and_allowed(*three, f"{label}: {name}", dtype, (terms or {}).get(name))
        waiting = [name for name in waiting if found[name][0] > found[name][1]]
        if not waiting:
            break
    for name, (error, allowed) in found.items():
        if observe is not None:
            observe(f"{label}: {name}", error, allowed)
        assert error <= allowed, f"{label}: {name}: error {error:.3g}, allowed {allowed:.3g}"


def assert_attention_within_rule(
    results: Sequence[Tensor], operands: Sequence[Tensor], label: str, **options: Any
) -> None:
    """Hold (out, lse) of an attention call to `assert_each_within_rule`.

    Args:
        results: out and lse.
        operands: query, key and value; their dtype is the kernel's.
        label: for the message.
        options: of `fastattn.attention`.
    """
    from fastattn import reference

    def formula(dtype: torch.dtype) -> dict[str, Tensor]:
        made = reference.attention(*(t.to(dtype) for t in operands), **options, return_lse=True)
        return dict(zip(("out", "lse"), made))

    dtype, actual = operands[0].dtype, dict(zip(("out", "lse"), results))
    assert_each_within_rule(actual, lambda: formula(dtype), formula(torch.float64), label, dtype)


def _error_and_allowed(
    actual: Tensor, plain: Tensor, golden: Tensor, name: str, dtype: torch.dtype, terms: Tensor | None
) -> tuple[float, float]:
    """The largest error and what the rule allows; AssertionError where shapes, infinities or NaN differ."""
    assert actual.shape == golden.shape, f"{name}: shape {tuple(actual.shape)}, not {tuple(golden.shape)}"
    actual, plain, golden = (t.detach().double().cpu() for t in (actual, plain, golden))
    infinite = golden.isinf()
    assert torch.equal(actual[infinite], golden[infinite]), f"{name}: differs where the reference is infinite"
    actual, plain, golden = (t.masked_fill(infinite, 0) for t in (actual, plain, golden))
    assert not actual.isnan().any(), f"{name}: has NaN"
    if not golden.numel():
        return 0.0, 0.0
    of_plain = 2 * (plain - golden).abs().max().item()
    if terms is not None:
        of_plain = max(of_plain, error_of_terms(terms, dtype))
    allowed = of_plain + torch.finfo(dtype).eps * golden.abs().max().item()
    return (actual - golden).abs().max().item(), allowed


def share_bound(p: float, count: int, deviations: float = 6.0) -> float:
    """How far the share of `count` independent events of chance `p` may be from p.

    Six standard deviations of the binomial: the normal law's chance of more is 2e-9.
    """
    return float(deviations * (p * (1 - p) / count) ** 0.5)
