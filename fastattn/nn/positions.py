"""Positions: rotary embeddings, ALiBi slopes, and positions read off padding masks and packed segments."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastattn.rotary import RotaryTable as RotaryTable
from fastattn.rotary import apply_rotary as apply_rotary


@dataclass(frozen=True)
class Rotary:
    """Rotary position embedding: pair m of a head is turned by position * base**(-2m / rotary_dim) radians.

    The first `rotary_dim` dimensions of each head turn (all of them by default) and the rest stay. Pairs are
    (m, m + rotary_dim/2), as in Llama and GPT-NeoX, or (2m, 2m + 1) where `interleaved`, as in GPT-J.
    Su et al. 2021, "RoFormer".
    """

    head_dim: int
    base: float = 10000.0
    rotary_dim: int | None = None
    interleaved: bool = False

    def __post_init__(self) -> None:
        if self.dim % 2 or not 0 < self.dim <= self.head_dim:
            raise ValueError(f"rotary_dim: got {self.dim}, needs an even number from 2 to {self.head_dim}")
        if self.base <= 0:
            raise ValueError(f"base: got {self.base}, needs a positive number")

    @property
    def dim(self) -> int:
        """How many dimensions of a head turn."""
        return self.head_dim if self.rotary_dim is None else self.rotary_dim

    def table(self, positions: Tensor, dtype: torch.dtype = torch.float32) -> RotaryTable:
        """cos and sin of every angle, (..., rotary_dim/2), for integer positions of any shape."""
        exponents = torch.arange(0, self.dim, 2, device=positions.device, dtype=dtype) / self.dim
        angles = positions[..., None].to(dtype) / self.base**exponents
        return angles.cos(), angles.sin()

    def apply(self, x: Tensor, table: RotaryTable) -> Tensor:
        """Turn x (B, H, S, D) by a table made from positions (S,) or (B, S); computed in the table's dtype."""
        return apply_rotary(x, table, interleaved=self.interleaved)


def alibi_slopes(num_heads: int, device: torch.device | str | None = None) -> Tensor:
    """The (H,) float32 slopes of ALiBi: the geometric sequence `2**(-8/n)`, `2**(-16/n)`, ... for n a power of two.

    Other head counts take the n of the power of two below and then every second slope of twice that n.
    Press et al. 2022, "Train Short, Test Long".
    """
    if num_heads < 1:
        raise ValueError(f"num_heads: got {num_heads}, needs 1 or more")
    power = 1 << (num_heads.bit_length() - 1)
    exponents = [8 * (i + 1) / power for i in range(power)]
    exponents += [4 * (2 * i + 1) / power for i in range(num_heads - power)]
    return torch.tensor([2.0**-e for e in exponents], dtype=torch.float32, device=device)


def positions_from_mask(attention_mask: Tensor) -> Tensor:
    """(B, S) int64: the number of real tokens before each one; padding, wherever it lies, counts for nothing."""
    return ((attention_mask != 0).cumsum(-1) - 1).clamp_(min=0)


def positions_in_segments(segment_ids: Tensor) -> Tensor:
    """(B, S) int64: positions that restart at 0 wherever the segment id changes."""
    if segment_ids.shape[1] == 0:
        return segment_ids.to(torch.int64)
    index = torch.arange(segment_ids.shape[1], device=segment_ids.device).expand_as(segment_ids)
    starts = torch.ones_like(segment_ids, dtype=torch.bool)
    starts[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
    return index - torch.where(starts, index, 0).cummax(dim=1).values
