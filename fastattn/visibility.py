"""Which keys a query sees by its position, segment and length: the one place for that in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def distances(
    rows: tuple[int, int], cols: tuple[int, int], shift: int, device: torch.device | None
) -> Tensor:
    """pos(i) - j, where pos(i) is i + shift, of queries and keys from a first up to a last: (rows, cols) int64."""
    positions = torch.arange(*rows, device=device) + shift
    return positions[:, None] - torch.arange(*cols, device=device)


def lower_triangle(rows: int, columns: int, device: torch.device | None = None) -> Tensor:
    """Whether j <= i + columns - rows, causality with its end at the bottom right: (rows, columns)."""
    return distances((0, rows), (0, columns), columns - rows, device) >= 0


def within_band(distance: Tensor, causal: bool, left: int | None, right: int | None) -> Tensor | None:
    """Whether pos(i) - left <= j <= pos(i) + right, from pos(i) - j; `causal` sets the right side to 0. Of
    distance's shape; None where no side is bounded. None or a negative side is unbounded."""
    seen: Tensor | None = None
    if left is not None and left >= 0:
        seen = distance <= left
    if causal:
        right = 0
    if right is not None and right >= 0:
        before = distance >= -right
        seen = before if seen is None else seen & before
    return seen


def same_segment(of_query: Tensor, of_key: Tensor) -> Tensor:
    """Whether ids (..., Sq) and (..., Sk) agree and are not negative: (..., Sq, Sk)."""
    ids = of_query[..., None]
    return (ids == of_key[..., None, :]) & (ids >= 0)


def within_lengths(lengths: Tensor, seqlen_k: int) -> Tensor:
    """Whether a key lies within its entry's length: (B, Sk)."""
    return torch.arange(seqlen_k, device=lengths.device) < lengths[:, None]
