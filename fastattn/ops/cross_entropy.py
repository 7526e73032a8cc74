"""`cross_entropy` and `linear_cross_entropy`: the public calls, and their registration as torch ops."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from fastattn import backends, reference_losses
from fastattn.ops import arguments, composite, flops
from fastattn.ops.registration import at_positions, save_inputs, saved, schema_of, wanted_or_empty
from fastattn.spec import CrossEntropyCall, LinearCrossEntropyCall, SoftmaxSpec, accumulation_dtype

REDUCTIONS = ("none", "mean", "sum")
_MATERIALISED = "all logits and their probabilities"


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """logsumexp(z) - (1 - s) * z[target] - s * mean(z) for the logits z of each token and label smoothing s.

    Args:
        logits: (V,), (N, V) or (N, V, ...), as torch's: float16, bfloat16, float32 or float64. Sums are kept in
            float32 or float64.
        target: class indices, integers of shape (), (N,) or (N, ...); each in [0, V) or `ignore_index`.
        ignore_index: tokens with this target have loss 0 and no gradient, even where their logits are NaN.
        label_smoothing: share of the target's weight spread over all classes, in [0, 1].
        reduction: "none", "sum", or "mean" over the tokens that are not ignored: NaN if all are, as torch's.

    Returns:
        A scalar, or target's shape under "none"; in the dtype of logits, float32 under autocast.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it. On a GPU, where looking would cost a
            synchronisation, a token whose target is no class has loss NaN.
    """
    arguments.check_tensor("logits", logits)
    arguments.check_floating("logits", logits)
    if logits.dim() == 0:
        raise ValueError("logits: got shape (), needs (V,), (N, V) or (N, V, ...)")
    classes_dim = 0 if logits.dim() == 1 else 1
    shape = (*logits.shape[:classes_dim], *logits.shape[classes_dim + 1 :])
    target = _targets(target, shape, logits, "logits")
    ignore_index, label_smoothing = _options(ignore_index, label_smoothing, reduction)
    num_classes = logits.shape[classes_dim]
    if num_classes == 0:
        raise ValueError(f"logits: got shape {arguments.shape_of(logits)}, needs at least one class")
    result_dtype = _loss_dtype(logits)
    rows = logits.movedim(classes_dim, -1).reshape(-1, num_classes)
    call = (rows, target.reshape(-1), ignore_index, label_smoothing)
    if (transform := composite.transform_in_use(call)) is not None:
        composite.refuse_named("auto", transform, _MATERIALISED)
        losses = _composite(CrossEntropyCall(*call))
    else:
        losses, _ = torch.ops.fastattn.cross_entropy_fwd(*call, "auto")
    if reduction == "none":
        return losses.view(shape).to(result_dtype)
    return _reduced(losses.sum(), target, ignore_index, reduction).to(result_dtype)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    softcap: float | None = None,
) -> Tensor:
    """`cross_entropy` of softcap * tanh((hidden @ weight.T + bias) / softcap), a few tokens' logits at a time.

    Under "mean" and "sum" the forward pass also makes the gradients, three products of the logits' size in all, and
    keeps them until the backward scales them; under "none" the backward makes the logits again.

    Args:
        hidden: (..., E), float16, bfloat16, float32 or float64.
        weight: (V, E), of the same dtype.
        target: (...), class indices; each in [0, V) or `ignore_index`.
        bias: (V,), of the same dtype.
        softcap: logits become softcap * tanh(logit / softcap).
        ignore_index, label_smoothing, reduction: as in `cross_entropy`; ignored tokens may hold NaN.

    Returns:
        A scalar, or target's shape under "none"; in the dtype of hidden, float32 under autocast.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it. On a GPU, where looking would cost a
            synchronisation, a token whose target is no class has loss NaN.

    Source: the chunking is that of Wijmans et al., "Cut Your Losses in Large-Vocabulary Language Models" (2024), with
    a loop over tokens instead of a kernel over tiles.
    """
    for name, tensor in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if tensor is not None:
            arguments.check_tensor(name, tensor)
            arguments.check_floating(name, tensor)
    result_dtype = _loss_dtype(hidden)
    hidden, weight, bias = _autocast(hidden), _autocast(weight), None if bias is None else _autocast(bias)
    _check_linear(hidden, weight, bias)
    shape = tuple(hidden.shape[:-1])
    target = _targets(target, shape, hidden, "hidden")
    ignore_index, label_smoothing = _options(ignore_index, label_smoothing, reduction)
    cap = arguments.positive_or_zero("softcap", softcap, hidden.dtype)
    rows, flat = hidden.reshape(-1, hidden.shape[-1]), target.reshape(-1)
    call = (rows, weight, bias, flat, ignore_index, label_smoothing, cap)
    needs = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in (rows, weight, bias)]
    if (transform := composite.transform_in_use(call)) is not None:
        composite.refuse_named("auto", transform, _MATERIALISED)
        losses = _linear_composite(LinearCrossEntropyCall(*call))
    elif reduction != "none" and any(needs):
        total = torch.ops.fastattn.linear_cross_entropy_sum(*call, needs, "auto")[0]
        return _reduced(total, target, ignore_index, reduction).to(result_dtype)
    else:
        losses, _ = torch.ops.fastattn.linear_cross_entropy_fwd(*call, "auto")
    if reduction == "none":
        return losses.view(shape).to(result_dtype)
    return _reduced(losses.sum(), target, ignore_index, reduction).to(result_dtype)


def _targets(target: Tensor, shape: tuple[int, ...], like: Tensor, name: str) -> Tensor:
    arguments.check_tensor("target", target)
    if target.dtype not in arguments.INTEGER_DTYPES:
        raise TypeError(f"target: got {target.dtype}, needs integers (class indices)")
    if target.shape != shape:
        got, whole = arguments.shape_of(target), arguments.shape_of(like)
        raise ValueError(f"target: got shape {got}, needs {tuple(shape)} for {name} of shape {whole}")
    if target.device != like.device:
        raise ValueError(f"target: got device {target.device}, needs that of {name}, {like.device}")
    return target.long()


def _options(ignore_index: int, label_smoothing: float, reduction: str) -> tuple[int, float]:
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index: got {type(ignore_index).__name__}, needs an int")
    if isinstance(label_smoothing, (bool, str, Tensor)) or label_smoothing is None:
        raise TypeError(f"label_smoothing: got {type(label_smoothing).__name__}, needs a number")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing: got {label_smoothing}, needs 0 to 1")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: got {reduction!r}, needs {', '.join(REDUCTIONS)}")
    return ignore_index, float(label_smoothing)


def _check_linear(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if hidden.dim() == 0:
        raise ValueError("hidden: got shape (), needs (..., E)")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1] or weight.shape[0] == 0:
        got, width = arguments.shape_of(weight), hidden.shape[-1]
        raise ValueError(f"weight: got shape {got}, needs (V, {width}) for hidden of width {width}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias: got shape {arguments.shape_of(bias)}, needs ({weight.shape[0]},)")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        if tensor.dtype != hidden.dtype:
            raise TypeError(
                f"{name}: got {tensor.dtype}, needs hidden's {hidden.dtype}; cast it or use autocast"
            )
        if tensor.device != hidden.device:
            raise ValueError(f"{name}: got device {tensor.device}, needs hidden's {hidden.device}")


def _autocast(tensor: Tensor) -> Tensor:
    """An operand of a matrix product in autocast's dtype where autocast is on; float64 is left alone."""
    if tensor.dtype == torch.float64 or not arguments.autocasts(tensor.device.type):
        return tensor
    return tensor.to(torch.get_autocast_dtype(tensor.device.type))


