"""The objective of a training step: the mean loss over the targets of all its micro-batches on all processes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastattn.train.batches import Batch
from fastattn.train.distributed import Distributed, gradient_sync
from fastattn.train.metrics import count_targets, count_tokens
from fastattn.train.sharding import is_sharded, own_part


class Objective:
    """The mean loss of batches, and its gradient in the parameters' .grad.

    Args:
        model: its forward takes a batch's tensors by name and returns an object whose `.loss` is the mean over targets.
            A model whose loss has a second part, a mean over rows, names these rows' tensor in `second_targets` and
            takes a `second_weight`, a 0-d tensor that this part is multiplied by.
        parallel: the model, wrapped for data-parallel training.
        device: of the model and the batches.
        dtype: of autocast; float32 means none.
        distributed: the processes that train together.
        warn: called with a line for the log.
        sharded: whether `parallel` is sharded over the processes; its result is the loss itself.
    """

    def __init__(
        self,
        model: nn.Module,
        parallel: nn.Module,
        device: torch.device,
        dtype: torch.dtype,
        distributed: Distributed,
        warn: Callable[[str], None],
        *,
        sharded: bool = False,
    ) -> None:
        self.model = model
        self.parallel = parallel
        self.device = device
        self.dtype = dtype
        self.distributed = distributed
        self.warn = warn
        self.sharded = sharded
        self.losses: list[Tensor] = []  # of the micro-batches of the last step
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)

    def accumulate(self, batches: Sequence[Batch]) -> tuple[float, int]:
        """Set .grad to the gradient of the mean loss over all targets; returns that loss and the number of tokens."""
        counts = [self.count_targets(batch) for batch in batches]
        tokens = sum(count_tokens(batch) for batch in batches)
        seconds = [self._count_second(batch) if count else 0 for batch, count in zip(batches, counts)]
        targets, all_tokens, all_seconds = self.distributed.sum(
            [sum(counts), tokens, sum(seconds)], self.device
        )
        if not targets:
            self.warn("all labels are -100, so the gradient is zero")
        loss_sum = torch.zeros((), device=self.device)
        self.losses = []
        for i, (batch, count, second) in enumerate(zip(batches, counts, seconds)):
            weight = count / max(targets, 1.0)
            # The whole is multiplied by its share of the targets; this part is to have that of rows.
            if second:
                own = torch.tensor(second / all_seconds / weight, dtype=torch.float64, device=self.device)
                batch = {**batch, "second_weight": own}
            with gradient_sync(self.parallel, wanted=i == len(batches) - 1):
                loss = self._weighted_loss(batch, weight)
                # DistributedDataParallel divides the sum over processes by their number.
                self.scaler.scale(loss * self.distributed.world_size).backward()
            self.losses.append(loss.detach().float())
            loss_sum += self.losses[-1]
        return self.distributed.sum([float(loss_sum)], self.device)[0], int(all_tokens)

    def _weighted_loss(self, batch: Batch, weight: float) -> Tensor:
        """The batch's mean loss times its share of all targets; a zero with zero gradients if it has no target."""
        if weight == 0.0:  # its mean is 0/0, but all processes must take part in the reduction
            if (
                self.sharded
            ):  # and in every gather of the forward and backward: with other labels, whose loss is finite
                return self.loss(self.parallel, {**batch, "labels": torch.zeros_like(batch["labels"])}) * 0.0
            if self.distributed.active:
                self.parallel(**batch)
            return (
                sum(
                    (p.sum() for p in self.model.parameters() if p.requires_grad),
                    torch.zeros((), device=self.device),
                )
                * 0.0
            )
        return self.loss(self.parallel, batch) * weight

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The mean loss that `model`, the plain, compiled or parallel one, gives for a batch.

        Raises:
            TypeError: the loss of the model's output is not a tensor.
        """
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            output = model(**batch)
        loss = output.loss if hasattr(output, "loss") else output  # a sharded model's result is its loss
        if not isinstance(loss, Tensor):
            raise TypeError(f"model: its output's loss is {loss!r}, needs a tensor: the mean over the labels")
        return loss

    def count_targets(self, batch: Batch) -> int:
        """The number of labels of a batch that count in its mean."""
        return count_targets(batch["labels"], shifted=getattr(self.model, "shifts_labels", False))

    def _count_second(self, batch: Batch) -> int:
        """The rows of a batch in the mean of the loss's second part, 0 where there is none."""
        name = getattr(self.model, "second_targets", None)
        return len(batch[name]) if name in batch else 0

    def clip_gradients(self, limit: float | None) -> float:
        """Scale finite gradients down to a total norm of `limit`; returns the norm before."""
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        norm: Any = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if is_sharded(norm):
            norm = norm.full_tensor()
        # torch multiplies by this factor or by 1, whichever is less: by 1 it would read and write all for nothing
        if limit is not None and math.isfinite(norm) and limit / (norm + 1e-6) < 1:
            nn.utils.clip_grads_with_norm_(parameters, limit, norm)
        return float(norm)

    def first_gradient_not_finite(self) -> str | None:
        """The name of the first parameter whose gradient holds an inf or NaN."""
        return next(
            (
                name
                for name, parameter in self.model.named_parameters()
                if parameter.grad is not None and not torch.isfinite(own_part(parameter.grad)).all()
            ),
            None,
        )
