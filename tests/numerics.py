"""The error rule every kernel is held to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

Results = TypeVar("Results")

SUM_ORDERS = 4  # float32 orders of summation tried besides torch's own
MORE_ORDERS = 8  # where results of a few numbers are judged each by itself

observe: Callable[[str, float, float], None] | None = None  # gets (name, error, allowed) of each comparison


def assert_within_rule(
    actual: Tensor, plain: Tensor, golden: Tensor, name: str = "result", dtype: torch.dtype | None = None
) -> None:
    """max|actual - golden| <= 2 max|plain - golden| + eps max|golden|.

    Args:
        actual: what a kernel computed.
        plain: the formula in the kernel's dtype in plain torch, scores and weights materialised; in float32 the result
            of `plain_in_any_order`.
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
    if observe is not None:
        observe(name, error, allowed)
    assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"


def assert_within_terms(
    actual: Tensor, golden: Tensor, terms: Tensor, name: str = "result", dtype: torch.dtype | None = None
) -> None:
    """max|actual - golden| <= eps max|terms|: the rule for a tensor whose elements are sums of terms that cancel.

    Such a sum is near 0 while its error is that of its terms, and plain torch's error may happen to be 0.

    Args:
        actual: what a kernel computed.
        golden: the same in float64.
        terms: of each element, the sum of its terms without their signs, as from `terms_of_score_gradients`.
        name: for the message.
        dtype: whose eps; that of `actual` by default.
    """
    assert actual.shape == golden.shape == terms.shape, f"{name}: shape {tuple(actual.shape)}"
    assert not actual.isnan().any(), f"{name}: has NaN"
    error = (actual.detach().double() - golden).abs().max().item()
    allowed = torch.finfo(dtype or actual.dtype).eps * terms.max().item()
    if observe is not None:
        observe(name, error, allowed)
    assert error <= allowed, f"{name}: error {error:.3g}, allowed by its terms {allowed:.3g}"


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
    """The terms of dquery and dkey for `assert_within_terms`, in float64; as many heads of keys as of queries.

    dscore is weight * (dout.v + dweight - delta + dlse), delta the row's sum of weight * (dout.v + dweight).
    """
    query, key, value, weights, dout, dlse = (
        t.double().abs() for t in (query, key, value, weights, dout, dlse)
    )
    of_weights = dout @ value.mT
    if dweights is not None:
        of_weights = of_weights + dweights.double().abs()
    delta = (weights * of_weights).sum(-1, keepdim=True)
    of_scores = weights * (of_weights + delta + dlse[..., None])
    of_scores = of_scores * (query.shape[-1] ** -0.5 if scale is None else abs(scale))
    return of_scores @ key, of_scores.mT @ query


def plain_in_any_order(run: Callable[[], Results], golden: Results, orders: int = SUM_ORDERS) -> Results:
    """The results of `run`, the formula in plain torch, each from the order of summation in which its error is largest.

    The error of a float32 sum depends on the order a processor adds in, so on one processor plain torch may be exact
    by chance where it is not on another, nor a kernel. `golden` is what `run` gives in float64, of the same structure.
    16-bit results are returned as torch computes them: their own rounding exceeds that of the sums.
    """
    worst, structure = pytree.tree_flatten(run())
    if all(t.dtype != torch.float32 for t in worst):
        return pytree.tree_unflatten(worst, structure)
    exact = pytree.tree_leaves(golden)
    for seed in range(orders):
        with _OtherOrder(seed):
            other = pytree.tree_leaves(run())
        worst = [max(pair, key=lambda t, g=g: _error(t, g)) for g, *pair in zip(exact, worst, other)]
    return pytree.tree_unflatten(worst, structure)


def _error(plain: Tensor, golden: Tensor) -> float:
    """The largest error of the results that are finite in float64; -1 where one of them is not finite in float32."""
    error = (plain.detach().double() - golden).abs()[golden.isfinite()]
    if not error.numel():
        return 0.0
    return error.max().item() if bool(error.isfinite().all()) else -1.0


class _OtherOrder(TorchDispatchMode):
    """Matrix products and sums in a random order, and softmax as in a fused backward.

    That is exp(x' - logsumexp(x)): x' are the scores computed again, whose last bit may differ.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(seed)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
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
