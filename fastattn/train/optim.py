"""AdamW and Muon over a model's parameters, and the learning rate over a run."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from fastattn import torch_compat
from fastattn.train.sharding import is_sharded

Schedule = Literal["cosine", "linear", "wsd", "constant"]
OptimizerName = Literal["adamw", "muon"]
WARMUP = 0.1  # share of a run without a number of steps of its own
LONGEST_WARMUP = 0.5  # share of a run that time may end; the rest is for the decay


class Stepper(Protocol):
    """The part of torch.optim.Optimizer that a training step uses."""

    @property
    def param_groups(self) -> list[dict[str, Any]]: ...

    def step(self) -> Any: ...

    def zero_grad(self, set_to_none: bool = True) -> None: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...


def build_optimizer(
    model: nn.Module,
    *,
    lr: float,
    weight_decay: float = 0.1,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    name: OptimizerName = "adamw",
    muon_momentum: float = 0.95,
) -> torch.optim.Optimizer | JoinedOptimizer:
    """An optimiser over the trainable parameters, with weight decay for those of two or more dimensions only.

    "adamw" is Loshchilov and Hutter 2019 (arXiv 1711.05101), torch's fused step where every parameter allows it.
    "muon" is torch.optim.Muon on `hidden_matrices` and AdamW on the rest. Muon's updates are scaled to AdamW's size
    (Liu et al. 2025, arXiv 2502.16982), so that both use one learning rate and one decay.

    Args:
        lr: the rate that the groups start with; `set_learning_rate` changes it.
        name: "adamw" or "muon".
        muon_momentum: Muon's Nesterov momentum.

    Raises:
        ValueError: no parameter requires a gradient; with "muon", there is no matrix for it, or one is sharded.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise ValueError("model: no parameter requires a gradient")
    if name == "adamw":
        return _adamw(parameters, lr, weight_decay, betas, eps)
    matrices = [p for p in hidden_matrices(model) if p.requires_grad]
    if not matrices:
        raise ValueError(
            "optimizer: muon needs trainable matrices in blocks (an nn.ModuleList), this model has none; use adamw"
        )
    if any(is_sharded(p) for p in matrices):
        raise ValueError(
            "optimizer: muon needs whole matrices, this model's are sharded over processes; use adamw"
        )
    taken = {id(p) for p in matrices}
    rest = [p for p in parameters if id(p) not in taken]
    muon = torch_compat.muon(
        matrices,
        lr=lr,
        weight_decay=weight_decay,
        momentum=muon_momentum,
        adjust_lr_fn="match_rms_adamw",
    )
    parts: list[torch.optim.Optimizer] = [muon]
    if rest:
        parts.append(_adamw(rest, lr, weight_decay, betas, eps))
    return JoinedOptimizer(parts)


def hidden_matrices(model: nn.Module) -> list[nn.Parameter]:
    """Matrices inside the model's repeated blocks (nn.ModuleList), except embeddings and weights tied to one.

    Muon optimises these, and not embeddings, heads, biases and norm weights (Jordan et al. 2024).
    """
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    blocks = [m for m in model.modules() if isinstance(m, nn.ModuleList)]
    found = {id(p): p for block in blocks for p in block.parameters()}
    return [p for key, p in found.items() if p.dim() == 2 and key not in embeddings]


class JoinedOptimizer:
    """Several optimisers as one: their groups in order, one step, one state."""

    def __init__(self, parts: Sequence[torch.optim.Optimizer]) -> None:
        self.parts = tuple(parts)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of all parts, the parts' own dicts."""
        return [group for part in self.parts for group in part.param_groups]

    def step(self) -> None:
        """One step of each part."""
        for part in self.parts:
            part.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop all gradients."""
        for part in self.parts:
            part.zero_grad(set_to_none=set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """As one optimiser's: parameters are numbered through all parts."""
        state: dict[int, Any] = {}
        groups = []
        for first, part in self._numbered():
            saved = part.state_dict()
            state.update({first + number: values for number, values in saved["state"].items()})
            groups += [
                {**g, "params": [first + number for number in g["params"]]} for g in saved["param_groups"]
            ]
        return {"state": state, "param_groups": groups}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the result of `state_dict`.

        Raises:
            ValueError: its groups differ.
        """
        groups = list(state_dict["param_groups"])
        if len(groups) != len(self.param_groups):
            raise ValueError(f"state_dict: holds {len(groups)} groups, needs {len(self.param_groups)}")
        for first, part in self._numbered():
            count = sum(len(group["params"]) for group in part.param_groups)
            mine = [groups.pop(0) for _ in part.param_groups]
            state = state_dict["state"]
            part.load_state_dict(
                {
                    "state": {n: state[first + n] for n in range(count) if first + n in state},
                    "param_groups": [{**g, "params": [n - first for n in g["params"]]} for g in mine],
                }
            )

    def _numbered(self) -> Iterator[tuple[int, torch.optim.Optimizer]]:
        first = 0
        for part in self.parts:
            yield first, part
            first += sum(len(group["params"]) for group in part.param_groups)


def set_learning_rate(optimizer: Stepper, rate: float, muon_ratio: float = 1.0) -> None:
    """Give every group this rate, and Muon's groups muon_ratio times as much."""
    for group in optimizer.param_groups:
        group["lr"] = rate * muon_ratio if "ns_steps" in group else rate