def _loss_dtype(logits: Tensor) -> torch.dtype:
    return accumulation_dtype(logits.dtype) if arguments.autocasts(logits.device.type) else logits.dtype


def _reduced(total: Tensor, target: Tensor, ignore_index: int, reduction: str) -> Tensor:
    """The sum of losses, or their mean over the tokens that count; no gradient flows from a mean of none."""
    if reduction == "sum":
        return total
    count = (target != ignore_index).sum()
    return torch.where(count > 0, total / count.clamp(min=1), torch.nan)


def _composite(call: CrossEntropyCall) -> Tensor:
    """Losses in differentiable torch operations."""
    logits = call.logits.to(accumulation_dtype(call.logits.dtype))
    return reference_losses.cross_entropy(logits, call.target, call.ignore_index, call.label_smoothing)


def _linear_composite(call: LinearCrossEntropyCall) -> Tensor:
    dtype = accumulation_dtype(call.hidden.dtype)
    bias = None if call.bias is None else call.bias.to(dtype)
    return reference_losses.linear_cross_entropy(
        call.hidden.to(dtype), call.weight.to(dtype), call.target, bias, call.ignore_index, call.label_smoothing,
        call.softcap,
    )  # fmt: skip


_LIBRARY = torch.library.Library("fastattn", "FRAGMENT")
_CALL = schema_of(fields(CrossEntropyCall))
_LINEAR = schema_of(fields(LinearCrossEntropyCall))
_LIBRARY.define(f"cross_entropy_fwd({_CALL}, str backend) -> (Tensor losses, Tensor norms)")
_LIBRARY.define(f"cross_entropy_bwd(Tensor dlosses, Tensor norms, {_CALL}, str backend) -> Tensor")
_LIBRARY.define(f"linear_cross_entropy_fwd({_LINEAR}, str backend) -> (Tensor losses, Tensor norms)")
_LIBRARY.define(
    f"linear_cross_entropy_bwd(Tensor dlosses, Tensor norms, {_LINEAR}, bool[] needs, str backend)"
    " -> (Tensor, Tensor, Tensor)"
)
_LIBRARY.define(
    f"linear_cross_entropy_sum({_LINEAR}, bool[] needs, str backend)"
    " -> (Tensor total, Tensor norms, Tensor dhidden, Tensor dweight, Tensor dbias)"
)


