"""Plans of `cross_entropy`: one for losses that a backward follows, one for a gradient made in the forward."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor

from fastattn import backends, torch_compat
from fastattn.backends import layout, switches
from fastattn.backends.replay import Replay, can_replay
from fastattn.ops import loss_arguments, plan
from fastattn.ops.cross_entropy_mean import gradient_of_mean, reduced_with_gradient
from fastattn.ops.cross_entropy_registration import check_values, cross_entropy_bwd, reduced
from fastattn.spec import CrossEntropyCall, SoftmaxSpec, accumulation_dtype


class CrossEntropyPlan:
    """One kind of call of `cross_entropy`: what its options come to, without any tensor."""

    __slots__ = (
        "backward_replays", "chosen", "dtype", "environment", "forward", "ignore_index", "label_smoothing", "record",
        "reduction", "shape", "spec", "z_loss",
    )  # fmt: skip

    def __init__(
        self, rows: Tensor, ignore_index: int, label_smoothing: float, z_loss: float, reduction: str,
        shape: tuple[int, ...], dtype: torch.dtype,
    ) -> None:  # fmt: skip
        self.environment = switches.environment()
        self.ignore_index, self.label_smoothing, self.z_loss = ignore_index, label_smoothing, z_loss
        self.reduction, self.shape, self.dtype = reduction, shape, dtype
        self.spec = SoftmaxSpec.of(rows)
        self.chosen = backends.select(self.spec, "auto", "cross_entropy_fwd")
        self.forward = Replay(self._forward) if can_replay(self.chosen) else self._forward
        wants_grad = torch.is_grad_enabled() and rows.requires_grad
        self.backward_replays = None
        if wants_grad and can_replay(_backward_of(rows)):
            self.backward_replays = plan.BackwardReplays(self._gradient)
        self.record = torch_compat.apply_function(plan.Recorded) if wants_grad else None

    @staticmethod
    def serves(logits: Tensor, rows: Tensor, reduction: str) -> bool:
        """Whether it saves the same tensors as the op does. Not where `rows`, (N, V), may be a copy of the logits,
        which the backward would have to make again."""
        if logits.dim() > 2:
            return False
        wants_grad = torch.is_grad_enabled() and rows.requires_grad
        if can_replay(backends.select(SoftmaxSpec.of(rows), "auto", "cross_entropy_fwd")):
            return not wants_grad or can_replay(_backward_of(rows))
        return not wants_grad or (logits.dim() == 2 and reduction == "none")

    def __call__(self, logits: Tensor, target: Tensor, class_weight: Tensor | None) -> Tensor:
        """The result of `cross_entropy` for a call of this kind."""
        if target.is_cpu:
            check_values(target, logits.shape[-1], self.ignore_index)
        if self.record is None:
            result = cast(Tensor, self.forward(logits, target, class_weight)[0])
        else:
            result = self.record(self, logits, target, class_weight)
        return result

    def recorded(self, tensors: tuple[Any, ...]) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        """(the result, what the backward needs)."""
        result, *kept = self.forward(*tensors)
        return cast(Tensor, result), (tensors[0], *kept)

    def gradients(
        self, kept: tuple[Any, ...], upstream_grads: tuple[Tensor | None, ...]
    ) -> list[Tensor | None]:
        """The gradient of the logits, and None for the others."""
        tensors = (*upstream_grads, *kept)
        run: Callable[..., Any] | None = None
        if not plan.backward_needs_op(self.environment):
            replays = self.backward_replays
            run = self._gradient if replays is None else replays.find(*tensors)
        if run is None:
            return [self._gradient_by(torch.ops.fastattn.cross_entropy_bwd.default, *tensors), None, None]
        return [run(*tensors), None, None]

    def _forward(
        self, logits: Tensor, target: Tensor, class_weight: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """(result, targets (N,), class weights, divisor, norms)."""
        rows, target, weight = *loss_arguments.rows_of(logits, target), class_weight
        if weight is not None:
            weight = loss_arguments.as_class_weight(weight, logits.dtype)
        divisor = None
        if self.reduction == "mean":
            weight, divisor = loss_arguments.mean_of(weight, self.z_loss, target, self.ignore_index)
        call = CrossEntropyCall(rows, target, self.ignore_index, self.label_smoothing, weight, self.z_loss)
        losses, norms = self.chosen.cross_entropy_fwd(self.spec, layout.for_backend(self.chosen, call))
        result = losses.view(self.shape) if self.reduction == "none" else reduced(losses.sum(), divisor)
        return result.to(self.dtype), target, weight, divisor, norms

    def _gradient(self, *tensors: Any) -> Tensor:
        """The gradient of the logits, on a backend chosen for tensors that need not be of the plan's key."""
        return self._gradient_by(cross_entropy_bwd, *tensors)

    def _gradient_by(
        self, run: Callable[..., Tensor], upstream: Tensor, logits: Tensor, target: Tensor, weight: Tensor | None,
        divisor: Tensor | None, norms: Tensor,
    ) -> Tensor:  # fmt: skip
        """The gradient of the logits by a function like the op of the backward."""
        dlosses = upstream.to(norms.dtype)
        if self.reduction == "none":
            dlosses = dlosses.reshape(-1)
        else:
            if divisor is not None:
                some = divisor > 0 if not divisor.is_floating_point() else divisor != 0
                dlosses = torch.where(some, dlosses, 0) / torch.where(some, divisor, 1)
            dlosses = dlosses.expand(norms.shape[0])
        rows, _ = loss_arguments.rows_of(logits, target)
        dlogits = run(
            dlosses, norms, rows, target, self.ignore_index, self.label_smoothing, weight, self.z_loss, "auto"
        )
        return dlogits.view(logits.shape)


