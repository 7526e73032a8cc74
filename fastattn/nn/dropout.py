"""Dropout of activations: on a CPU from 16 random bits an element."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastattn.integers import cdiv
from fastattn.nn.linear import runs_eagerly, without_transforms
from fastattn.philox import keep_scale, keep_threshold

ELEMENTS_PER_DRAW = 4  # 16 bits each of an int64
INT64_MIN = -(2**63)


class Dropout(nn.Dropout):
    """torch.nn.Dropout with fewer random numbers on a CPU: one of 64 bits for four elements, by torch's default
    generator.

    p is rounded to a multiple of 2^-16 there, and what is kept is divided by 1 minus that, as in attention's dropout.
    On other devices, and under torch.compile, tracing, modes and torch.func's transforms, it is torch.nn.Dropout.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(...) -> (...)."""
        if self.inplace or not (self.training and 0.0 < self.p < 1.0) or not _runs_alone(x):
            return super().forward(x)
        return x * kept(x, self.p)


def kept(x: Tensor, p: float) -> Tensor:
    """What dropout multiplies a contiguous tensor on a CPU by: 0 with probability p, else 1 / (1 - p), in x's dtype."""
    draws = torch.empty(cdiv(x.numel(), ELEMENTS_PER_DRAW), dtype=torch.int64, device="cpu")
    halves = draws.random_(INT64_MIN, None).view(torch.int16)[: x.numel()].view(x.shape)
    return (halves >= keep_threshold(p) - 0x8000).to(x.dtype).mul_(keep_scale(p))


def _runs_alone(x: Tensor) -> bool:
    """Whether only autograd notices which operations make the result of a tensor on a CPU."""
    return (
        runs_eagerly(x)  # first: under tracing, comparing devices and strides adds guards
        and x.is_cpu
        and x.is_floating_point()
        and x.is_contiguous()
        and without_transforms(x)
    )
