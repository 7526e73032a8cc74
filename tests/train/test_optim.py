"""Which parameters decay, and the learning rate's shape."""

import math

import pytest
import torch
from torch import nn

from fastattn.train.optim import build_optimizer, learning_rate


def test_only_matrices_decay_and_tied_or_frozen_ones_are_not_doubled_or_touched():
    model = nn.ModuleDict(
        {"a": nn.Linear(3, 4), "b": nn.Linear(3, 4), "n": nn.LayerNorm(4), "f": nn.Linear(2, 2)}
    )
    model["b"].weight = model["a"].weight
    model["f"].requires_grad_(False)
    optimizer = build_optimizer(model, lr=0.1, weight_decay=0.3)
    decayed, plain = optimizer.param_groups
    assert [p is model["a"].weight for p in decayed["params"]] == [True]
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.3, 0.0)
    assert len(plain["params"]) == 4
    assert all(p.dim() == 1 for p in plain["params"])


def test_one_step_is_adamw_by_hand():
    model = nn.Linear(2, 2, bias=False).double()
    before = model.weight.detach().clone()
    optimizer = build_optimizer(model, lr=0.1, weight_decay=0.5, betas=(0.9, 0.95), eps=1e-8)
    gradient = torch.tensor([[1.0, -2.0], [0.5, 3.0]], dtype=torch.float64)
    model.weight.grad = gradient.clone()
    optimizer.step()
    expected = before * (1 - 0.1 * 0.5) - 0.1 * gradient / (gradient.abs() + 1e-8)
    torch.testing.assert_close(model.weight.detach(), expected, rtol=1e-10, atol=1e-12)


def rate(step, total=100, **options):
    settings = {"lr": 2.0, "warmup_steps": 10, "min_lr_ratio": 0.1, **options}
    return learning_rate(step, step / total, **settings)


def test_warmup_is_linear_and_reaches_the_peak():
    assert [rate(step) for step in range(10)] == pytest.approx([0.2 * (step + 1) for step in range(10)])
    assert rate(10) == pytest.approx(2.0)


def test_cosine_falls_to_the_floor():
    assert rate(55) == pytest.approx(2.0 * (0.1 + 0.9 * 0.5))
    assert rate(100) == pytest.approx(0.2)
    rates = [rate(step) for step in range(10, 101)]
    assert rates == sorted(rates, reverse=True)
    for step in range(10, 101):
        x = (step - 10) / 90
        assert rate(step) == pytest.approx(2.0 * (0.1 + 0.45 * (1 + math.cos(math.pi * x))))


def test_edges():
    assert rate(0, warmup_steps=0) == pytest.approx(2.0)
    assert rate(0, warmup_steps=1) == pytest.approx(2.0)
    assert learning_rate(5, 1.5, lr=1.0, warmup_steps=0, min_lr_ratio=0.0) == pytest.approx(0.0)
    assert rate(3, total=3, warmup_steps=5) == pytest.approx(2.0 * 4 / 5)