def hyperparameters(optimizer: Stepper) -> list[dict[str, Any]]:
    """Everything of the groups but their parameters and the rate, which each step sets."""
    return [
        {name: value for name, value in group.items() if name not in ("params", "lr")}
        for group in optimizer.param_groups
    ]


def set_hyperparameters(optimizer: Stepper, values: Sequence[dict[str, Any]]) -> None:
    """Give the groups what `hyperparameters` returned for them, as loading a state replaces it by the state's."""
    for group, given in zip(optimizer.param_groups, values):
        group.update(given)


def learning_rate(
    step: float,
    progress: float,
    *,
    lr: float,
    warmup_steps: float,
    min_lr_ratio: float,
    schedule: Schedule = "cosine",
    decay_ratio: float = 0.2,
    longest_warmup: float = math.inf,
) -> float:
    """The rate after `step` steps: lr * (step + 1) / warmup_steps, then lr * (r + (1 - r) * f(x)).

    r is min_lr_ratio and x runs from 0 to 1 over what follows the warmup. f(x) is (1 + cos(pi * x)) / 2 for "cosine",
    1 - x for "linear" and 1 for "constant". "wsd" stays at 1 and falls linearly over the last decay_ratio of x
    (warmup, stable, decay: Hu et al. 2024, arXiv 2404.06395).

    Args:
        step: optimiser steps taken so far.
        progress: share of the whole run that is done, from 0 to 1, warmup included.
        lr, warmup_steps, min_lr_ratio, schedule, decay_ratio: as in TrainConfig.
        longest_warmup: share of the run at which the warmup is over whatever the steps: until then the rate is at least
            lr * progress / longest_warmup.
    """
    if step < warmup_steps and progress < longest_warmup:
        return max(lr * (step + 1) / warmup_steps, lr * progress / longest_warmup)
    at_warmup_end = 0.0
    if warmup_steps:
        at_warmup_end = min(progress * warmup_steps / step, longest_warmup) if step else longest_warmup
    x = min(max((progress - at_warmup_end) / max(1.0 - at_warmup_end, 1e-12), 0.0), 1.0)
    return lr * (min_lr_ratio + (1.0 - min_lr_ratio) * _height(schedule, x, decay_ratio))


def warmup_of(warmup_steps: int | None, max_steps: int | None) -> tuple[float, float]:
    """The steps of a run's warmup and the share of the run that it takes at most, as `learning_rate` takes them.

    Args:
        warmup_steps: as in TrainConfig, None for WARMUP of the run.
        max_steps: the run's steps, None where time may end it: their number is not known then.
    """
    if max_steps is not None:
        return (round(WARMUP * max_steps) if warmup_steps is None else warmup_steps), math.inf
    return (math.inf, WARMUP) if warmup_steps is None else (warmup_steps, LONGEST_WARMUP)


def _height(schedule: Schedule, x: float, decay_ratio: float) -> float:
    if schedule == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * x))
    if schedule == "linear":
        return 1.0 - x
    if schedule == "wsd":
        return min(1.0, (1.0 - x) / decay_ratio)
    return 1.0


def _adamw(
    parameters: Sequence[Tensor], lr: float, weight_decay: float, betas: tuple[float, float], eps: float
) -> torch.optim.AdamW:
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    fused = all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in parameters)
    return torch_compat.adamw(
        [group for group in groups if group["params"]], lr=lr, betas=betas, eps=eps, fused=fused
    )