def _backward_of(rows: Tensor) -> ModuleType:
    """The backend that would run the backward for logits (N, V)."""
    return backends.select(SoftmaxSpec.of(rows, backward=True), "auto", "cross_entropy_bwd")


class ReducedPlan:
    """One kind of call of `cross_entropy` under "mean" or "sum" on a backend that makes the gradient in the forward."""

    __slots__ = ("chosen", "dtype", "ignore_index", "label_smoothing", "mean", "record", "spec", "z_loss")

    def __init__(
        self, rows: Tensor, ignore_index: int, label_smoothing: float, z_loss: float, reduction: str,
        shape: tuple[int, ...], dtype: torch.dtype,
    ) -> None:  # fmt: skip
        self.mean, self.dtype = reduction == "mean", dtype
        self.ignore_index, self.label_smoothing, self.z_loss = ignore_index, label_smoothing, z_loss
        self.spec = SoftmaxSpec.of(rows)
        self.chosen = backends.select(self.spec, "auto", "cross_entropy_fwd")
        self.record = torch_compat.apply_function(_Made)

    def __call__(self, logits: Tensor, target: Tensor, class_weight: Tensor | None) -> Tensor:
        """The result of `cross_entropy` for a call of this kind."""
        return cast(Tensor, self.record(self, logits, target, class_weight))

    def results(
        self, logits: Tensor, target: Tensor, class_weight: Tensor | None
    ) -> tuple[Tensor, Tensor, tuple[Tensor | None, ...]]:
        """(the result, the gradient of the logits, what the op keeps for its backward)."""
        target = target.long()
        if class_weight is not None:
            class_weight = loss_arguments.as_class_weight(class_weight, logits.dtype)
        call = CrossEntropyCall(
            logits, target, self.ignore_index, self.label_smoothing, class_weight, self.z_loss
        )
        result, dlogits = reduced_with_gradient(self.spec, self.chosen, call, self.mean)
        return result.to(self.dtype), dlogits, (logits, target, class_weight)

    def gradient(self, made: list[Any], dmean: Tensor, kept: tuple[Any, ...]) -> Tensor:
        """The gradient of the logits."""
        logits, target, class_weight = kept
        dmean = dmean.to(accumulation_dtype(logits.dtype))
        options = (self.ignore_index, self.label_smoothing, class_weight, self.z_loss, self.mean, "auto")
        return gradient_of_mean(made, dmean, logits, target, *options)


class _Made(torch.autograd.Function):
    """A planned call for autograd, with the gradient that its forward made."""

    @staticmethod
    def forward(
        ctx: Any, planned: ReducedPlan, logits: Tensor, target: Tensor, class_weight: Tensor | None
    ) -> Tensor:
        result, dlogits, kept = planned.results(logits, target, class_weight)
        ctx.planned, ctx.made = planned, [(dlogits,)]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*kept)
        return result

    @staticmethod
    def backward(ctx: Any, dmean: Tensor | None) -> tuple[Tensor | None, ...]:
        grad = None if dmean is None else ctx.planned.gradient(ctx.made, dmean, ctx.saved_tensors)
        return None, grad, None, None
