"""`cross_entropy` and `linear_cross_entropy`: the public calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn, cast

import torch
from torch import Tensor

from fastattn import backends
from fastattn.ops import arguments, composite, plain, spelling, symbolic
from fastattn.ops.cross_entropy_registration import (
    MATERIALISED,
    check_values,
    composed,
    linear_composed,
    linear_spec,
    run_cross_entropy,
    run_linear,
    run_linear_sum,
)
from fastattn.spec import CrossEntropyCall, LinearCrossEntropyCall, SoftmaxSpec, accumulation_dtype

REDUCTIONS = ("none", "mean", "sum")


@spelling.without_unknown
def cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    class_weight: Tensor | None = None,
    z_loss: float = 0.0,
    **unknown: NoReturn,
) -> Tensor:
    """logsumexp(z) - (1 - s) * z[target] - s * mean(z) for the logits z of each token and label smoothing s.

    With class weights w, lse = logsumexp(z): (1 - s) * w[target] * (lse - z[target]) + s * mean(w * (lse - z)), as
    torch's `weight`. z_loss adds z_loss * lse**2 to that, whatever the class.

    Args:
        logits: (V,), (N, V) or (N, V, ...), as torch's: float16, bfloat16, float32 or float64. Sums are kept in
            float32 or float64.
        target: class indices, integers of shape (), (N,) or (N, ...); each in [0, V) or `ignore_index`.
        ignore_index: tokens with this target have loss 0 and no gradient, even where their logits are NaN.
        label_smoothing: share of the target's weight spread over all classes, in [0, 1].
        reduction: "none" for the loss of each token, "sum", or "mean" over the tokens that are not ignored: NaN if all
            are, as torch's. Under class weights that mean is torch's weighted one, the sum over that of w[target]; the
            mean of z_loss * lse**2, which is added to it, remains one over the tokens that are not ignored.
        class_weight: (V,), any float dtype, without gradient: a factor on the cross-entropy of tokens of each class.
        z_loss: 0 or more; small values (1e-4) keep lse near 0, which keeps logits from drifting.

    Returns:
        A scalar, or target's shape under "none"; in the dtype of logits, float32 under autocast.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it. A target that is no class raises an error
            that is also an IndexError, as torch's is. On a GPU, where looking would cost a synchronisation, such a
            token has loss NaN instead, and so has the mean or sum.
        RuntimeError: class_weight requires grad.

    Source: z_loss is that of Chowdhery et al., "PaLM" (2022).
    """
    if symbolic.any_proxy(logits, target):
        return cast(Tensor, symbolic.record(cross_entropy, locals()))
    if unknown:
        raise spelling.unexpected(cross_entropy, unknown)
    rows, flat, ignore_index, label_smoothing, weight, z_loss, shape = _arguments(
        logits, target, ignore_index, label_smoothing, reduction, class_weight, z_loss
    )
    num_classes = rows.shape[1]
    result_dtype = _loss_dtype(logits)
    _refuse_early(lambda: _passes(rows), (rows, flat, weight))
    divisor = None
    if reduction == "mean":
        weight, divisor = _mean_of(weight, z_loss, flat, ignore_index)
    call = (rows, flat, ignore_index, label_smoothing, weight, z_loss)
    if plain.wanted():
        losses = composed(CrossEntropyCall(*call))
    elif (transform := composite.transform_in_use(call)) is not None:
        composite.refuse_named("auto", transform, MATERIALISED)
        check_values(target, num_classes, ignore_index)
        losses = composed(CrossEntropyCall(*call))
    else:
        losses, _ = run_cross_entropy(*call, "auto")
    if reduction == "none":
        return losses.view(shape).to(result_dtype)
    return _reduced(losses.sum(), divisor).to(result_dtype)


@spelling.without_unknown
def explain_cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    class_weight: Tensor | None = None,
    z_loss: float = 0.0,
    **unknown: NoReturn,
) -> backends.Explanation:
    """Which backend `cross_entropy` would use for these arguments, and why not the others.

    Takes the arguments of `cross_entropy`; runs nothing. See `fastattn.explain`.
    """
    if unknown:
        raise spelling.unexpected(cross_entropy, unknown, "explain_cross_entropy")
    rows, flat, ignore_index, *_ = _arguments(
        logits, target, ignore_index, label_smoothing, reduction, class_weight, z_loss
    )
    check_values(flat, rows.shape[1], ignore_index)
    return backends.explanation(_passes(rows), "auto")


def _arguments(
    logits: Tensor,
    target: Tensor,
    ignore_index: int,
    label_smoothing: float,
    reduction: str,
    class_weight: Tensor | None,
    z_loss: float,
) -> tuple[Any, ...]:
    """The arguments of `cross_entropy`, checked, in the order of CrossEntropyCall's fields, and the losses' shape."""
    arguments.check_tensor("logits", logits)
    arguments.check_floating("logits", logits)
    if logits.dim() == 0:
        raise ValueError("logits: got shape (), needs (V,), (N, V) or (N, V, ...)")
    classes_dim = 0 if logits.dim() == 1 else 1
    shape = (*logits.shape[:classes_dim], *logits.shape[classes_dim + 1 :])
    target = _targets(target, shape, logits, "logits")
    ignore_index, label_smoothing = _options(ignore_index, label_smoothing, reduction)
    z_loss = _z_loss(z_loss)
    num_classes = logits.shape[classes_dim]
    if num_classes == 0:
        raise ValueError(f"logits: got shape {arguments.shape_of(logits)}, needs at least one class")
    weight = _class_weight(class_weight, num_classes, logits, "logits")
    rows, flat = logits.movedim(classes_dim, -1).reshape(-1, num_classes), target.reshape(-1)
    return rows, flat, ignore_index, label_smoothing, weight, z_loss, shape


def _passes(rows: Tensor) -> dict[str, SoftmaxSpec]:
    """What each pass of `cross_entropy` asks for, that of a backward too where one may follow."""
    passes = {"cross_entropy_fwd": SoftmaxSpec.of(rows)}
    if torch.is_grad_enabled() and rows.requires_grad:
        passes["cross_entropy_bwd"] = SoftmaxSpec.of(rows, backward=True)
    return passes


def _refuse_early(passes: Callable[[], dict[str, SoftmaxSpec]], tensors: tuple[Tensor | None, ...]) -> None:
    """Raise before anything runs what some pass would raise; a torch.func transform takes no backend's pass."""
    if (
        arguments.may_be_refused(tensors, "auto")
        and composite.transform_in_use(tensors) is None
        and not plain.wanted()
    ):
        backends.select_all(passes(), "auto")


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
        hidden: (..., E), float16, bfloat16, float32 or float64.
        weight: (V, E), of the same dtype.
        target: (...), class indices; each in [0, V) or `ignore_index`.
        bias: (V,), of the same dtype.
        softcap: logits become softcap * tanh(logit / softcap).
        ignore_index, label_smoothing, reduction, class_weight, z_loss: as in `cross_entropy`; ignored tokens may hold
            NaN. Class weights are not `weight`, which makes the logits.

    Returns:
        A scalar, or target's shape under "none"; in the dtype of hidden, float32 under autocast.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it. A target that is no class raises an error
            that is also an IndexError, as torch's is. On a GPU, where looking would cost a synchronisation, such a
            token has loss NaN instead, and so has the mean or sum.
        RuntimeError: class_weight requires grad.

    Source: the chunking is that of Wijmans et al., "Cut Your Losses in Large-Vocabulary Language Models" (2024), with
    a loop over tokens instead of a kernel over tiles.
    """
    if symbolic.any_proxy(hidden, weight, target):
        return cast(Tensor, symbolic.record(linear_cross_entropy, locals()))
    if unknown:
        raise spelling.unexpected(linear_cross_entropy, unknown)
    rows, weight, bias, flat, ignore_index, label_smoothing, cap, class_weight, z_loss, shape = (
        _linear_arguments(
            hidden,
            weight,
            target,
            bias,
            ignore_index,
            label_smoothing,
            reduction,
            softcap,
            class_weight,
            z_loss,
        )
    )
    result_dtype, needs = _loss_dtype(hidden), _needs(rows, weight, bias)
    _refuse_early(
        lambda: _linear_passes(rows, weight, needs, reduction), (rows, weight, bias, flat, class_weight)
    )
    divisor = None
    if reduction == "mean":
        class_weight, divisor = _mean_of(class_weight, z_loss, flat, ignore_index)
    call = (rows, weight, bias, flat, ignore_index, label_smoothing, cap, class_weight, z_loss)
    if plain.wanted():
        losses = linear_composed(LinearCrossEntropyCall(*call))
    elif (transform := composite.transform_in_use(call)) is not None:
        composite.refuse_named("auto", transform, MATERIALISED)
        check_values(target, weight.shape[0], ignore_index)
        losses = linear_composed(LinearCrossEntropyCall(*call))
    elif reduction != "none" and any(needs):
        total = run_linear_sum(*call, needs, "auto")[0]
        return _reduced(total, divisor).to(result_dtype)
    else:
        losses, _ = run_linear(*call, "auto")
    if reduction == "none":
        return losses.view(shape).to(result_dtype)
    return _reduced(losses.sum(), divisor).to(result_dtype)


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

    Takes the arguments of `linear_cross_entropy`; runs nothing. `backward` names a backend under "none" only: otherwise
    the forward pass makes the gradients. See `fastattn.explain`.
    """
    if unknown:
        raise spelling.unexpected(linear_cross_entropy, unknown, "explain_linear_cross_entropy")
    rows, weight, bias, flat, ignore_index, *_ = _linear_arguments(
        hidden, weight, target, bias, ignore_index, label_smoothing, reduction, softcap, class_weight, z_loss
    )
    check_values(flat, weight.shape[0], ignore_index)
    return backends.explanation(_linear_passes(rows, weight, _needs(rows, weight, bias), reduction), "auto")


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
    for name, tensor in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if tensor is not None:
            arguments.check_tensor(name, tensor)
            arguments.check_floating(name, tensor)
    hidden, weight, bias = _autocast(hidden), _autocast(weight), None if bias is None else _autocast(bias)
    _check_linear(hidden, weight, bias)
    shape = tuple(hidden.shape[:-1])
    target = _targets(target, shape, hidden, "hidden")
    ignore_index, label_smoothing = _options(ignore_index, label_smoothing, reduction)
    cap, z_loss = arguments.positive_or_zero("softcap", softcap, hidden.dtype), _z_loss(z_loss)
    class_weight = _class_weight(class_weight, weight.shape[0], hidden, "hidden")
    rows, flat = hidden.flatten(0, -2) if hidden.dim() > 1 else hidden[None], target.flatten()
    return rows, weight, bias, flat, ignore_index, label_smoothing, cap, class_weight, z_loss, shape


