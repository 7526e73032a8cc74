"""Positions: rotary and sinusoidal embeddings, ALiBi slopes, positions read off padding masks and packed segments."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastattn.nn.rotary_scaling import RotaryScaling, frequencies
from fastattn.rotary import RotaryTable as RotaryTable
from fastattn.rotary import apply_rotary as apply_rotary
from fastattn.rotary import rotated_at as rotated_at


@dataclass(frozen=True)
class Rotary:
    """Rotary position embedding: pair m of a head is turned by position * base**(-2m / rotary_dim) radians.

    Su et al. 2021, "RoFormer".

    Args:
        head_dim: size of a head.
        base: of the angles.
        rotary_dim: the first so many dimensions of each head turn, an even number; the rest stay. None for all.
        interleaved: pairs are (2m, 2m + 1), as in GPT-J; else (m, m + rotary_dim/2), as in Llama and GPT-NeoX.
        scaling: stretches the angles to longer sequences.

    Raises:
        ValueError: rotary_dim is odd or not within 2 to head_dim, 2 under dynamic scaling, or base is not positive.
    """

    head_dim: int
    base: float = 10000.0
    rotary_dim: int | None = None
    interleaved: bool = False
    scaling: RotaryScaling | None = None

    def __post_init__(self) -> None:
        if self.dim % 2 or not 0 < self.dim <= self.head_dim:
            raise ValueError(f"rotary_dim: got {self.dim}, needs an even number from 2 to {self.head_dim}")
        if self.is_dynamic and self.dim == 2:
            raise ValueError("scaling: dynamic scaling needs a rotary_dim above 2, got 2")
        if self.base <= 0:
            raise ValueError(f"base: got {self.base}, needs a positive number")

    @property
    def is_dynamic(self) -> bool:
        """Whether a sequence's angles depend on its length."""
        return self.scaling is not None and self.scaling.kind == "dynamic"

    @property
    def dim(self) -> int:
        """The number of dimensions of a head that are rotated."""
        return self.head_dim if self.rotary_dim is None else self.rotary_dim

    def table(
        self, positions: Tensor, dtype: torch.dtype = torch.float32, lengths: Tensor | None = None
    ) -> RotaryTable:
        """cos and sin of every angle, (..., rotary_dim/2), for integer positions (...) of any shape.

        Args:
            positions: integers; the result is on their device.
            dtype: of the angles and the result.
            lengths: the tokens of each position's sequence, of a shape that broadcasts with that of positions; by
                default one more than a row's largest position. Only dynamic scaling depends on them.
        """
        if self.is_dynamic and lengths is None:
            last = positions.amax(-1, keepdim=True) if positions.shape[-1] else positions[..., :0]
            lengths = last + 1
        lengths = None if lengths is None else lengths[..., None]
        like = torch.empty(0, dtype=dtype, device=positions.device)
        angles = positions[..., None].to(dtype) * frequencies(
            self.base, self.dim, self.scaling, lengths, like
        )
        cos, sin = angles.cos(), angles.sin()
        magnitude = 1.0 if self.scaling is None else self.scaling.magnitude
        return (cos, sin) if magnitude == 1.0 else (cos * magnitude, sin * magnitude)

    def apply(self, x: Tensor, table: RotaryTable) -> Tensor:
        """Turn x (B, H, S, D) by a table made from positions (S,) or (B, S), see `apply_rotary`."""
        return apply_rotary(x, table, interleaved=self.interleaved)


def sinusoids(positions: Tensor, dim: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """(..., dim): sin(position / 10000**(2i/dim)) in dimension 2i, the cosine of the same in 2i + 1.

    For positions (...) of any shape. Computed in float32 at least and returned in `dtype`. Vaswani et al. 2017,
    "Attention Is All You Need".
    """
    wide = torch.promote_types(dtype, torch.float32)
    exponents = torch.arange(0, dim, 2, device=positions.device).to(wide) / dim
    angles = positions[..., None].to(wide) / 10000.0**exponents
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2)[..., :dim].to(dtype)


def alibi_slopes(num_heads: int, device: torch.device | str | None = None) -> Tensor:
    """The (H,) float32 slopes of ALiBi: the geometric sequence `2**(-8/n)`, `2**(-16/n)`, ... for n a power of two.

    Other head counts take the n of the power of two below and then every second slope of twice that n.
    Press et al. 2022, "Train Short, Test Long".

    Raises:
        ValueError: num_heads is below 1.
    """
    if num_heads < 1:
        raise ValueError(f"num_heads: got {num_heads}, needs 1 or more")
    power = 1 << (num_heads.bit_length() - 1)
    exponents = [8 * (i + 1) / power for i in range(power)]
    exponents += [4 * (2 * i + 1) / power for i in range(num_heads - power)]
    return torch.tensor([2.0**-e for e in exponents], dtype=torch.float32, device=device)


def positions_from_mask(attention_mask: Tensor) -> Tensor:
    """(B, S) int64: the number of real tokens before each one; padding, wherever it lies, counts for nothing.

    attention_mask: (B, S) of any dtype, nonzero = a real token.
    """
    return ((attention_mask != 0).cumsum(-1) - 1).clamp_(min=0)


def positions_of_tokens(input_ids: Tensor, pad_token_id: int | None, first: int, past: int = 0) -> Tensor:
    """(B, S) int64: positions that count tokens other than the padding token from `first` on, as in RoBERTa.

    Padding tokens are at first - 1. past: how many earlier tokens of each sequence count.
    """
    counted = torch.ones_like(input_ids) if pad_token_id is None else input_ids != pad_token_id
    return (counted.cumsum(1) + past) * counted + (first - 1)


def positions_in_segments(segment_ids: Tensor) -> Tensor:
    """(B, S) int64: positions that restart at 0 wherever the segment id changes."""
    if segment_ids.shape[1] == 0:
        return segment_ids.to(torch.int64)
    index = torch.arange(segment_ids.shape[1], device=segment_ids.device).expand_as(segment_ids)
    starts = torch.ones_like(segment_ids, dtype=torch.bool)
    starts[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
    return index - torch.where(starts, index, 0).cummax(dim=1).values


def lengths_of_segments(segment_ids: Tensor) -> Tensor:
    """(B, S) int64: the number of tokens of the run of equal ids that each token is in."""
    behind = positions_in_segments(segment_ids.flip(1)).flip(1)
    return positions_in_segments(segment_ids) + behind + 1
