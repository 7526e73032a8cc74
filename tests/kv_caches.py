"""Key/value caches the tests share: a random past, dense and in shuffled pages, and what attention to it must give."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastattn import reference

Options = dict[str, Any]


class Cache:
    """The same random past as a dense and as a paged cache, NaN wherever no sequence has written.

    `spare` pages belong to no sequence.
    """

    def __init__(
        self,
        lengths: list[int],
        dtype: torch.dtype = torch.float32,
        *,
        kv_heads: int = 2,
        head_dim: int = 16,
        value_dim: int = 16,
        capacity: int = 40,
        page: int = 8,
        spare: int = 0,
        device: str = "cpu",
    ) -> None:
        generator = torch.Generator().manual_seed(7)
        batch, pages = len(lengths), -(-capacity // page)
        self.lengths = torch.tensor(lengths, dtype=torch.int32, device=device)
        beyond = torch.arange(capacity) >= torch.tensor(lengths)[:, None]
        order = torch.randperm(batch * pages + spare, generator=generator)[: batch * pages]
        self.block_table = order.view(batch, pages).int().to(device)
        self.k, self.v = (
            torch.randn(batch, kv_heads, capacity, dim, generator=generator)
            .to(dtype)
            .masked_fill(beyond[:, None, :, None], torch.nan)
            .to(device)
            for dim in (head_dim, value_dim)
        )
        self.paged = [self._in_pages(t, page, batch * pages + spare) for t in (self.k, self.v)]

    def _in_pages(self, dense: Tensor, page: int, count: int) -> Tensor:
        """(P, Hkv, page, D)."""
        paged = dense.new_full((count, dense.shape[1], page, dense.shape[3]), torch.nan)
        for b, blocks in enumerate(self.block_table.tolist()):
            for i, block in enumerate(blocks):
                tokens = dense[b, :, i * page : (i + 1) * page]
                paged[block, :, : tokens.shape[1]] = tokens
        return paged

    def call(self, kind: str) -> dict[str, Tensor]:
        """The cache arguments, "dense" or "paged"."""
        if kind == "dense":
            return {"k_cache": self.k, "v_cache": self.v, "cache_lengths": self.lengths}
        k, v = self.paged
        return {"k_cache": k, "v_cache": v, "cache_lengths": self.lengths, "block_table": self.block_table}

    def dense(self, kind: str) -> tuple[Tensor, Tensor]:
        """(k, v) as (B, Hkv, S, D), whatever the kind."""
        if kind == "dense":
            return self.k, self.v
        capacity = self.k.shape[2]
        k, v = (t[self.block_table.long()].transpose(1, 2).flatten(2, 3)[:, :, :capacity] for t in self.paged)
        return k, v


def rotary_tables(positions: int, half: int) -> dict[str, Tensor]:
    """Cosines and sines of `half` frequencies."""
    angles = torch.linspace(0, 9, positions)[:, None] * torch.linspace(1, 0.1, half)
    return {"rotary_cos": angles.cos(), "rotary_sin": angles.sin()}


def rotate(x: Tensor, cos: Tensor, sin: Tensor, start: int, interleaved: bool) -> Tensor:
    """x (H, S, D), each pair of its leading columns rotated by the angle of its position."""
    half = cos.shape[1]
    cos, sin = (table[start : start + x.shape[1]].to(x) for table in (cos, sin))
    turned = x[..., : 2 * half]
    pairs = turned.unflatten(-1, (half, 2)) if interleaved else turned.unflatten(-1, (2, half)).mT
    turns = torch.stack([cos, -sin, sin, cos], dim=-1).unflatten(-1, (2, 2))  # (S, half, 2, 2)
    result = (turns * pairs[..., None, :]).sum(-1)
    result = result.flatten(-2) if interleaved else result.mT.flatten(-2)
    return torch.cat([result, x[..., 2 * half :]], dim=-1)


def expected(
    cache: Cache,
    kind: str,
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    dtype: torch.dtype,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """(out, lse), one sequence at a time by the reference, in `dtype`."""
    k, v = cache.dense(kind)
    cos, sin, interleaved = (
        options.pop(name, None) for name in ("rotary_cos", "rotary_sin", "rotary_interleaved")
    )
    slopes = options.pop("alibi_slopes", None)
    outs, lses = [], []
    for b, length in enumerate(cache.lengths.tolist()):
        q, past_k, past_v = query[b].to(dtype), k[b, :, :length].to(dtype), v[b, :, :length].to(dtype)
        if key is not None and value is not None:
            new = key[b].to(dtype)
            if cos is not None:
                new = rotate(new, cos, sin, length, bool(interleaved))
            past_k, past_v = torch.cat([past_k, new], 1), torch.cat([past_v, value[b].to(dtype)], 1)
        if cos is not None:
            q = rotate(q, cos, sin, past_k.shape[1] - q.shape[1], bool(interleaved))
        row = slopes[b : b + 1] if slopes is not None and slopes.dim() == 2 else slopes
        out, lse = reference.attention(
            q[None],
            past_k[None],
            past_v[None],
            **{"causal": True, **options},
            alibi_slopes=row,
            return_lse=True,
        )
        outs.append(out)
        lses.append(lse)
    return torch.cat(outs), torch.cat(lses)
