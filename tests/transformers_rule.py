"""The error rule for whole models: logits and every parameter's gradient beside eager attention in float64."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import numerics
from numerics import plain_in_any_order

Results = dict[str, Tensor]


def loss_and_grads(model: Any, implementation: str, arguments: dict[str, Tensor], valid: Tensor) -> Results:
    """The logits that count, and every parameter's gradient of a weighted sum of them."""
    model.set_attn_implementation(implementation)
    dtype = next(model.parameters()).dtype
    arguments = {n: t.to(dtype) if t.is_floating_point() else t for n, t in arguments.items()}
    logits = model(**arguments).logits[valid]
    weight = torch.linspace(-1, 1, logits.numel(), dtype=torch.float64).sin().view_as(logits).to(dtype)
    model.zero_grad()
    (logits * weight).sum().backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits.detach(), **grads}


def in_float64(model: Any, *rest: Any) -> Results:
    """Eager attention in float64 throughout: models go through float32 in norms, softmax and rotary tables."""
    with (
        mock.patch.object(torch, "float32", torch.float64),
        mock.patch.object(torch.Tensor, "float", torch.Tensor.double),
    ):
        return loss_and_grads(copy.deepcopy(model).double(), "eager", *rest)


def errors(results: Results, golden: Results) -> dict[str, float]:
    """The norm of each tensor's error as a share of its norm; what is 0, as the gradient of a key bias, is to be next
    to nothing beside the rest."""
    largest = max(g.norm().item() for g in golden.values())
    shares = {}
    for name, g in golden.items():
        error = (results[name].double() - g).norm().item()
        if g.norm().item() > 1e-9 * largest:
            shares[name] = error / g.norm().item()
        else:
            assert error < 1e-6 * largest, name
    return shares


def assert_model_within_rule(
    model: Any, implementation: str, arguments: dict[str, Tensor], valid: Tensor
) -> None:
    """Each tensor errs at most twice as much as eager attention's in float32, plus eps, as shares of its norm."""
    golden = in_float64(model, arguments, valid)
    assert not any(g.isnan().any() for g in golden.values())
    plain = plain_in_any_order(partial(loss_and_grads, model, "eager", arguments, valid), golden)
    actual = loss_and_grads(model, implementation, arguments, valid)
    assert actual.keys() == golden.keys()
    of_plain = errors(plain, golden)
    for name, error in errors(actual, golden).items():
        allowed = 2 * of_plain[name] + torch.finfo(torch.float32).eps
        if numerics.observe is not None:
            numerics.observe(name, error, allowed)
        assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"
