"""Keys and values of earlier tokens, kept for decoding."""

from __future__ import annotations

import torch
from torch import Tensor


class KVCache:
    """Keys and values of the tokens seen so far, written in place into (B, Hkv, capacity, D) buffers.

    It carries no gradient. `length` counts the tokens held; capacity is fixed, and running past it is an error.
    """

    def __init__(
        self,
        batch: int,
        num_kv_heads: int,
        capacity: int,
        head_dim: int,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        shape = (batch, num_kv_heads, capacity, head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.length = 0

    @property
    def capacity(self) -> int:
        """The most tokens it can hold."""
        return self.keys.shape[2]

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Write (B, Hkv, S, D) keys and values behind those held; returns views of all of them, (B, Hkv, length, D)."""
        if torch.is_grad_enabled() and (key.requires_grad or value.requires_grad):
            raise ValueError("cache: carries no gradient, call under torch.no_grad()")
        needs = (*self.keys.shape[:2], key.shape[2], self.keys.shape[3])
        if tuple(key.shape) != needs or value.shape != key.shape:
            got = f"keys {tuple(key.shape)} and values {tuple(value.shape)}"
            raise ValueError(f"cache: got {got}, needs {needs}")
        start, end = self.length, self.length + key.shape[2]
        if end > self.capacity:
            raise ValueError(f"cache: got token {end}, needs {self.capacity} (its capacity) at most")
        self.keys[:, :, start:end] = key
        self.values[:, :, start:end] = value
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def reorder(self, rows: Tensor) -> None:
        """Sequence i becomes a copy of sequence rows[i], (B,), as beams need."""
        for buffer in (self.keys, self.values):
            held = buffer[:, :, : self.length]
            held.copy_(held[rows])
