"""The op of a mean or sum of cross-entropies whose forward also makes the gradient of the logits."""

from __future__ import annotations

from dataclasses import fields, replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fastattn import backends
from fastattn.backends import layout
from fastattn.ops import loss_arguments
from fastattn.ops.cross_entropy_registration import (
    CALL,
    LIBRARY,
    check_values,
    dense_spec,
    reduced,
    run_backward,
    run_cross_entropy,
    scale_of,
    scaled,
    taken,
)
from fastattn.ops.registration import define, save_inputs, saved
from fastattn.spec import CrossEntropyCall, SoftmaxSpec, accumulation_dtype

_NAMES = [field.name for field in fields(CrossEntropyCall)]


def _cross_entropy_mean(*args: Any) -> tuple[Tensor, Tensor]:
    *call_args, mean, backend = args
    call = CrossEntropyCall(*call_args)
    spec = SoftmaxSpec.of(call.logits)
    chosen = backends.select(spec, backend, "cross_entropy_fwd")
    return reduced_with_gradient(spec, chosen, layout.for_backend(chosen, call), mean)


def reduced_with_gradient(
    spec: SoftmaxSpec, chosen: ModuleType, call: CrossEntropyCall, mean: bool
) -> tuple[Tensor, Tensor]:
    """(the mean of losses or their sum, its gradient by the logits), on a backend that makes both in the forward."""
    tokens, num_classes = call.logits.shape
    targets = ignored, wrong, _ = chosen.read_targets(call.target, num_classes, call.ignore_index)
    if wrong is not None:
        check_values(call.target, num_classes, call.ignore_index)
    if mean and ignored is None and call.class_weight is None and tokens:
        scale = call.logits.new_full((), 1 / tokens, dtype=accumulation_dtype(call.logits.dtype))
        losses, dlogits = chosen.cross_entropy_fwd(spec, call, scale, targets)
        return losses.sum() / tokens, dlogits
    divisor = None
    if mean:
        call, divisor = _of_mean(call)
    losses, dlogits = chosen.cross_entropy_fwd(spec, call, scale_of(call.logits, divisor), targets)
    return reduced(losses.sum(), divisor), dlogits


def _of_mean(call: CrossEntropyCall) -> tuple[CrossEntropyCall, Tensor]:
    """The call whose losses are to be summed for their mean, and what to divide the sum by."""
    weight, divisor = loss_arguments.mean_of(call.class_weight, call.z_loss, call.target, call.ignore_index)
    return (call if weight is call.class_weight else replace(call, class_weight=weight)), divisor


def makes_gradient(rows: Tensor) -> bool:
    """Whether the forward of `cross_entropy` makes the gradient of logits (N, V), so that no backward runs.

    float16 waits for the gradient of the loss, without whose scale small values underflow.
    """
    if not (rows.is_cpu and torch.is_grad_enabled() and rows.requires_grad and rows.dtype != torch.float16):
        return False
    try:
        # on a CPU no choice depends on addresses or the number of classes; traced code has no
        # addresses, and one program serves every number
        chosen = backends.select(dense_spec(rows, 1, False), "auto", "cross_entropy_fwd")
    except RuntimeError:  # the call will be refused, by the same reason
        return False
    return "cross_entropy_fwd" in getattr(chosen, "MAKES_GRADIENTS", ())


def _cross_entropy_mean_fake(logits: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    mean = logits.new_empty((), dtype=accumulation_dtype(logits.dtype))
    return mean, torch.empty_like(logits, memory_format=torch.contiguous_format)


def _setup_mean(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    save_inputs(ctx, inputs, ())
    ctx.mark_non_differentiable(output[1])
    ctx.made = [output[1:]]  # the gradient, for the first backward to scale in place and give away


def _mean_backward(ctx: Any, dmean: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    inputs = saved(ctx)[0]
    dlogits = None if dmean is None else gradient_of_mean(ctx.made, dmean, *inputs)
    return (dlogits, *(None,) * (len(inputs) - 1))


def gradient_of_mean(made: list[Any], dmean: Tensor, *inputs: Any) -> Tensor:
    """The gradient of the logits from that of the op `cross_entropy_mean` with these inputs. `made` holds what its
    forward made, until a backward has taken it; where a graph of the gradient is wanted, the op of the backward runs.
    """
    dlogits: Tensor
    if not torch.is_grad_enabled():
        (dlogits,) = scaled(taken(made) or run_cross_entropy_mean(*inputs)[1:], dmean, inputs[:1])
        return dlogits
    *call_args, mean, backend = inputs
    call, divisor = CrossEntropyCall(*call_args), None
    if mean:
        call, divisor = _of_mean(call)
    args = [getattr(call, name) for name in _NAMES]
    with torch.no_grad():
        _, norms = run_cross_entropy(*args, backend)
    dlosses = (dmean * scale_of(call.logits, divisor)).expand(norms.shape[0])
    dlogits = run_backward(dlosses, norms, *args, backend)
    return dlogits


run_cross_entropy_mean = define(
    LIBRARY,
    "cross_entropy_mean",
    f"({CALL}, bool mean, str backend) -> (Tensor mean, Tensor dlogits)",
    _cross_entropy_mean,
    _cross_entropy_mean_fake,
    (_setup_mean, _mean_backward),
    function="cross_entropy_fwd",
)
