"""Autocast: operands are cast before an op, as for torch's own products, and what follows keeps its own precision."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def autocast_qkv(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Operands in autocast's dtype where autocast is on, as it does for matmul; float64 is left alone."""
    device = query.device.type if isinstance(query, Tensor) else "cpu"
    if not autocasts(device):
        return query, key, value
    dtype = torch.get_autocast_dtype(device)

    def cast(tensor: Tensor) -> Tensor:
        eligible = isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.dtype != torch.float64
        return tensor.to(dtype) if eligible else tensor

    return cast(query), cast(key), cast(value)


def own_precision(tensor: Tensor) -> AbstractContextManager[Any]:
    """Autocast off for a tensor's device: operands are cast before an op, what follows chooses its own precision."""
    device = tensor.device.type
    return torch.autocast(device, enabled=False) if autocasts(device) else nullcontext()


def autocasts(device: str) -> bool:
    """Whether autocast is on for a type of device."""
    return device != "meta" and torch.is_autocast_enabled(device)