def _needs(*operands: Tensor | None) -> list[bool]:
    """Which operands' gradients a backward would ask for."""
    return [torch.is_grad_enabled() and t is not None and t.requires_grad for t in operands]


def _linear_passes(rows: Tensor, weight: Tensor, needs: list[bool], reduction: str) -> dict[str, SoftmaxSpec]:
    """What each pass of `linear_cross_entropy` asks for: the forward makes the gradients too, but for "none"."""
    if reduction != "none" or not any(needs):
        return {"linear_cross_entropy_fwd": linear_spec(rows, weight, backward=any(needs))}
    return {
        f"linear_cross_entropy_{direction}": linear_spec(rows, weight, backward=direction == "bwd")
        for direction in ("fwd", "bwd")
    }


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


def _z_loss(z_loss: float) -> float:
    if isinstance(z_loss, bool) or not arguments.is_number(z_loss):
        raise TypeError(f"z_loss: got {type(z_loss).__name__}, needs a number")
    if not 0.0 <= z_loss <= torch.finfo(torch.float32).max:
        raise ValueError(f"z_loss: got {z_loss}, needs a finite number, 0 or more")
    return float(z_loss)


def _class_weight(weight: Tensor | None, num_classes: int, like: Tensor, name: str) -> Tensor | None:
    """Class weights in the accumulation dtype, contiguous."""
    if weight is None:
        return None
    arguments.check_tensor("class_weight", weight)
    arguments.check_floating("class_weight", weight)
    if weight.shape != (num_classes,):
        raise ValueError(f"class_weight: got shape {arguments.shape_of(weight)}, needs ({num_classes},)")
    if weight.device != like.device:
        raise ValueError(f"class_weight: got device {weight.device}, needs that of {name}, {like.device}")
    if torch.is_grad_enabled() and weight.requires_grad:
        raise RuntimeError("class_weight: requires grad, which cross-entropy does not give; detach() it")
    return weight.to(accumulation_dtype(like.dtype)).contiguous()


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


def _mean_of(
    class_weight: Tensor | None, z_loss: float, target: Tensor, ignore_index: int
) -> tuple[Tensor | None, Tensor]:
    """The class weights to take, and what to divide the sum of losses by: the tokens that count, or their weights.

    With both class weights and z_loss there are two divisors: the weights are scaled so that the number of tokens
    serves both.
    """
    kept = target != ignore_index
    count = kept.sum()
    if class_weight is None:
        return None, count
    classes = torch.where(kept, target, 0).clamp(0, class_weight.shape[0] - 1)  # what is none is found later
    total = torch.where(kept, class_weight[classes], 0).sum()
    if not z_loss:
        return class_weight, total
    some = total != 0
    return class_weight * torch.where(some, count / total, 0), torch.where(some, count, 0)


def _reduced(total: Tensor, divisor: Tensor | None) -> Tensor:
    """The sum of losses, or their mean; no gradient flows from a mean of none."""
    if divisor is None:
        return total
    if not divisor.is_floating_point():
        return torch.where(divisor > 0, total / divisor.clamp(min=1), torch.nan)
    of_none = total.detach() / divisor
    return torch.where(divisor != 0, total / torch.where(divisor != 0, divisor, 1), of_none)
