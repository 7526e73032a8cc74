"""The error rule for whole models: logits and every parameter's gradient beside eager attention in float64."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from transformers import PreTrainedModel

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


@contextlib.contextmanager
def float64_throughout() -> Iterator[None]:
    """Calls that ask for float32 get float64: models go through float32 in norms, softmax and rotary tables."""
    with (
        mock.patch.object(torch, "float32", torch.float64),
        mock.patch.object(torch.Tensor, "float", torch.Tensor.double),
    ):
        yield


def in_float64(model: Any, *rest: Any) -> Results:
    """`loss_and_grads` of eager attention in float64."""
    with float64_throughout():
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
    assert_results_within_rule(actual, plain, golden)


def assert_results_within_rule(actual: Results, plain: Results, golden: Results) -> None:
    """Each tensor of `actual` errs at most twice as much as that of `plain`, plus eps, as shares of its norm."""
    of_plain = errors(plain, golden)
    for name, error in errors(actual, golden).items():
        allowed = 2 * of_plain[name] + torch.finfo(torch.float32).eps
        if numerics.observe is not None:
            numerics.observe(name, error, allowed)
        assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"


def eager_results(model: Any, call: Callable[[Any], Results]) -> tuple[Results, Results]:
    """What `call` makes of a copy of the model on eager attention, without gradients: (float32, float64).

    In float32 each tensor is that of the order of summation in which its error is largest. `call` gets the copy, and
    casts its float arguments to the copy's dtype.
    """
    eager = copy.deepcopy(model)
    for part in eager.modules():
        if isinstance(part, PreTrainedModel):
            part.set_attn_implementation("eager")
    with torch.no_grad():
        with float64_throughout():
            golden = call(copy.deepcopy(eager).double())
        return plain_in_any_order(partial(call, eager), golden), golden


def assert_call_within_rule(
    model: Any, call: Callable[[Any], Results], eager_call: Callable[[Any], Results] | None = None
) -> None:
    """What `call` makes of the model, as its attention is chosen, is within the rule beside eager attention.

    eager_call: what eager attention computes instead, where it takes other arguments.
    """
    plain, golden = eager_results(model, eager_call or call)
    with torch.no_grad():
        assert_results_within_rule(call(model), plain, golden)
