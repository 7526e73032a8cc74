"""`linear_cross_entropy`: the public call."""

from __future__ import annotations

from functools import partial
from typing import Any, NoReturn, cast

import torch
from torch import Tensor

from fastattn import backends
from fastattn.ops import arguments, composite, loss_arguments, plain, plan, spelling, symbolic
from fastattn.ops.cross_entropy_registration import (
    MATERIALISED,
    check_values,
    linear_composed,
    linear_spec,
    reduced,
    run_linear,
    run_linear_sum,
)
from fastattn.ops.loss_passes import finished, refuse_early
from fastattn.spec import LinearCrossEntropyCall, SoftmaxSpec


@spelling.without_unknown
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
    class_weight: Tensor | None = None,
    z_loss: float = 0.0,
    **unknown: NoReturn,
) -> Tensor:
    """`cross_entropy` of softcap * tanh((hidden @ weight.T + bias) / softcap), a few tokens' logits at a time.

    Under "mean" and "sum" the forward pass also makes the gradients, three products of the logits' size in all, and
    keeps them until the backward scales them; under "none" the backward makes the logits again.

    Args:
        hidden: (..., E), float16, bfloat16, float32 or float64. Under autocast hidden, weight and bias are cast to its
            dtype, float64 excepted.
        weight: (V, E), of the same dtype.
        target: (...), class indices, any integer dtype; each in [0, V) or `ignore_index`.
        bias: (V,), of the same dtype.
        softcap: a positive number, logits become softcap * tanh(logit / softcap); None for none.
        ignore_index, label_smoothing, reduction, class_weight, z_loss: as in `cross_entropy`; ignored tokens may hold
            NaN. Class weights are not `weight`, which makes the logits.

    Returns:
        A scalar, or target's shape under "none"; in the dtype of hidden, float32 under autocast.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it. A target that is not a class raises an
            error that is also an IndexError, as torch's is. On a GPU, where the check would cost a synchronisation,
            such a token has loss NaN instead, and so has the mean or sum.
        RuntimeError: class_weight requires grad, or the backend that FASTATTN_BACKEND names cannot run the call.

    Source: the chunking is that of Wijmans et al., "Cut Your Losses in Large-Vocabulary Language Models" (2024), with
    a loop over tokens instead of a kernel over tiles.
    """
    planned, tensors = None, (hidden, weight, target, bias, class_weight)
    if not unknown:
        kinds = (type(ignore_index), type(label_smoothing), type(z_loss), type(softcap))
        options = (ignore_index, label_smoothing, reduction, z_loss, softcap, kinds, "auto")
        planned, found = plan.look_up("linear_cross_entropy", tensors, options)
        if found is not None:
            return cast(Tensor, found(*tensors))
    if symbolic.any_proxy(hidden, weight, target):
        return cast(Tensor, symbolic.record(linear_cross_entropy, locals()))
    if unknown:
        raise spelling.unexpected(linear_cross_entropy, unknown)
    checked = _linear_arguments(
        hidden, weight, target, bias, ignore_index, label_smoothing, reduction, softcap, class_weight, z_loss
    )
    rows, weight, bias, flat, ignore_index, label_smoothing, cap, class_weight, z_loss, shape = checked
    result_dtype, needs = loss_arguments.loss_dtype(hidden), _needs(rows, weight, bias)
    refuse_early(
        lambda: _linear_passes(rows, weight, needs, reduction), (rows, weight, bias, flat, class_weight)
    )
    call: Any = (rows, weight, bias, flat, class_weight)
    fused = not plain.wanted()
    if fused and (transform := composite.transform_in_use(call)) is not None:
        composite.refuse_named("auto", transform, MATERIALISED)
        check_values(target, weight.shape[0], ignore_index)
        fused = False
    settled: Any = (ignore_index, label_smoothing, cap, z_loss, reduction, shape, result_dtype, needs)
    result = _linear_losses(*settled, *call, fused=fused)
    if plan.wanted(planned):
        plan.keep(planned, partial(_linear_planned, *settled))
    return result


def _linear_losses(
    ignore_index: int, label_smoothing: float, softcap: float, z_loss: float, reduction: str, shape: tuple[int, ...],
    dtype: torch.dtype, needs: list[bool], rows: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor,
    class_weight: Tensor | None, *, fused: bool = True,
) -> Tensor:  # fmt: skip
    """The result of `linear_cross_entropy` once everything is checked; not fused, in differentiable torch
    operations."""
    divisor = None
    if reduction == "mean":
        class_weight, divisor = loss_arguments.mean_of(class_weight, z_loss, target, ignore_index)
    call = (rows, weight, bias, target, ignore_index, label_smoothing, softcap, class_weight, z_loss)
    if not fused:
        losses = linear_composed(LinearCrossEntropyCall(*call))
    elif reduction != "none" and any(needs):
        if rows.dtype == torch.float16:
            return reduced(run_linear_sum(*call, None, needs, "auto")[0], divisor).to(dtype)
        return cast(Tensor, run_linear_sum(*call, divisor, needs, "auto")[0].to(dtype))
    else:
        losses, _ = run_linear(*call, "auto")
    return finished(losses, divisor, reduction, shape, dtype)


