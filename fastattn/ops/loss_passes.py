"""The parts that both losses share: refusals before the first pass, and the result after the last."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastattn import backends
from fastattn.ops import composite, plain
from fastattn.ops.cross_entropy_registration import reduced
from fastattn.ops.values import may_be_refused
from fastattn.spec import SoftmaxSpec


def refuse_early(passes: Callable[[], dict[str, SoftmaxSpec]], tensors: tuple[Tensor | None, ...]) -> None:
    """Raise before anything runs what some pass would raise; a torch.func transform takes no backend's pass."""
    if may_be_refused(tensors, "auto") and composite.transform_in_use(tensors) is None and not plain.wanted():
        backends.select_all(passes(), "auto")


def finished(
    losses: Tensor, divisor: Tensor | None, reduction: str, shape: tuple[int, ...], dtype: torch.dtype
) -> Tensor:
    """Losses of tokens in the shape of the targets, or reduced."""
    if reduction == "none":
        return losses.view(shape).to(dtype)
    return reduced(losses.sum(), divisor).to(dtype)
