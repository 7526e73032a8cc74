"""DTensors as operands; integrations/dtensor.py says how the ops are split."""

from __future__ import annotations

import sys

import torch
from torch import Tensor


def is_dtensor(tensor: Tensor) -> bool:
    """Whether it is a DTensor; no process that has none imports torch.distributed.tensor for the answer."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def in_order(tensor: Tensor) -> Tensor:
    """A DTensor with its dimensions in order in memory; any other tensor as it is.

    A result has its operand's memory order. DTensor gathers or splits an operand into parts whose dimensions are in
    order, but derives the result's strides from the whole operand's, so the two must agree.
    """
    if not is_dtensor(tensor) or tensor.is_contiguous():
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)
