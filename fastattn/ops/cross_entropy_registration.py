"""The losses as torch ops: schemas, implementations, fakes, and gradients of any order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from fastattn import backends, reference, torch_compat
from fastattn.backends import layout
from fastattn.ops import arguments, composite, flops
from fastattn.ops.registration import (
    at_positions,
    define,
    keep_inputs,
    save_inputs,
    saved,
    schema_of,
    wanted_or_empty,
)
from fastattn.ops.values import values_are_known
from fastattn.spec import CrossEntropyCall, LinearCrossEntropyCall, SoftmaxSpec, accumulation_dtype, arch_of
from fastattn.strides import ALIGNMENT

MATERIALISED = "all logits and their probabilities"


def composed(call: CrossEntropyCall) -> Tensor:
    """Losses in differentiable torch operations."""
    logits = call.logits.to(accumulation_dtype(call.logits.dtype))
    return reference.cross_entropy(
        logits, call.target, call.ignore_index, call.label_smoothing, call.class_weight, call.z_loss
    )


def linear_composed(call: LinearCrossEntropyCall) -> Tensor:
    """Losses of a linear layer in differentiable torch operations, all logits materialised."""
    dtype = accumulation_dtype(call.hidden.dtype)
    bias = None if call.bias is None else call.bias.to(dtype)
    return reference.linear_cross_entropy(
        call.hidden.to(dtype), call.weight.to(dtype), call.target, bias, call.ignore_index, call.label_smoothing,
        call.softcap, call.class_weight, call.z_loss,
    )  # fmt: skip


def _cross_entropy_fwd(*args: Any) -> tuple[Tensor, Tensor]:
    *call_args, backend = args
    call = CrossEntropyCall(*call_args)
    check_values(call.target, call.logits.shape[1], call.ignore_index)
    spec = SoftmaxSpec.of(call.logits)
    chosen = backends.select(spec, backend, "cross_entropy_fwd")
    losses, norms = chosen.cross_entropy_fwd(spec, layout.for_backend(chosen, call))
    return losses, norms


def scale_of(logits: Tensor, divisor: Tensor | None) -> Tensor:
    """The gradient of each token's loss under "mean"; 0 if no token counts."""
    dtype = accumulation_dtype(logits.dtype)
    if divisor is None:
        return logits.new_ones((), dtype=dtype)
    return torch.where(divisor != 0, 1 / divisor.double(), 0).to(dtype)


def reduced(total: Tensor, divisor: Tensor | None) -> Tensor:
    """The sum of losses, or their mean; a mean over no token has no gradient."""
    if divisor is None:
        return total
    if not divisor.is_floating_point():
        return torch.where(divisor > 0, total / divisor.clamp(min=1), torch.nan)
    of_none = total.detach() / divisor
    return torch.where(divisor != 0, total / torch.where(divisor != 0, divisor, 1), of_none)


def cross_entropy_bwd(dlosses: Tensor, norms: Tensor, *args: Any) -> Tensor:
    """The gradient of logits (N, V) from those of the losses: the op of the backward."""
    *call_args, backend = args
    call = CrossEntropyCall(*call_args)
    spec = SoftmaxSpec.of(call.logits, backward=True)
    chosen = backends.select(spec, backend, "cross_entropy_bwd")
    dlosses, norms = (layout.contiguous(chosen, rows) for rows in (dlosses, norms))
    dlogits: Tensor = chosen.cross_entropy_bwd(spec, layout.for_backend(chosen, call), dlosses, norms)
    return dlogits


def linear_spec(hidden: Tensor, weight: Tensor, backward: bool) -> SoftmaxSpec:
    """The spec of the rows of logits, which backends make a few at a time."""
    return dense_spec(hidden, weight.shape[0], backward)


def dense_spec(like: Tensor, classes: int, backward: bool) -> SoftmaxSpec:
    """The spec of dense logits of the dtype and on the device of a tensor."""
    return SoftmaxSpec(
        device=like.device.type,
        arch=arch_of(like),
        dtype=like.dtype,
        columns=1 << max(classes - 1, 0).bit_length(),
        unit_columns=True,
        int64_offsets=False,
        backward=backward,
        aligned=classes * like.element_size() % ALIGNMENT == 0,
    )


def _linear_call(*args: Any) -> LinearCrossEntropyCall:
    """The call with weight and bias in the dtype of hidden, which autocast may have left wider."""
    call = LinearCrossEntropyCall(*args)
    dtype = call.hidden.dtype
    if call.weight.dtype == dtype and (call.bias is None or call.bias.dtype == dtype):
        return call
    return replace(
        call, weight=call.weight.to(dtype), bias=None if call.bias is None else call.bias.to(dtype)
    )


