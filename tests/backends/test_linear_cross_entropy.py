"""The loop over chunks of tokens: the weight's gradient, by products that add and by blocks of its rows."""

from __future__ import annotations

import pytest
import torch
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
