"""The error rule: a result's error against float64, and the share of the allowed error that it uses."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from measure.protocols import Judgement, Tensors
from measure.rounding import MORE_ORDERS, error_of_terms, plain_by_orders, plain_in_any_order


def errors_against(
    judgement: Judgement, outputs: Tensors, dtype: torch.dtype
) -> tuple[dict[str, float], bool]:
    """Greatest absolute error per tensor, and whether each keeps within 2x plain torch's + eps(dtype) * max|golden|.

    Plain torch's error is the largest of up to MORE_ORDERS orders of summation in float32, which are tried one by one.
    """
    golden = judgement.golden
    errors = {
        name: _greatest(judgement.part(name, outputs[name]).double(), exact) for name, exact in golden.items()
    }
    waiting = set(golden)
    for plain in plain_by_orders(lambda: dict(judgement.plain()), dict(golden), MORE_ORDERS):
        for name in list(waiting):
            finite = golden[name][golden[name].isfinite()]
            scale = finite.abs().max().item() if finite.numel() else 0.0
            allowed = 2 * _greatest(plain[name].double(), golden[name]) + torch.finfo(dtype).eps * scale
            if errors[name] <= allowed:
                waiting.remove(name)
        if not waiting:
            break
    return {name: float(f"{error:.3e}") for name, error in errors.items()}, not waiting


def _greatest(actual: Tensor, golden: Tensor) -> float:
    """max |actual - golden|, equal infinities counting 0; raises where the error is not a number."""
    difference = torch.where(actual == golden, 0.0, (actual - golden).abs())
    worst = difference.max().item() if difference.numel() else 0.0
    if not worst < float("inf"):
        raise ArithmeticError(f"the error against float64 is {worst}")
    return float(worst)


def excess(
    actual: Tensor, plain: Tensor, golden: Tensor, dtype: torch.dtype, terms: Tensor | None = None
) -> float:
    """max|actual - golden| over what the rule allows, 2 max|plain - golden| + eps(dtype) max|golden|; inf for NaN.

    terms: the terms of sums that cancel. Plain torch may be exact there by chance, so its error counts as at least
        the rounding error of these terms.
    """
    actual, plain, golden = actual.double(), plain.double(), golden.double()
    infinite = golden.isinf()
    if (
        actual.shape != golden.shape
        or actual.isnan().any()
        or not torch.equal(actual[infinite], golden[infinite])
    ):
        return float("inf")
    if not golden.numel():
        return 0.0
    actual, plain, golden = (t.masked_fill(infinite, 0) for t in (actual, plain, golden))
    error = (actual - golden).abs().max().item()
    of_plain = 2 * (plain - golden).abs().max().item()
    if terms is not None:
        of_plain = max(of_plain, error_of_terms(terms, dtype))
    allowed = of_plain + torch.finfo(dtype).eps * golden.abs().max().item()
    return 0.0 if error == 0 else error / allowed if allowed else float("inf")


def ratios_of(
    actual: dict[str, Tensor],
    plain: dict[str, Tensor],
    golden: dict[str, Tensor],
    dtype: torch.dtype,
    again: Callable[[], dict[str, Tensor]],
    terms: dict[str, Tensor],
) -> dict[str, float]:
    """By result, the share of the allowed error that it uses.

    Where a float32 result exceeds the rule, plain torch's error is taken over several orders of summation, because in a
    few numbers that of one order may be 0 by chance.

    Args:
        actual: what is judged.
        plain: the formula in plain torch, in the dtype.
        golden: the same in float64.
        dtype: of the call.
        again: computes `plain`.
        terms: of the gradients whose terms cancel, as `excess` takes them.
    """

    def judged(plain: dict[str, Tensor]) -> dict[str, float]:
        return {n: excess(t, plain[n], golden[n], dtype, terms.get(n)) for n, t in actual.items()}

    ratios = judged(plain)
    if dtype == torch.float32 and any(1 < ratio < float("inf") for ratio in ratios.values()):
        ratios = judged(plain_in_any_order(again, golden, MORE_ORDERS))
    return ratios
