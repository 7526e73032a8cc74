"""AdamW with decay on matrices only, and a learning rate with linear warmup and cosine decay."""

from __future__ import annotations

import math

import torch
from torch import nn


def build_optimizer(
    model: nn.Module,
    *,
    lr: float,
    weight_decay: float = 0.1,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
) -> torch.optim.AdamW:
    """AdamW over the trainable parameters; those with two dimensions or more decay, biases and gains do not.

    Source: Loshchilov and Hutter 2019 (arXiv 1711.05101). torch's fused step is used where every parameter allows it.

    Raises:
        ValueError: no parameter requires a gradient.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise ValueError("model: no parameter requires a gradient")
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    fused = all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in parameters)
    return torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=lr, betas=betas, eps=eps, fused=fused
    )


def learning_rate(
    step: float, progress: float, *, lr: float, warmup_steps: int, min_lr_ratio: float
) -> float:
    """The rate after `step` steps: lr*(step+1)/warmup, then lr*(r + (1-r)*(1+cos(pi*x))/2).

    r is min_lr_ratio and x runs from 0 to 1 over what follows the warmup.

    Args:
        step: optimiser steps already taken, or on a schedule by time, the equivalent number.
        progress: how much of the whole run is done, from 0 to 1, warmup included.
        lr, warmup_steps, min_lr_ratio: as in TrainConfig.
    """
    if step < warmup_steps:
        return lr * (step + 1) / warmup_steps
    at_warmup_end = progress * warmup_steps / step if step else 0.0
    x = min(max((progress - at_warmup_end) / max(1.0 - at_warmup_end, 1e-12), 0.0), 1.0)
    return lr * (min_lr_ratio + (1.0 - min_lr_ratio) * 0.5 * (1.0 + math.cos(math.pi * x)))
