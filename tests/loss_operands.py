"""Operands of the losses in tests, and the losses in torch's operations on all logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch._dynamo.testing
import torch.nn.functional as F
from torch import Tensor

REDUCTIONS = ("none", "mean", "sum")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TOKENS, VOCAB, WIDTH = 13, 37, 8


def targets(*shape: int, ignore_index: int = -100, vocab: int = VOCAB) -> Tensor:
    """Random classes; every third token is ignored."""
    target = torch.randint(0, vocab, shape)
    target.view(-1)[1::3] = ignore_index
    return target


def operands(dtype: torch.dtype = torch.float64, grad: bool = True) -> list[Tensor]:
    shapes = (TOKENS, WIDTH), (VOCAB, WIDTH), (VOCAB,)
    return [torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_(grad) for shape in shapes]


def torchs(
    logits: Tensor, target: Tensor, *, class_weight: Tensor | None = None, z_loss: float = 0.0,
    reduction: str = "mean", ignore_index: int = -100, label_smoothing: float = 0.0,
) -> Tensor:  # fmt: skip
    """torch's weighted loss, and z_loss * lse**2 of every token that is not ignored, reduced without weights."""
    weight = None if class_weight is None else class_weight.to(logits.dtype)
    loss = F.cross_entropy(
        logits,
        target,
        weight,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        reduction=reduction,
    )
    if not z_loss:
        return loss
    kept = target != ignore_index
    squares = torch.where(kept, logits.logsumexp(-1 if logits.dim() == 1 else 1).square(), 0)
    if reduction != "none":
        squares = squares.sum() / (kept.sum() if reduction == "mean" else 1)
    return loss + z_loss * squares


def all_logits(
    hidden: Tensor, weight: Tensor, target: Tensor, *, bias: Tensor | None = None, softcap: float | None = None,
    **options: Any,
) -> Tensor:  # fmt: skip
    """linear_cross_entropy with torch's operations on all logits."""
    logits = F.linear(hidden, weight, bias)
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    return torchs(logits.movedim(-1, 1) if logits.dim() > 2 else logits, target, **options)


def losses_and_grads(loss: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    """The loss and its gradients for an uneven upstream gradient."""
    upstream = (
        torch.linspace(-3, 2, loss.numel(), dtype=loss.dtype).view(loss.shape)
        if loss.dim()
        else loss.new_tensor(2.5)
    )
    return [loss, *torch.autograd.grad(loss, leaves, upstream)]


def linear(
    function: Callable[..., Tensor], leaves: list[Tensor], target: Tensor, **options: Any
) -> list[Tensor]:
    hidden, weight, *bias = leaves
    return losses_and_grads(
        function(hidden, weight, target, bias=bias[0] if bias else None, **options), leaves
    )
