"""Random queries, keys and values of small attention calls."""

from __future__ import annotations

import torch
from torch import Tensor


def qkv(
    *, b: int = 2, h: int = 4, hkv: int = 4, sq: int = 9, sk: int = 11, d: int = 8, dv: int = 8,
    dtype: torch.dtype = torch.float32, grad: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    shapes = ((b, h, sq, d), (b, hkv, sk, d), (b, hkv, sk, dv))
    q, k, v = (torch.randn(shape, dtype=dtype, requires_grad=grad) for shape in shapes)
    return q, k, v


def masked(*shape: int) -> Tensor:
    """A mask of about half of the pairs; every row sees the first key."""
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(2)) < 0.5
    mask[..., 0] = True
    return mask