def _linear_fwd(*args: Any) -> tuple[Tensor, Tensor]:
    *call_args, backend = args
    call = _linear_call(*call_args)
    check_values(call.target, call.weight.shape[0], call.ignore_index)
    spec = linear_spec(call.hidden, call.weight, backward=False)
    chosen = backends.select(spec, backend, "linear_cross_entropy_fwd")
    losses, norms, _ = chosen.linear_cross_entropy_fwd(spec, layout.for_backend(chosen, call))
    return losses, norms


def _linear_bwd(dlosses: Tensor, norms: Tensor, *args: Any) -> tuple[Tensor, ...]:
    *call_args, needs, backend = args
    call = _linear_call(*call_args)
    spec = linear_spec(call.hidden, call.weight, backward=True)
    chosen = backends.select(spec, backend, "linear_cross_entropy_bwd")
    call = layout.for_backend(chosen, call)
    dlosses, norms = (layout.contiguous(chosen, rows) for rows in (dlosses, norms))
    found = zip(chosen.linear_cross_entropy_bwd(spec, call, dlosses, norms, needs), call_args[:3])
    grads = (None if grad is None else grad.to(operand.dtype) for grad, operand in found)
    return wanted_or_empty(grads, needs, call.hidden)


def _linear_sum(*args: Any) -> tuple[Tensor, ...]:
    *call_args, divisor, needs, backend = args
    call = _linear_call(*call_args)
    check_values(call.target, call.weight.shape[0], call.ignore_index)
    spec = linear_spec(call.hidden, call.weight, backward=True)
    chosen = backends.select(spec, backend, "linear_cross_entropy_fwd")
    call = layout.for_backend(chosen, call)
    scale = None if divisor is None else scale_of(call.hidden, divisor)
    losses, norms, grads = chosen.linear_cross_entropy_fwd(spec, call, needs, scale)
    return (reduced(losses.sum(), divisor), norms, *wanted_or_empty(grads, needs, call.hidden))


