"""`cross_entropy`: the public call."""

from __future__ import annotations

from functools import partial
from typing import Any, NoReturn, cast

import torch
from torch import Tensor

from fastattn import backends
from fastattn.ops import arguments, composite, loss_arguments, plain, plan, spelling, symbolic
from fastattn.ops.cross_entropy_mean import makes_gradient, run_cross_entropy_mean
from fastattn.ops.cross_entropy_plan import CrossEntropyPlan, ReducedPlan
from fastattn.ops.cross_entropy_registration import MATERIALISED, check_values, composed, run_cross_entropy
from fastattn.ops.loss_passes import finished, refuse_early
from fastattn.spec import CrossEntropyCall, SoftmaxSpec


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

    On a CPU, under "mean" and "sum", the forward pass also makes the gradient, while exponentials are in the cache, and
    keeps it until the backward scales it.

    Args:
        logits: (V,), (N, V) or (N, V, ...), as torch's: float16, bfloat16, float32 or float64. Sums are kept in
            float32 or float64.
        target: class indices, any integer dtype, of shape (), (N,) or (N, ...); each in [0, V) or `ignore_index`.
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
        ValueError, TypeError: an argument does not fit; the message names it. A target that is not a class raises an
            error that is also an IndexError, as torch's is. On a GPU, where the check would cost a synchronisation,
            such a token has loss NaN instead, and so has the mean or sum.
        RuntimeError: class_weight requires grad, or the backend that FASTATTN_BACKEND names cannot run the call.

    Source: z_loss is that of Chowdhery et al., "PaLM" (2022).
    """
    planned = None
    if not unknown:
        kinds = (type(ignore_index), type(label_smoothing), type(z_loss))
        options = (ignore_index, label_smoothing, reduction, z_loss, kinds, "auto")
        planned, found = plan.look_up("cross_entropy", (logits, target, class_weight), options)
        if found is not None:
            return cast(Tensor, found(logits, target, class_weight))
    if symbolic.any_proxy(logits, target):
        return cast(Tensor, symbolic.record(cross_entropy, locals()))
    if unknown:
        raise spelling.unexpected(cross_entropy, unknown)
    rows, flat, ignore_index, label_smoothing, weight, z_loss, shape = _arguments(
        logits, target, ignore_index, label_smoothing, reduction, class_weight, z_loss
    )
    num_classes = rows.shape[1]
    result_dtype = loss_arguments.loss_dtype(logits)
    made = reduction != "none" and makes_gradient(rows)
    refuse_early(lambda: _passes(rows, made), (rows, flat, weight))
    call: Any = (rows, flat, weight)
    fused = not plain.wanted()
    if fused and (transform := composite.transform_in_use(call)) is not None:
        composite.refuse_named("auto", transform, MATERIALISED)
        check_values(target, num_classes, ignore_index)
        fused = False
    settled: Any = (ignore_index, label_smoothing, z_loss, reduction, shape, result_dtype)
    result = _losses(*settled, *call, fused=fused)
    if plan.wanted(planned):
        kind: plan.Plan = partial(_planned, *settled)
        if made and logits.dim() == 2:
            kind = ReducedPlan(rows, *settled)
        elif not made and CrossEntropyPlan.serves(logits, rows, reduction):
            kind = CrossEntropyPlan(rows, *settled)
        plan.keep(planned, kind)
    return result


def _losses(
    ignore_index: int, label_smoothing: float, z_loss: float, reduction: str, shape: tuple[int, ...],
    dtype: torch.dtype, rows: Tensor, target: Tensor, weight: Tensor | None, *, fused: bool = True,
) -> Tensor:  # fmt: skip
    """The result of `cross_entropy` once everything is checked; not fused, in differentiable torch operations."""
    options: Any = (ignore_index, label_smoothing)
    if fused and reduction != "none" and makes_gradient(rows):
        made = run_cross_entropy_mean(rows, target, *options, weight, z_loss, reduction == "mean", "auto")
        return cast(Tensor, made[0].to(dtype))
    divisor = None
    if reduction == "mean":
        weight, divisor = loss_arguments.mean_of(weight, z_loss, target, ignore_index)
    call = (rows, target, *options, weight, z_loss)
    losses = run_cross_entropy(*call, "auto")[0] if fused else composed(CrossEntropyCall(*call))
    return finished(losses, divisor, reduction, shape, dtype)


def _planned(*args: Any) -> Tensor:
    """The result of `cross_entropy` for a call of a kind whose checks, the first arguments of `_losses`, are known."""
    *settled, logits, target, class_weight = args
    rows, target = loss_arguments.rows_of(logits, target)
    if class_weight is not None:
        class_weight = loss_arguments.as_class_weight(class_weight, logits.dtype)
    settled += [rows, target, class_weight]
    return _losses(*settled)


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

    It runs nothing.

    Args:
        logits, target: those of `cross_entropy`.
        ignore_index, label_smoothing, reduction, class_weight, z_loss: those of `cross_entropy`.

    Returns:
        A `fastattn.backends.Explanation`; its `backward` is None where logits do not require grad, and where the
        forward pass makes the gradient.

    Raises:
        ValueError, TypeError: an argument does not fit `cross_entropy`; the message names it.
        RuntimeError: class_weight requires grad, or the backend that FASTATTN_BACKEND names cannot run the call.
    """
    if unknown:
        raise spelling.unexpected(cross_entropy, unknown, "explain_cross_entropy")
    rows, flat, ignore_index, *_ = _arguments(
        logits, target, ignore_index, label_smoothing, reduction, class_weight, z_loss
    )
    check_values(flat, rows.shape[1], ignore_index)
    made = reduction != "none" and makes_gradient(rows)
    return backends.explanation(_passes(rows, made), "auto", plan.outlook(logits, target, class_weight))


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
    target = loss_arguments.checked_targets(target, shape, logits, "logits")
    ignore_index, label_smoothing = loss_arguments.checked_options(ignore_index, label_smoothing, reduction)
    z_loss = loss_arguments.checked_z_loss(z_loss)
    num_classes = logits.shape[classes_dim]
    if num_classes == 0:
        raise ValueError(f"logits: got shape {arguments.shape_of(logits)}, needs at least one class")
    weight = loss_arguments.checked_class_weight(class_weight, num_classes, logits, "logits")
    rows, flat = loss_arguments.rows_of(logits, target)
    return rows, flat, ignore_index, label_smoothing, weight, z_loss, shape


def _passes(rows: Tensor, made: bool) -> dict[str, SoftmaxSpec]:
    """Specs of `cross_entropy`'s passes, the backward's too where one may follow and has not been `made` already."""
    passes = {"cross_entropy_fwd": SoftmaxSpec.of(rows)}
    if torch.is_grad_enabled() and rows.requires_grad and not made:
        passes["cross_entropy_bwd"] = SoftmaxSpec.of(rows, backward=True)
    return passes