def _linear_planned(*args: Any) -> Tensor:
    """The result of `linear_cross_entropy` for a call of a kind whose checks, the first arguments of
    `_linear_losses`, are known."""
    *settled, hidden, weight, target, bias, class_weight = args
    if class_weight is not None:
        class_weight = loss_arguments.as_class_weight(class_weight, hidden.dtype)
    rows = hidden.flatten(0, -2) if hidden.dim() > 1 else hidden[None]
    settled += [rows, weight, bias, target.long().flatten(), class_weight]
    return _linear_losses(*settled)


@spelling.without_unknown
def explain_linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    softcap: float | None = None,
    class_weight: Tensor | None = None,
    z_loss: float = 0.0,
    **unknown: NoReturn,
) -> backends.Explanation:
    """Which backend `linear_cross_entropy` would use for these arguments, and why not the others.

    It runs nothing.

    Args:
        hidden, weight, target, bias, softcap: those of `linear_cross_entropy`.
        ignore_index, label_smoothing, reduction, class_weight, z_loss: those of `linear_cross_entropy`.

    Returns:
        A `fastattn.backends.Explanation`; its `backward` names a backend under "none" only: otherwise the forward pass
        makes the gradients.

    Raises:
        ValueError, TypeError: an argument does not fit `linear_cross_entropy`; the message names it.
        RuntimeError: class_weight requires grad, or the backend that FASTATTN_BACKEND names cannot run the call.
    """
    if unknown:
        raise spelling.unexpected(linear_cross_entropy, unknown, "explain_linear_cross_entropy")
    outlook = plan.outlook(hidden, weight, target, bias, class_weight)
    rows, weight, bias, flat, ignore_index, *_ = _linear_arguments(
        hidden, weight, target, bias, ignore_index, label_smoothing, reduction, softcap, class_weight, z_loss
    )
    check_values(flat, weight.shape[0], ignore_index)
    passes = _linear_passes(rows, weight, _needs(rows, weight, bias), reduction)
    return backends.explanation(passes, "auto", outlook)


def _linear_arguments(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    reduction: str,
    softcap: float | None,
    class_weight: Tensor | None,
    z_loss: float,
) -> tuple[Any, ...]:
    """The arguments of `linear_cross_entropy`, checked, in the order of LinearCrossEntropyCall's fields, and the
    losses' shape."""
    given = [("hidden", hidden), ("weight", weight)]
    for name, tensor in given if bias is None else [*given, ("bias", bias)]:
        arguments.check_tensor(name, tensor)
        arguments.check_floating(name, tensor)
    hidden = loss_arguments.autocast(hidden)
    if not loss_arguments.stays_wide(weight, hidden):
        weight = loss_arguments.autocast(weight)
    if bias is not None and not loss_arguments.stays_wide(bias, hidden):
        bias = loss_arguments.autocast(bias)
    loss_arguments.check_linear(hidden, weight, bias)
    shape = tuple(hidden.shape[:-1])
    target = loss_arguments.checked_targets(target, shape, hidden, "hidden")
    ignore_index, label_smoothing = loss_arguments.checked_options(ignore_index, label_smoothing, reduction)
    cap = arguments.softcap_or_zero(softcap, hidden.dtype)
    z_loss = loss_arguments.checked_z_loss(z_loss)
    class_weight = loss_arguments.checked_class_weight(class_weight, weight.shape[0], hidden, "hidden")
    rows, flat = hidden.flatten(0, -2) if hidden.dim() > 1 else hidden[None], target.flatten()
    return rows, weight, bias, flat, ignore_index, label_smoothing, cap, class_weight, z_loss, shape


def _needs(*operands: Tensor | None) -> list[bool]:
    """Which operands' gradients a backward would ask for."""
    return [torch.is_grad_enabled() and t is not None and t.requires_grad for t in operands]


def _linear_passes(rows: Tensor, weight: Tensor, needs: list[bool], reduction: str) -> dict[str, SoftmaxSpec]:
    """Specs of `linear_cross_entropy`'s passes: the forward makes the gradients too, but for "none"."""
    if reduction != "none" or not any(needs):
        return {"linear_cross_entropy_fwd": linear_spec(rows, weight, backward=any(needs))}
    return {
        f"linear_cross_entropy_{direction}": linear_spec(rows, weight, backward=direction == "bwd")
        for direction in ("fwd", "bwd")
    }
