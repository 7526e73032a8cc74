"""Random calls of `attention_kv_cache`: caches dense or paged, appends, rotation, every option."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

PAGES = (1, 3, 16, 16, 64, 128)
QUERIES = (1, 1, 1, 2, 5, 17, 40, 150)
HEAD_DIMS = (8, 17, 64, 64, 80, 128, 128, 192, 256)
CALLS_PER_KIND = 16  # consecutive seeds with the same dtype, head dims and features


class CacheCall:
    """A call drawn from a seed; places of the cache that no sequence has written hold NaN."""

    def __init__(self, seed: int, device: torch.device, longest: int) -> None:
        draw, kind = random.Random(seed), random.Random(seed // CALLS_PER_KIND)
        self.generator, self.device = torch.Generator(device).manual_seed(seed), device
        self.head_dim = kind.choice(HEAD_DIMS)
        self.value_dim = self.head_dim if kind.random() < 0.8 else kind.choice(HEAD_DIMS)
        self.dtype = kind.choice([torch.float16, torch.bfloat16, torch.bfloat16, torch.float32])
        self.group, self.kv_heads, self.batch = (
            kind.choice([1, 4, 8]),
            draw.choice([1, 2, 3]),
            draw.choice([1, 2, 5]),
        )
        self.capacity = longest if draw.random() < 0.5 else draw.randint(1, longest)
        self.new = min(draw.choice(QUERIES), self.capacity)
        self.append = kind.random() < 0.7
        self.page = kind.choice(PAGES) if kind.random() < 0.6 else 0
        self.num_splits = draw.choice([None, None, 1, 2, 7])
        rotary = 0 if kind.random() < 0.5 else kind.randint(1, self.head_dim // 2)
        least, most = (
            (0, self.capacity - self.new) if self.append else (self.new if rotary else 0, self.capacity)
        )
        self.lengths = [draw.choice([least, most, draw.randint(least, most)]) for _ in range(self.batch)]
        self.rotary = self._rotary(rotary, kind.random() < 0.5) if rotary else {}
        self.options = self._options(draw, kind)
        self.query = self._normal(self.batch, self.kv_heads * self.group, self.new, self.head_dim)
        self.key, self.value = (
            self._normal(self.batch, self.kv_heads, self.new, dim) for dim in self._dims()
        )
        self.past = [self._past(dim, rows_first=draw.random() < 0.5) for dim in self._dims()]
        self.block_table = self._pages()

    def describe(self) -> str:
        """The call in a line."""
        heads = f"{self.kv_heads * self.group}/{self.kv_heads}"
        text = f"B{self.batch} H{heads} Sq{self.new} lengths {self.lengths} of {self.capacity}"
        text += f" D{self.head_dim},{self.value_dim} {str(self.dtype)[6:]}"
        text += f" page {self.page}" if self.page else ""
        text += f" append {self.append} splits {self.num_splits} {list(self.rotary)} {list(self.options)}"
        return text

    def run(self, attend: Callable[..., Any], dtype: torch.dtype, **extra: Any) -> dict[str, Tensor]:
        """out, lse and the caches afterwards, one sequence at a time by padded attention unless a backend is named."""
        if "backend" not in extra:
            return self._one_by_one(attend, dtype)
        caches = [self._cache(past) for past in self.past]
        lengths = torch.tensor(self.lengths, dtype=torch.int32, device=self.device)
        new = {"key": self.key, "value": self.value} if self.append else {}
        out, lse = attend(
            self.query, *caches, lengths, **new, block_table=self.block_table, **self.rotary, **self.options,
            num_splits=self.num_splits, return_lse=True, **extra,
        )  # fmt: skip
        return self._results(out, lse, [self._dense(cache) for cache in caches])

    def cancelling_terms(self) -> dict[str, Tensor]:
        """None: there are no gradients."""
        return {}

    def _one_by_one(self, attend: Callable[..., Any], dtype: torch.dtype) -> dict[str, Tensor]:
        caches = [past.to(dtype) for past in self.past]
        outs, lses = [], []
        for b, length in enumerate(self.lengths):
            q, end = self.query[b].to(dtype), length
            if self.append:
                end += self.new
                caches[0][b, :, length:end] = self._rotated(self.key[b].to(dtype), length)
                caches[1][b, :, length:end] = self.value[b].to(dtype)
            q = self._rotated(q, end - self.new)
            options = dict(self.options)
            if "alibi_slopes" in options:
                options["alibi_slopes"] = options["alibi_slopes"][b]
            keys, values = (cache[b : b + 1, :, :end] for cache in caches)
            out, lse = attend(q[None], keys, values, **{"causal": True, **options}, return_lse=True)
            outs.append(out)
            lses.append(lse)
        return self._results(torch.cat(outs), torch.cat(lses), caches)

    def _results(self, out: Tensor, lse: Tensor, caches: list[Tensor]) -> dict[str, Tensor]:
        written = torch.stack([cache.isnan().sum(-1) for cache in caches])
        results = {"out": out, "lse": lse, "written": written}
        return results | {name: cache.nan_to_num(0.0) for name, cache in zip(("k_cache", "v_cache"), caches)}

    def _dims(self) -> tuple[int, int]:
        return self.head_dim, self.value_dim

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, device=self.device).to(self.dtype)

    def _past(self, dim: int, rows_first: bool) -> Tensor:
        """(B, Hkv, capacity, D)."""
        past = self._normal(self.batch, self.kv_heads, self.capacity, dim)
        for b, length in enumerate(self.lengths):
            past[b, :, length:] = torch.nan
        return past.transpose(1, 2).contiguous().transpose(1, 2) if rows_first else past

    def _pages(self) -> Tensor | None:
        if not self.page:
            return None
        pages = math.ceil(self.capacity / self.page)
        order = torch.randperm(self.batch * pages + 2, generator=self.generator, device=self.device)
        return order[: self.batch * pages].view(self.batch, pages).int()

    def _cache(self, past: Tensor) -> Tensor:
        """A copy of the cached tensor, dense or in pages; the last page may extend beyond the capacity."""
        if self.block_table is None:
            return past.clone(memory_format=torch.preserve_format)
        batch, pages = self.block_table.shape
        cache = past.new_full((batch * pages + 2, past.shape[1], self.page, past.shape[3]), torch.nan)
        room = past.new_full((batch, past.shape[1], pages * self.page, past.shape[3]), torch.nan)
        room[:, :, : self.capacity] = past
        cache[self.block_table.long()] = room.unflatten(2, (pages, self.page)).transpose(1, 2)
        return cache

    def _dense(self, cache: Tensor) -> Tensor:
        if self.block_table is None:
            return cache
        return cache[self.block_table.long()].transpose(1, 2).flatten(2, 3)[:, :, : self.capacity]

    def _rotary(self, half: int, interleaved: bool) -> dict[str, Any]:
        positions = torch.arange(self.capacity, device=self.device)[:, None]
        angles = positions * torch.logspace(0, -3, half, device=self.device)
        return {"rotary_cos": angles.cos(), "rotary_sin": angles.sin(), "rotary_interleaved": interleaved}

    def _rotated(self, x: Tensor, start: int) -> Tensor:
        """x (H, S, D) rotated to the positions from `start` on."""
        if not self.rotary:
            return x
        cos, sin = (
            self.rotary[name][start : start + x.shape[1]].to(x) for name in ("rotary_cos", "rotary_sin")
        )
        half, interleaved = cos.shape[1], self.rotary["rotary_interleaved"]
        x, rest = x[..., : 2 * half], x[..., 2 * half :]
        first, second = (x[..., 0::2], x[..., 1::2]) if interleaved else (x[..., :half], x[..., half:])
        pairs = torch.stack([first * cos - second * sin, second * cos + first * sin], dim=-1)
        return torch.cat([pairs.flatten(-2) if interleaved else pairs.mT.flatten(-2), rest], dim=-1)

    def _options(self, draw: random.Random, kind: random.Random) -> dict[str, Any]:
        heads = self.kv_heads * self.group
        options: dict[str, Any] = {"causal": kind.choice([True, True, True, False])}
        if kind.random() < 0.3:
            options["window"] = (draw.choice([0, 5, 100]), kind.choice([0, 9, None]))
        if kind.random() < 0.25:
            options["softcap"] = 5.0
        if kind.random() < 0.25:
            options["sinks"] = self._normal(heads).float()
        if kind.random() < 0.25:
            options["alibi_slopes"] = self._normal(self.batch, heads).float().abs()
        return options
