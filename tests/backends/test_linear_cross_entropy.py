"""The loop over chunks of tokens: the weight's gradient, by products that add and by blocks of its rows, and tokens
that are ignored, which a CPU leaves out."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from loss_operands import REDUCTIONS, all_logits, linear
from torch import Tensor

from fastattn import linear_cross_entropy, torch_compat
from fastattn.backends import linear_cross_entropy as loop
from numerics import assert_each_within_rule


def results(tensors: list[Tensor], target: Tensor) -> dict[str, Tensor]:
    leaves = [t.clone().requires_grad_() for t in tensors]
    linear_cross_entropy(*leaves[:2], target, bias=leaves[2]).backward()
    return {
        name: leaf.grad for name, leaf in zip(("hidden", "weight", "bias"), leaves) if leaf.grad is not None
    }


def formula(tensors: list[Tensor], target: Tensor) -> dict[str, Tensor]:
    leaves = [t.clone().requires_grad_() for t in tensors]
    logits = leaves[0] @ leaves[1].mT + leaves[2]
    grads = torch.autograd.grad(torch.nn.functional.cross_entropy(logits, target), leaves)
    return dict(zip(("hidden", "weight", "bias"), grads))


@pytest.mark.parametrize("whole", [True, False], ids=["added by products", "in blocks"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_of_several_chunks(
    whole: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_compat, "prefers_mkl", lambda: whole)
    monkeypatch.setattr(loop, "WEIGHT_ROWS", 7)
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(shape, generator=generator).to(dtype) for shape in ((21, 8), (30, 8), (30,))]
    target = torch.randint(0, 30, (21,), generator=generator)
    target[[3, 20]] = -100
    actual = results(tensors, target)
    golden = formula([t.double() for t in tensors], target)
    assert_each_within_rule(actual, lambda: formula(tensors, target), golden, "gradient", dtype)


@pytest.mark.parametrize("whole", [True, False], ids=["added by products", "in blocks"])
def test_tokens_that_are_all_ignored_give_zeros(whole: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_compat, "prefers_mkl", lambda: whole)
    weight = torch.randn(30, 8, requires_grad=True)
    target = torch.full((5,), -100)
    for _ in range(3):  # memory that was freed holds what it did
        torch.full((30, 8), torch.nan)
        (grad,) = torch.autograd.grad(
            linear_cross_entropy(torch.randn(5, 8), weight, target, reduction="sum"), weight
        )
        assert not grad.any()


TOKENS, VOCAB, WIDTH = 24, 30, 8
IGNORED = {
    "none": slice(0, 0),
    "at the start": slice(0, 9),
    "in the middle": slice(7, 18),
    "at the end": slice(17, TOKENS),
    "alternating": slice(0, TOKENS, 2),
    "all but the last": slice(0, TOKENS - 1),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "class weights": {"class_weight": torch.linspace(0.5, 2, VOCAB, dtype=torch.float64)},
    "smoothing": {"label_smoothing": 0.2},
    "z-loss": {"z_loss": 0.05},
    "softcap": {"softcap": 3.0},
}
OPTIONS["all"] = {name: value for options in OPTIONS.values() for name, value in options.items()}
RESULTS = ("losses", "hidden", "weight", "bias")


def operands(dtype: torch.dtype, ignored: slice) -> tuple[list[Tensor], Tensor]:
    """(hidden, weight, bias), and targets that are ignored where asked."""
    tensors = [torch.randn(shape).to(dtype) for shape in ((TOKENS, WIDTH), (VOCAB, WIDTH), (VOCAB,))]
    target = torch.randint(0, VOCAB, (TOKENS,))
    target[ignored] = -100
    return tensors, target


def without_numbers(hidden: Tensor, target: Tensor) -> Tensor:
    """hidden with NaN or infinity in every ignored row."""
    hidden = hidden.masked_fill((target == -100)[:, None], math.nan)
    hidden[::3] = hidden[::3].nan_to_num(math.inf)
    return hidden


def by_name(
    function: Callable[..., Tensor], tensors: list[Tensor], target: Tensor, **options: Any
) -> dict[str, Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    return dict(zip(RESULTS, linear(function, leaves, target, **options)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("place", IGNORED)
def test_ignored_tokens_anywhere(place: str, option: str, dtype: torch.dtype) -> None:
    """The results are those of all logits; ignored rows, which hold no numbers, have neither loss nor gradient."""
    tensors, target = operands(dtype, IGNORED[place])
    given = [without_numbers(tensors[0], target), *tensors[1:]]
    for reduction in REDUCTIONS:
        options = OPTIONS[option] | {"reduction": reduction}
        actual = by_name(linear_cross_entropy, given, target, **options)
        for name in ("losses", "hidden") if reduction == "none" else ("hidden",):
            assert not actual[name][target == -100].any()
        golden = by_name(all_logits, [t.double() for t in tensors], target, **options)
        if dtype == torch.float64:
            torch.testing.assert_close(actual, golden)
            continue

        def plain(options: dict[str, Any] = options) -> dict[str, Tensor]:
            return by_name(all_logits, tensors, target, **options)

        assert_each_within_rule(actual, plain, golden, reduction, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_no_token_is_kept(reduction: str, option: str, dtype: torch.dtype) -> None:
    tensors, target = operands(dtype, slice(None))
    tensors[0] = without_numbers(tensors[0], target)
    actual = by_name(linear_cross_entropy, tensors, target, reduction=reduction, **OPTIONS[option])
    losses = actual.pop("losses")
    assert bool(losses.isnan() if reduction == "mean" else (losses == 0).all())
    for grad in actual.values():
        assert not grad.any()


def multiplications(run: Callable[[], object]) -> int:
    """How many numbers the matrix products of a call multiply."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, record_shapes=True, acc_events=True) as profile:
        run()
    factors = {"aten::mm": slice(0, 2), "aten::addmm": slice(1, 3)}
    made = 0
    for event in profile.events():
        if event.name in factors:
            (rows, inner), (_, columns) = event.input_shapes[factors[event.name]]
            made += rows * inner * columns
    return made


@pytest.mark.parametrize(("reduction", "products"), [("mean", 3), ("sum", 3), ("none", 4)])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("place", [*IGNORED, "everywhere"])
def test_ignored_tokens_are_not_multiplied(
    place: str, with_bias: bool, reduction: str, products: int
) -> None:
    """A product makes the logits and two their gradients, and one the logits again where the backward has to."""
    tensors, target = operands(torch.float32, IGNORED.get(place, slice(None)))
    tensors = tensors if with_bias else tensors[:2]
    made = multiplications(lambda: by_name(linear_cross_entropy, tensors, target, reduction=reduction))
    assert made == products * int((target != -100).sum()) * VOCAB * WIDTH
