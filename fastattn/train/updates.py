"""The update of a model's weights in a step, and steps whose numbers are not finite."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from fastattn.train.averaging import Averaged
from fastattn.train.batches import Batch
from fastattn.train.config import TrainConfig
from fastattn.train.in_backward import UpdatesInBackward
from fastattn.train.objective import Objective
from fastattn.train.optim import build_optimizer, learning_rate, set_learning_rate, warmup_of

SHOWN_EXAMPLES = 16  # of a batch, in a message


class TrainingDiverged(RuntimeError):
    """The loss or a gradient is not finite, and on_nonfinite does not allow skipping the step."""


@dataclass(frozen=True)
class Update:
    """The figures of a step."""

    loss: float
    norm: float  # of the gradient before it was clipped
    rate: float
    tokens: int
    taken: bool  # False where the loss or a gradient is not finite: no weights changed, unless updated in backward

    def __str__(self) -> str:
        return f"loss {self.loss:.4g}, gradient norm {self.norm:.4g}, lr {self.rate:.3g}"


@dataclass(frozen=True)
class NotFinite:
    """What held an inf or NaN in a step that was not taken, of all processes.

    Attributes:
        parameter: the first one whose gradient did; None where the losses alone did.
        processes: those with a micro-batch whose loss is not finite.
        examples: of these micro-batches, or of all of the step if every loss is finite.
    """

    parameter: str | None
    processes: list[int]
    examples: list[int]


class Updates:
    """Updates a model by the gradients of batches.

    Args:
        model: its trainable parameters are updated.
        config: the optimiser's options.
        objective: computes the gradient of a step's loss.
        max_steps: most steps of the run, None where time alone ends it.
    """

    def __init__(
        self, model: nn.Module, config: TrainConfig, objective: Objective, max_steps: int | None
    ) -> None:
        self.config = config
        self._warmup = warmup_of(config.warmup_steps, None if config.max_seconds else max_steps)
        self.objective = objective
        self.optimizer = build_optimizer(
            model,
            lr=config.lr,
            weight_decay=config.weight_decay,
            betas=(config.beta1, config.beta2),
            eps=config.eps,
            name=config.optimizer,
            muon_momentum=config.muon_momentum,
        )
        self.averaged = None if config.ema_decay is None else Averaged(model, config.ema_decay)
        self._in_backward = UpdatesInBackward(model, self.optimizer) if config.update_in_backward else None

    def take(self, batches: Sequence[Batch], step: float, progress: float) -> Update:
        """One step on these micro-batches, at the learning rate of this position in the run.

        Afterwards there are no gradients; where the step was not taken, they are kept until `discard`.
        """
        config, scaler = self.config, self.objective.scaler
        rate = learning_rate(
            step,
            progress,
            lr=config.lr,
            warmup_steps=self._warmup[0],
            min_lr_ratio=config.min_lr_ratio,
            schedule=config.schedule,
            decay_ratio=config.decay_ratio,
            longest_warmup=self._warmup[1],
        )
        set_learning_rate(self.optimizer, rate, (config.muon_lr or config.lr) / config.lr)
        if self._in_backward is not None:
            with self._in_backward.on():
                loss, tokens = self.objective.accumulate(batches)
            norm = self._in_backward.norm()
            taken = math.isfinite(loss) and math.isfinite(norm)
            if taken:
                self._average(step)
                self.discard()
            return Update(loss, norm, rate, tokens, taken)
        loss, tokens = self.objective.accumulate(batches)
        scaler.unscale_(self.optimizer)  # type: ignore[arg-type]  # it accepts any object with groups and a step
        norm = self.objective.clip_gradients(config.grad_clip)
        finite = math.isfinite(loss) and math.isfinite(norm)
        overflow = math.isfinite(loss) and scaler.is_enabled() and scaler.get_scale() > 1
        taken = finite or overflow  # the scaler skips a step that overflowed, and lowers its scale
        if taken:
            scaler.step(self.optimizer)  # type: ignore[arg-type]
            if finite:
                self._average(step)
            self.discard()
        return Update(loss, norm, rate, tokens, taken)

    def _average(self, step: float) -> None:
        """Update the averaged weights, which a step that left the weights as they were does not change."""
        if self.averaged is not None:
            self.averaged.update(step)

    def discard(self) -> None:
        """Drop the gradients, after a step or instead of one."""
        self.objective.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)

    def not_finite(self, indices: Sequence[Sequence[int]]) -> NotFinite:
        """What was not finite in a step that was not taken; all processes call it together and get the same.

        Args:
            indices: the examples of this process's micro-batches.
        """
        found = [i for i, loss in zip(indices, self.objective.losses) if not torch.isfinite(loss)]
        distributed = self.objective.distributed
        reports = distributed.broadcast(
            distributed.gather((self._first_gradient_not_finite(), found, indices))
        )
        # each process has its own part of a sharded gradient
        names = {name for name, _, _ in reports if name is not None}
        first = next((name for name, _ in self.objective.model.named_parameters() if name in names), None)
        processes = [rank for rank, (_, bad, _) in enumerate(reports) if bad]
        batches = [batch for _, bad, of_all in reports for batch in (bad if processes else of_all)]
        return NotFinite(first, processes, [index for batch in batches for index in batch])

    def _first_gradient_not_finite(self) -> str | None:
        if self._in_backward is not None:
            return self._in_backward.first_gradient_not_finite()
        return self.objective.first_gradient_not_finite()


def listed(examples: Sequence[int], places: Sequence[str] = ()) -> str:
    """The first of these examples, as text, each with its place where those are known."""
    shown = [
        f"{each} ({places[number]})" if places else str(each)
        for number, each in enumerate(examples[:SHOWN_EXAMPLES])
    ]
    return ", ".join(shown) + (" ..." if len(examples) > SHOWN_EXAMPLES else "")