def _per_token_fake(first: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    losses = first.new_empty(first.shape[0], dtype=accumulation_dtype(first.dtype))
    return losses, losses.new_empty(first.shape[0], 2)


def _cross_entropy_bwd_fake(dlosses: Tensor, norms: Tensor, logits: Tensor, *args: Any) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _linear_bwd_fake(dlosses: Tensor, norms: Tensor, *args: Any) -> tuple[Tensor, ...]:
    grads = (None if tensor is None else torch.empty_like(tensor) for tensor in args[:3])
    return wanted_or_empty(grads, args[-2], args[0])


def _linear_sum_fake(*args: Any) -> tuple[Tensor, ...]:
    hidden, weight, bias = args[:3]
    losses, norms = _per_token_fake(hidden)
    grads = (
        torch.empty_like(hidden),
        torch.empty_like(weight, dtype=norms.dtype),
        None if bias is None else torch.empty_like(bias, dtype=norms.dtype),
    )
    return (losses.new_empty(()), norms, *wanted_or_empty(grads, args[-2], hidden))


def check_values(target: Tensor, num_classes: int, ignore_index: int) -> None:
    """Check values, which needs real data and is done on a CPU, where it costs no synchronisation."""
    if target.device.type != "cpu" or not values_are_known(target) or target.numel() == 0:
        return
    lowest, highest = torch.aminmax(target)
    if lowest >= 0 and highest < num_classes:
        return
    wrong = target[((target < 0) | (target >= num_classes)) & (target != ignore_index)]
    if wrong.numel():
        raise arguments.OutOfRangeError(
            f"target: got {int(wrong[0])}, needs 0 to {num_classes - 1} or {ignore_index} to be ignored"
        )


_LINEAR_NAMES = [field.name for field in fields(LinearCrossEntropyCall)]
_LINEAR_POSITIONS = tuple(_LINEAR_NAMES.index(name) for name in ("hidden", "weight", "bias"))


def _setup_fwd(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    save_inputs(ctx, inputs, output[1:])
    ctx.mark_non_differentiable(output[1])


def _setup_sum(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    save_inputs(ctx, inputs, output[1:2])
    ctx.mark_non_differentiable(*output[1:])
    ctx.made = [list(output[2:])]  # gradients, for the first backward to scale in place and give away


def _cross_entropy_backward(ctx: Any, dlosses: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    inputs, (norms,) = saved(ctx)
    dlogits = None
    if dlosses is not None:
        dlogits = run_backward(dlosses, norms, *inputs)
    return (dlogits, *(None,) * (len(inputs) - 1))


def _linear_backward(ctx: Any, dlosses: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    inputs, (norms,) = saved(ctx)
    if dlosses is None:
        return (None,) * len(inputs)
    *call_args, backend = inputs
    needs = [ctx.needs_input_grad[position] for position in _LINEAR_POSITIONS]
    grads = _run_linear_backward(dlosses, norms, *call_args, needs, backend)
    return tuple(at_positions(len(inputs), _LINEAR_POSITIONS, grads, needs))


def _sum_backward(ctx: Any, dtotal: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    """The gradients that the forward made. They are constants: for a graph, the losses are differentiated."""
    inputs, (norms,) = saved(ctx)
    if dtotal is None:
        return (None,) * len(inputs)
    *call_args, divisor, needs, backend = inputs
    if torch.is_grad_enabled():
        dlosses = dtotal if divisor is None else dtotal * scale_of(call_args[0], divisor)
        grads = _run_linear_backward(dlosses.expand(norms.shape[0]), norms, *call_args, needs, backend)
    else:
        made = taken(ctx.made) or run_linear_sum(*inputs)[2:]
        grads = scaled(made, dtotal, call_args[:3])
    return tuple(at_positions(len(inputs), _LINEAR_POSITIONS, grads, needs))


def taken(made: list[Any]) -> Sequence[Tensor] | None:
    """The gradients that the forward made; None in a second backward, which computes them again with the same bits."""
    try:
        grads: Sequence[Tensor] = made.pop()
    except IndexError:
        return None
    return grads


def scaled(made: Sequence[Tensor], upstream: Tensor, operands: Sequence[Tensor | None]) -> list[Tensor]:
    """Gradients times that of the loss, in the dtypes of their operands; in place, as they may be large."""
    if not torch_compat.can_bypass_dispatcher((upstream, *made)):  # also under vmap over upstream gradients
        made = [grad * upstream for grad in made]
    elif not (upstream.is_cpu and upstream.item() == 1):
        made = [grad.mul_(upstream) for grad in made]
    return [grad if operand is None else grad.to(operand.dtype) for grad, operand in zip(made, operands)]


def _cross_entropy_double_backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
    inputs, _ = saved(ctx)
    dlosses, _, logits, *options, _ = inputs

    def forward(logits: Tensor) -> tuple[Tensor]:
        return (composed(CrossEntropyCall(logits, *options)),)

    (of_dlosses,), (of_logits,) = composite.second_derivative(
        forward, [logits], (dlosses,), (grad,), MATERIALISED
    )
    return (of_dlosses, None, of_logits, *(None,) * (len(inputs) - 3))


def _linear_double_backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    inputs, _ = saved(ctx)
    dlosses, _, hidden, weight, bias, *options, _, _ = inputs

    def forward(*operands: Tensor | None) -> tuple[Tensor]:
        return (linear_composed(LinearCrossEntropyCall(*operands, *options)),)  # type: ignore[arg-type]

    (of_dlosses,), of_operands = composite.second_derivative(
        forward, [hidden, weight, bias], (dlosses,), grads, MATERIALISED
    )
    return (of_dlosses, None, *of_operands, *(None,) * (len(inputs) - 5))


LIBRARY = torch.library.Library("fastattn", "FRAGMENT")
CALL = schema_of(fields(CrossEntropyCall))
_LINEAR = schema_of(fields(LinearCrossEntropyCall))
run_backward = define(
    LIBRARY,
    "cross_entropy_bwd",
    f"(Tensor dlosses, Tensor norms, {CALL}, str backend) -> Tensor",
    cross_entropy_bwd,
    _cross_entropy_bwd_fake,
    (keep_inputs, _cross_entropy_double_backward),
)
run_cross_entropy = define(
    LIBRARY,
    "cross_entropy_fwd",
    f"({CALL}, str backend) -> (Tensor losses, Tensor norms)",
    _cross_entropy_fwd,
    _per_token_fake,
    (_setup_fwd, _cross_entropy_backward),
)
_run_linear_backward = define(
    LIBRARY,
    "linear_cross_entropy_bwd",
    f"(Tensor dlosses, Tensor norms, {_LINEAR}, bool[] needs, str backend) -> (Tensor, Tensor, Tensor)",
    _linear_bwd,
    _linear_bwd_fake,
    (keep_inputs, _linear_double_backward),
)
run_linear = define(
    LIBRARY,
    "linear_cross_entropy_fwd",
    f"({_LINEAR}, str backend) -> (Tensor losses, Tensor norms)",
    _linear_fwd,
    _per_token_fake,
    (_setup_fwd, _linear_backward),
)
run_linear_sum = define(
    LIBRARY,
    "linear_cross_entropy_sum",
    f"({_LINEAR}, Tensor? divisor, bool[] needs, str backend)"
    " -> (Tensor total, Tensor norms, Tensor dhidden, Tensor dweight, Tensor dbias)",
    _linear_sum,
    _linear_sum_fake,
    (_setup_sum, _sum_backward),
    function="linear_cross_entropy_fwd",
)

flops.register(
    linear_cross_entropy_fwd=flops.linear_loss_flops,
    linear_cross_entropy_sum=flops.linear_loss_sum_flops,
    linear_cross_entropy_bwd=flops.linear_loss_backward_flops,
)
