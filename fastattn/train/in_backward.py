"""Updates of parameters in the backward pass: each once its gradient is complete, which is then dropped."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn

from fastattn.train.optim import JoinedOptimizer


class UpdatesInBackward:
    """Steps an optimiser for one parameter at a time, while the backward pass computes the gradients of the others.

    Each parameter gets the bits that a step after the whole pass gives it, and few gradients are in memory at once. The
    optimiser's state is the same too.

    Args:
        model: its trainable parameters are updated, inside of `on` only.
        optimizer: of these parameters; its update of one depends on no other.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer | JoinedOptimizer) -> None:
        parts = optimizer.parts if isinstance(optimizer, JoinedOptimizer) else (optimizer,)
        places = {
            id(parameter): (part, number)
            for part in parts
            for number, group in enumerate(part.param_groups)
            for parameter in group["params"]
        }
        self._updated = {
            name: (parameter, *places[id(parameter)])
            for name, parameter in model.named_parameters()
            if id(parameter) in places
        }
        self._norms: dict[str, Tensor] = {}  # of the gradients of the last pass, by parameter

    @contextlib.contextmanager
    def on(self) -> Iterator[None]:
        """Inside, backward passes update the parameters; outside they leave gradients as ever."""
        self._norms.clear()
        hooks = [
            parameter.register_post_accumulate_grad_hook(partial(self._update, name, part, number))
            for name, (parameter, part, number) in self._updated.items()
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _update(self, name: str, part: torch.optim.Optimizer, number: int, parameter: Tensor) -> None:
        if parameter.grad is None:
            return
        self._norms[name] = torch.linalg.vector_norm(parameter.grad)
        groups = part.param_groups  # loading a state makes new ones
        part.param_groups = [{**groups[number], "params": [parameter]}]
        try:
            part.step()
        finally:
            part.param_groups = groups
        parameter.grad = None

    def norm(self) -> float:
        """Norm of the gradients of the last pass inside `on`."""
        norms = [self._norms[name] for name in self._updated if name in self._norms]
        return float(torch.linalg.vector_norm(torch.stack(norms))) if norms else 0.0

    def first_gradient_not_finite(self) -> str | None:
        """The name of the first parameter whose gradient in the last pass had an inf or NaN."""
        return next(
            (name for name in self._updated if name in self._norms and not math.isfinite(self._norms[name])),
            None,
        )