def _cross_entropy_fwd(*args: Any) -> tuple[Tensor, Tensor]:
    *call_args, backend = args
    call = CrossEntropyCall(*call_args)
    _check_values(call.target, call.logits.shape[1], call.ignore_index)
    spec = SoftmaxSpec.of(call.logits)
    losses, norms = backends.select(spec, backend, "cross_entropy_fwd").cross_entropy_fwd(spec, call)
    return losses, norms


def _cross_entropy_bwd(dlosses: Tensor, norms: Tensor, *args: Any) -> Tensor:
    *call_args, backend = args
    call = CrossEntropyCall(*call_args)
    spec = SoftmaxSpec.of(call.logits, backward=True)
    run = backends.select(spec, backend, "cross_entropy_bwd").cross_entropy_bwd
    dlogits: Tensor = run(spec, call, dlosses, norms)
    return dlogits


def _linear_spec(call: LinearCrossEntropyCall, backward: bool) -> SoftmaxSpec:
    """The spec of the rows of logits."""
    row = call.hidden.new_empty(0).expand(1, 0) if call.weight.shape[0] == 0 else call.weight[:, :1].mT
    return SoftmaxSpec.of(row, backward=backward).replace(unit_columns=True, wide_rows=False)


def _linear_fwd(*args: Any) -> tuple[Tensor, Tensor]:
    *call_args, backend = args
    call = LinearCrossEntropyCall(*call_args)
    _check_values(call.target, call.weight.shape[0], call.ignore_index)
    spec = _linear_spec(call, backward=False)
    run = backends.select(spec, backend, "linear_cross_entropy_fwd").linear_cross_entropy_fwd
    losses, norms, _ = run(spec, call)
    return losses, norms


def _linear_bwd(dlosses: Tensor, norms: Tensor, *args: Any) -> tuple[Tensor, ...]:
    *call_args, needs, backend = args
    call = LinearCrossEntropyCall(*call_args)
    spec = _linear_spec(call, backward=True)
    run = backends.select(spec, backend, "linear_cross_entropy_bwd").linear_cross_entropy_bwd
    grads = (None if g is None else g.to(call.hidden.dtype) for g in run(spec, call, dlosses, norms, needs))
    return wanted_or_empty(grads, needs, call.hidden)


def _linear_sum(*args: Any) -> tuple[Tensor, ...]:
    *call_args, needs, backend = args
    call = LinearCrossEntropyCall(*call_args)
    _check_values(call.target, call.weight.shape[0], call.ignore_index)
    spec = _linear_spec(call, backward=True)
    run = backends.select(spec, backend, "linear_cross_entropy_fwd").linear_cross_entropy_fwd
    losses, norms, grads = run(spec, call, needs)
    return (losses.sum(), norms, *wanted_or_empty(grads, needs, call.hidden))


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


def _check_values(target: Tensor, num_classes: int, ignore_index: int) -> None:
    """What only real data shows, and a CPU shows without a synchronisation."""
    if target.device.type != "cpu":
        return
    wrong = target[((target < 0) | (target >= num_classes)) & (target != ignore_index)]
    if wrong.numel():
        raise ValueError(
            f"target: got {int(wrong[0])}, needs 0 to {num_classes - 1} or {ignore_index} to be ignored"
        )


_LINEAR_NAMES = [field.name for field in fields(LinearCrossEntropyCall)]
_LINEAR_POSITIONS = tuple(_LINEAR_NAMES.index(name) for name in ("hidden", "weight", "bias"))


