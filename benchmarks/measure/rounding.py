"""Bounds on rounding errors: plain torch's error in other orders of summation, and the terms of sums that cancel."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

Results = TypeVar("Results")

SUM_ORDERS = 4  # float32 orders of summation tried besides torch's own
MORE_ORDERS = 8  # at most, where they are tried one by one until a result is within the rule


def error_of_terms(terms: Tensor, dtype: torch.dtype) -> float:
    """The rounding error of sums whose terms cancel: eps max|terms|, with the eps of the accumulation dtype."""
    kept = torch.float64 if dtype == torch.float64 else torch.float32
    return torch.finfo(kept).eps * terms.max().item() if terms.numel() else 0.0


def terms_of_score_gradients(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weights: Tensor,
    dout: Tensor,
    dlse: Tensor,
    dweights: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """For each element of dquery and dkey the sum of its terms' absolute values, in float64.

    dscore is weight * (dout.v + dweight - delta + dlse), delta the row's sum of weight * (dout.v + dweight). Where a
    row sees one key, dout.v and delta cancel: the error is that of the terms, however small the gradient is.
    """
    query, key = query.double().abs(), key.double().abs()
    group = query.shape[1] // max(key.shape[1], 1)
    of_scores, _ = terms_of_dscores(value, weights, dout, dlse, dweights)
    of_scores = of_scores * (query.shape[-1] ** -0.5 if scale is None else abs(scale))
    dkey = (of_scores.mT @ query).unflatten(1, (key.shape[1], group)).sum(2)
    return of_scores @ key.repeat_interleave(group, dim=1), dkey


def terms_of_one_key(
    query: Tensor, key: Tensor, value: Tensor, dout: Tensor, dlse: Tensor, **options: Any
) -> tuple[Tensor, Tensor]:
    """`terms_of_score_gradients` of the rows that see one key, whose weight is 1 whatever the score.

    options: of the reference, without dropout: the rounding of an output that it has scaled does not cancel.
    """
    from fastattn import reference

    query, key, value = query.double(), key.double(), value.double()
    _, weights = reference.attention(query, key, value, **options, return_weights=True)
    seen = weights * (weights == 1)
    return terms_of_score_gradients(query, key, value, seen, dout, dlse, scale=options.get("scale"))


def terms_of_dscores(
    value: Tensor, weights: Tensor, dout: Tensor, dlse: Tensor, dweights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The sum of the absolute values of each dscore's terms, (B, H, Sq, Sk), and of each delta's, (B, H, Sq, 1)."""
    value, weights, dout, dlse = (t.double().abs() for t in (value, weights, dout, dlse))
    of_weights = dout @ value.repeat_interleave(weights.shape[1] // max(value.shape[1], 1), dim=1).mT
    if dweights is not None:
        of_weights = of_weights + dweights.double().abs()
    delta = (weights * of_weights).sum(-1, keepdim=True)
    return weights * (of_weights + delta + dlse[..., None]), delta


def plain_in_any_order(run: Callable[[], Results], golden: Results, orders: int = SUM_ORDERS) -> Results:
    """The results of `run`, the formula in plain torch, each from the order of summation in which its error is largest.

    The error of a float32 sum depends on the order in which a processor adds, so plain torch may be exact by chance on
    one processor, where it is not on another and a kernel is not either. `golden` is the result of `run` in float64.
    16-bit results are returned as torch computes them: their own rounding exceeds that of the sums.
    """
    *_, last = plain_by_orders(run, golden, orders)
    return last


def plain_by_orders(run: Callable[[], Results], golden: Results, orders: int) -> Iterator[Results]:
    """The results of `plain_in_any_order` for 0, 1 .. `orders` orders besides torch's own; one item in other dtypes."""
    from fastattn import torch_compat
    from fastattn.ops.symbolic import leaves, map_leaves

    results = run()
    yield results
    worst = leaves(results)
    if all(t.dtype != torch.float32 for t in worst):
        return
    exact = leaves(golden)
    for seed in range(orders):
        with torch_compat.dispatch_mode(OtherOrder(seed)):
            other = leaves(run())
        worst = [max(pair, key=partial(_error, golden=g)) for g, *pair in zip(exact, worst, other)]
        remaining = iter(worst)
        yield map_leaves(lambda _: next(remaining), results)  # noqa: B023


def _error(plain: Tensor, golden: Tensor) -> float:
    """The largest error of the results that are finite in float64; -1 where one of them is not finite in float32."""
    error = (plain.detach().double() - golden).abs()[golden.isfinite()]
    if not error.numel():
        return 0.0
    return error.max().item() if bool(error.isfinite().all()) else -1.0


class OtherOrder:
    """Operations of torch with matrix products and sums in a random order, and softmax as in a fused backward.

    That is exp(x' - logsumexp(x)): x' are the scores computed again, whose last bit may differ.
    """

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        aten = torch.ops.aten
        if func in (aten.mm.default, aten.bmm.default, aten.addmm.default):
            *added, a, b = args
            order = self._order(a.shape[-1], a.device)
            return func(*added, a.index_select(-1, order), b.index_select(-2, order), **kwargs)
        if func is aten.sum.dim_IntList and args[1]:
            x, dims, *rest = args
            for dim in dims:
                x = x.index_select(dim, self._order(x.shape[dim], x.device))
            return func(x, dims, *rest, **kwargs)
        if func is aten._softmax.default:
            x, dim, _ = args
            steps = torch.randint(-1, 2, x.shape, generator=self.generator).to(x)
            again = torch.where(steps == 0, x, torch.nextafter(x, steps * torch.inf))
            return (again - x.logsumexp(dim, keepdim=True)).exp()
        if func is aten._softmax_backward_data.default:
            grad, weights, dim, _ = args
            order = self._order(grad.shape[dim], grad.device)
            delta = (grad * weights).index_select(dim, order).sum(dim, keepdim=True)
            return weights * (grad - delta)
        return func(*args, **kwargs)

    def _order(self, size: int, device: torch.device) -> Tensor:
        return torch.randperm(size, generator=self.generator).to(device)
