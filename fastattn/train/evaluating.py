"""Evaluation of a model during training: its mean loss, further metrics, and a text for display."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn

from fastattn.nn.modes import evaluating
from fastattn.train.batches import Batches, Examples
from fastattn.train.config import TrainConfig
from fastattn.train.distributed import Distributed
from fastattn.train.metrics import Evaluation
from fastattn.train.objective import Objective
from fastattn.train.rng import seeded
from fastattn.train.sharding import Sharding

RESERVED = ("event", "step", "loss", "perplexity", "seconds")  # of the record of an evaluation
Figures = Callable[[nn.Module], Mapping[str, float]]


class Evaluator:
    """Evaluates a model on all processes together; random generators are restored.

    Args:
        model: the model that is saved.
        compiled: the same, compiled if the configuration says so, for the loss; of a sharded model, its `root`.
        config, objective, batches, distributed: the trainer's.
        figures_with: returns further metrics of the model; called on the first process only.
        sharding: the model's, None where it is not sharded; `figures_with` gets a copy that is not.
    """

    def __init__(
        self,
        model: nn.Module,
        compiled: nn.Module,
        config: TrainConfig,
        objective: Objective,
        batches: Batches,
        distributed: Distributed,
        figures_with: Figures | None,
        sharding: Sharding | None = None,
    ) -> None:
        self.model = model
        self.compiled = compiled
        self.config = config
        self.objective = objective
        self.batches = batches
        self.distributed = distributed
        self.figures_with = figures_with
        self.sharding = sharding

    @torch.no_grad()
    def evaluate(self, data: Examples, *, with_figures: bool = True) -> Evaluation:
        """Mean loss per target over `data`, and the figures.

        Raises:
            ValueError: all labels of the data are ignored, or a metric is not a number or has a name of `RESERVED`.
        """
        device = self.batches.device
        with evaluating(self.model), seeded(self.config.seed, device):
            loss_sum, targets = self._sums(data)
            figures = self._figures() if with_figures else {}
        loss_sum, total = self.distributed.sum([loss_sum, targets], device)
        if not total:
            raise ValueError("data: all labels are -100, needs others")
        return Evaluation(loss_sum / total, int(total), figures)

    @torch.no_grad()
    def shown(self, show_with: Callable[[nn.Module], str]) -> str:
        """The text that `show_with` returns for the model in eval mode; empty on all processes but the first."""
        model = self._whole_model()
        with evaluating(model), seeded(self.config.seed, self.batches.device):
            return show_with(model) if self.distributed.is_main else ""

    def _whole_model(self) -> nn.Module:
        """The model, of a sharded one a copy with whole parameters on the first process, which uses it alone."""
        if self.sharding is None:
            return self.model
        model = self.sharding.gathered(self.distributed.is_main)
        return self.model if model is None else model.to(self.batches.device)

    def _sums(self, data: Examples) -> tuple[float, int]:
        """This process's sum of losses, and its number of targets."""
        loss_sum, targets = 0.0, 0
        size, number = self.config.batch_size, self.config.eval_batches
        ranks = self.distributed.rank, self.distributed.world_size
        for batch in self.batches.in_order(data, size, number, *ranks):
            count = self.objective.count_targets(batch)
            if count or self.sharding is not None:  # whose forward passes are of all processes together
                loss = float(self.objective.loss(self.compiled, batch))
            if count:
                loss_sum += loss * count
                targets += count
        if self.sharding is not None:
            batches = len(range(0, len(data), size)[:number])
            rank, world_size = ranks
            if 0 < batches % world_size <= rank:  # it has one batch less
                self.objective.loss(self.compiled, self.batches.of(data, range(min(size, len(data)))))
            self.sharding.release()
        return loss_sum, targets

    def _figures(self) -> dict[str, float]:
        if self.figures_with is None:
            return {}
        found: dict[str, float] = {}
        figures_with, model = self.figures_with, self._whole_model()
        with evaluating(model):
            for name, value in self.distributed.on_first(lambda: dict(figures_with(model))).items():
                if isinstance(value, bool) or not isinstance(value, (int, float)):
                    raise ValueError(f"evaluate_with: its {name} is {value!r}, needs a number")
                if name in RESERVED:
                    raise ValueError(
                        f"evaluate_with: got a metric {name!r}, which the record of an evaluation has itself; "
                        f"needs another name"
                    )
                found[name] = float(value)
        return found


def is_gain(new: Evaluation, old: Evaluation | None, best: tuple[str, bool]) -> bool:
    """Whether an evaluation is better than the best so far, by the metric and direction of `best`; ties by loss.

    Metrics of small sets are often equal: F1 is 0 for the first model and for all others without a correct entity.
    """
    if old is None:
        return True
    value, before = new.value(best[0]), old.value(best[0])
    if value == before:
        return new.loss < old.loss
    return before != before or (value > before if best[1] else value < before)  # NaN is worse than anything
