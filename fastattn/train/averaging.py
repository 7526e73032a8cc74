"""An exponential moving average of a model's weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from fastattn.train.sharding import own_part


class Averaged:
    """The moving average of a model's trained weights; an update gives d * average + (1 - d) * weights.

    d is min(decay, (1 + n) / (10 + n)) after n steps, so that the first weights, which are those before any training,
    are soon forgotten also where the run is short for the decay.

    It is float32 where the weights have 16 bits, whose rounding would hide such small changes.

    Args:
        model: its trainable parameters are averaged, starting from their current values.
        decay: within [0, 1).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.values = [_wide(p).clone() for p in self.parameters]
        self.decay = decay

    @torch.no_grad()
    def update(self, step: float) -> None:
        """Update the average with the weights after a step that `step` others preceded."""
        update = get_ema_multi_avg_fn(min(self.decay, (1 + step) / (10 + step)))
        update(_parts(self.values), _parts([_wide(p) for p in self.parameters]), 1)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the model has the averaged weights."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        held = [_wide(p).clone() for p in self.parameters]
        for parameter, value in zip(self.parameters, self.values):
            own_part(parameter.detach()).copy_(own_part(value))
        self.values = held

    def load(self, values: list[Tensor]) -> None:
        """Load saved values.

        Raises:
            ValueError: their shapes differ from the model's.
        """
        shapes = [value.shape for value in values]
        needed = [value.shape for value in self.values]
        if shapes != needed:
            raise ValueError(f"averages of {len(shapes)} tensors do not fit this model's {len(needed)}")
        for mine, value in zip(self.values, values):
            own_part(mine).copy_(own_part(value))


def _parts(tensors: list[Tensor]) -> list[Tensor]:
    return [own_part(tensor) for tensor in tensors]


def _wide(parameter: Tensor) -> Tensor:
    return parameter.detach().to(torch.promote_types(parameter.dtype, torch.float32))