def _setup_fwd(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    save_inputs(ctx, inputs, output[1:])
    ctx.mark_non_differentiable(output[1])


def _setup_bwd(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    save_inputs(ctx, inputs, ())


def _setup_sum(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    save_inputs(ctx, inputs, output[1:])
    ctx.mark_non_differentiable(*output[1:])


def _cross_entropy_backward(ctx: Any, dlosses: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    inputs, (norms,) = saved(ctx)
    dlogits = None
    if dlosses is not None:
        dlogits = torch.ops.fastattn.cross_entropy_bwd(dlosses, norms, *inputs)
    return (dlogits, *(None,) * (len(inputs) - 1))


def _linear_backward(ctx: Any, dlosses: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    inputs, (norms,) = saved(ctx)
    if dlosses is None:
        return (None,) * len(inputs)
    *call_args, backend = inputs
    needs = [ctx.needs_input_grad[position] for position in _LINEAR_POSITIONS]
    grads = torch.ops.fastattn.linear_cross_entropy_bwd(dlosses, norms, *call_args, needs, backend)
    return tuple(at_positions(len(inputs), _LINEAR_POSITIONS, grads, needs))


def _sum_backward(ctx: Any, dtotal: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    """The kept gradients scaled; they are constants, so a graph of this backward is made from the losses instead."""
    inputs, (norms, *kept) = saved(ctx)
    if dtotal is None:
        return (None,) * len(inputs)
    *call_args, needs, backend = inputs
    if torch.is_grad_enabled():
        dlosses = dtotal.expand(norms.shape[0])
        grads = torch.ops.fastattn.linear_cross_entropy_bwd(dlosses, norms, *call_args, needs, backend)
    else:
        grads = [(grad * dtotal).to(call_args[0].dtype) for grad in kept]
    return tuple(at_positions(len(inputs), _LINEAR_POSITIONS, grads, needs))


def _cross_entropy_double_backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
    inputs, _ = saved(ctx)
    dlosses, _, logits, *options, _ = inputs

    def forward(logits: Tensor) -> tuple[Tensor]:
        return (_composite(CrossEntropyCall(logits, *options)),)

    (of_dlosses,), (of_logits,) = composite.second_derivative(
        forward, [logits], (dlosses,), (grad,), _MATERIALISED
    )
    return (of_dlosses, None, of_logits, *(None,) * (len(inputs) - 3))


def _linear_double_backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    inputs, _ = saved(ctx)
    dlosses, _, hidden, weight, bias, *options, _, _ = inputs

    def forward(*operands: Tensor | None) -> tuple[Tensor]:
        return (_linear_composite(LinearCrossEntropyCall(*operands, *options)),)  # type: ignore[arg-type]

    (of_dlosses,), of_operands = composite.second_derivative(
        forward, [hidden, weight, bias], (dlosses,), grads, _MATERIALISED
    )
    return (of_dlosses, None, *of_operands, *(None,) * (len(inputs) - 5))


for _name, _kernel, _fake in (
    ("cross_entropy_fwd", _cross_entropy_fwd, _per_token_fake),
    ("cross_entropy_bwd", _cross_entropy_bwd, _cross_entropy_bwd_fake),
    ("linear_cross_entropy_fwd", _linear_fwd, _per_token_fake),
    ("linear_cross_entropy_bwd", _linear_bwd, _linear_bwd_fake),
    ("linear_cross_entropy_sum", _linear_sum, _linear_sum_fake),
):
    _LIBRARY.impl(_name, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastattn::{_name}", _fake, lib=_LIBRARY)

for _name, _setup, _backward in (
    ("cross_entropy_fwd", _setup_fwd, _cross_entropy_backward),
    ("cross_entropy_bwd", _setup_bwd, _cross_entropy_double_backward),
    ("linear_cross_entropy_fwd", _setup_fwd, _linear_backward),
    ("linear_cross_entropy_bwd", _setup_bwd, _linear_double_backward),
    ("linear_cross_entropy_sum", _setup_sum, _sum_backward),
):
    torch.library.register_autograd(f"fastattn::{_name}", _backward, setup_context=_setup, lib=_LIBRARY)

flops.register(
    linear_cross_entropy_fwd=flops.linear_loss_flops,
    linear_cross_entropy_sum=flops.linear_loss_sum_flops,
    linear_cross_entropy_bwd=flops.linear_loss_backward_flops,
)
