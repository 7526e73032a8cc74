"""Rotary position embeddings in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

RotaryTable = tuple[Tensor, Tensor]  # cos, sin: (S, R/2) or (B, S, R/2), R = rotary_dim


def rotated_at(x: Tensor, table: RotaryTable, positions: Tensor, *, interleaved: bool) -> Tensor:
    """`apply_rotary` of x (B, heads, S, D) with the table's rows at positions (B, S), in float32 for 16-bit dtypes."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    cos, sin = (t[positions].to(dtype) for t in table)  # (B, S, R/2)
    return apply_rotary(x, (cos, sin), interleaved=interleaved)


def apply_rotary(x: Tensor, table: RotaryTable, *, interleaved: bool = False) -> Tensor:
    """(x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin) on the pairs of the first 2 * cos.shape[-1] dimensions.

    x is (B, H, S, D); cos and sin are (S, R/2) or (B, S, R/2). The result has x's dtype; the arithmetic is done in the
    wider of the two dtypes.
    """
    cos, sin = (t if t.dim() == 2 else t.unsqueeze(1) for t in table)  # (S, R/2) or (B, 1, S, R/2)
    rotary_dim = 2 * cos.shape[-1]
    turning, rest = x[..., :rotary_dim], x[..., rotary_dim:]
    if interleaved:
        first, second = turning[..., 0::2], turning[..., 1::2]
    else:
        first, second = turning.chunk(2, dim=-1)
    turned = (first * cos - second * sin, second * cos + first * sin)
    if interleaved:
        out = torch.stack(turned, dim=-1).flatten(-2)
    else:
        out = torch.cat(turned, dim=-1)
    out = out.to(x.dtype)
    return torch.cat((out, rest), dim=-1) if rest.shape[-1] else out
