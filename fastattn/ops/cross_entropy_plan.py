"""Plans of `cross_entropy` on backends whose work can be replayed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastattn import backends, torch_compat
from fastattn.backends import layout, switches
from fastattn.backends.replay import Replay, can_replay
from fastattn.ops import loss_arguments, plan
from fastattn.ops.cross_entropy_registration import check_values, cross_entropy_bwd, reduced
from fastattn.spec import CrossEntropyCall, SoftmaxSpec


class CrossEntropyPlan:
    """One kind of call of `cross_entropy`: what its options come to, without any tensor."""

    __slots__ = (
        "backward_replays", "dtype", "environment", "ignore_index", "label_smoothing", "record", "reduction",
        "replay", "shape", "z_loss",
    )  # fmt: skip

    def __init__(
        self, rows: Tensor, ignore_index: int, label_smoothing: float, z_loss: float, reduction: str,
        shape: tuple[int, ...], dtype: torch.dtype,
    ) -> None:  # fmt: skip
        self.environment = switches.environment()
        self.ignore_index, self.label_smoothing, self.z_loss = ignore_index, label_smoothing, z_loss
        self.reduction, self.shape, self.dtype = reduction, shape, dtype
        self.replay = Replay(self._forward)
        self.backward_replays = plan.BackwardReplays(self._gradient)
        wants_grad = torch.is_grad_enabled() and rows.requires_grad
        self.record = torch_compat.apply_function(plan.Recorded) if wants_grad else None

    @staticmethod
    def serves(logits: Tensor, rows: Tensor) -> bool:
        """Whether the passes of a call can be replayed. Not where `rows`, (N, V), may be a copy of the logits, which
        the backward would have to make again."""
        if logits.dim() > 2:
            return False
        passes = {"cross_entropy_fwd": False}
        if torch.is_grad_enabled() and rows.requires_grad:
            passes["cross_entropy_bwd"] = True
        return all(
            can_replay(backends.select(SoftmaxSpec.of(rows, backward=backward), "auto", function))
            for function, backward in passes.items()
        )

    def __call__(self, logits: Tensor, target: Tensor, class_weight: Tensor | None) -> Tensor:
        """The result of `cross_entropy` for a call of this kind."""
        if target.is_cpu:
            check_values(target, logits.shape[-1], self.ignore_index)
        if self.record is None:
            result: Tensor = self.replay(logits, target, class_weight)[0]
        else:
            result = self.record(self, logits, target, class_weight)
        return result

    def recorded(self, tensors: tuple[Any, ...]) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        """(the result, what the backward needs)."""
        result, *kept = self.replay(*tensors)
        return result, (tensors[0], *kept)

    def gradients(
        self, kept: tuple[Any, ...], upstream_grads: tuple[Tensor | None, ...]
    ) -> list[Tensor | None]:
        """The gradient of the logits, and None for the others."""
        tensors = (*upstream_grads, *kept)
        run = None
        if not plan.backward_needs_op(self.environment):
            run = self.backward_replays.find(*tensors)
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
        spec = SoftmaxSpec.of(rows)
        call = CrossEntropyCall(rows, target, self.ignore_index, self.label_smoothing, weight, self.z_loss)
        chosen = backends.select(spec, "auto", "cross_entropy_fwd")
        losses, norms = chosen.cross_entropy_fwd(spec, layout.for_backend(chosen, call))
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
