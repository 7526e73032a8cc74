"""The exponential of scores, many of which are -inf or so low that their weights underflow."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def exp_(scores: Tensor) -> Tensor:
    """exp(scores), in place; 0 where that is below about 4 times the dtype's smallest normal number. NaN stays NaN.

    MKL, which torch.exp calls, takes many times as long for arguments whose exponential is below the normal numbers,
    -inf among them.
    """
    smallest = torch.finfo(scores.dtype).tiny
    scores.clamp_(min=math.log(2 * smallest)).exp_()
    # the exponential of the bound is rounded to either side of 2 * smallest
    return torch.threshold_(scores, 4 * smallest, 0.0)
