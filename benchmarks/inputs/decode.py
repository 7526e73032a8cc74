"""A step of decoding to measure: one new token per sequence against a key/value cache, and its random tensors."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from report import figures, schema


@dataclass(frozen=True)
class DecodeCall:
    """One appended token and one query per sequence; `length` tokens are cached, or spread evenly up to it."""

    name: str
    group: str  # "equal", "ragged" (lengths from an eighth of `length` up) or "paged" (ragged, in pages)
    batch: int
    length: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype = torch.float32
    page: int = 0
    target: schema.Result | None = None
    peers: tuple[str, ...] = ()  # () = those of a GPU, and ours by backend

    direction = "forward"
    flops = None

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens cached of each sequence."""
        if self.group == "equal":
            return [self.length] * self.batch
        spread = torch.linspace(max(self.length // 8, 1), self.length, self.batch).round()
        return [int(length) for length in spread]

    @property
    def params(self) -> schema.Result:
        """The sizes, for the result."""
        names = ("batch", "length", "heads", "kv_heads", "head_dim")
        return {**{n: getattr(self, n) for n in names}, **({"page": self.page} if self.page else {})}

    @property
    def label(self) -> str:
        """The case in words."""
        heads = f"{self.heads}" if self.heads == self.kv_heads else f"{self.heads}/{self.kv_heads}"
        lengths = f"{self.length}" if self.group == "equal" else f"{self.lengths[0]}..{self.length}"
        parts = [f"batch {self.batch}, {lengths} cached, {heads}×{self.head_dim}"]  # noqa: RUF001
        parts += [f"pages of {self.page}"] if self.page else []
        return ", ".join([*parts, *figures.unusual(self.dtype, "forward+backward")])

    @property
    def axis(self) -> schema.Result | None:
        """Speed over the cache's length."""
        kind = "MHA" if self.heads == self.kv_heads else f"GQA {self.heads // self.kv_heads}:1"
        line = f"{kind}, batch {self.batch}" + ("" if self.group == "equal" else f", {self.group}")
        return {"name": "cached tokens", "value": self.length, "line": line}

    @property
    def bytes(self) -> float:
        """Keys and values read."""
        tokens = sum(self.lengths) + self.batch
        return float(2 * tokens * self.kv_heads * self.head_dim * self.dtype.itemsize)


class DecodeInputs:
    """Caches, the new token and its query; a step writes the same token to the same place each time."""

    def __init__(self, case: DecodeCall, device: torch.device) -> None:
        self.case, self.device = case, device
        generator = torch.Generator(device).manual_seed(7)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device).to(case.dtype)

        self.query = normal(case.batch, case.heads, 1, case.head_dim)
        self.key, self.value = (normal(case.batch, case.kv_heads, 1, case.head_dim) for _ in range(2))
        self.capacity = case.length + 1
        self.block_table = None
        shape = (case.batch, case.kv_heads, self.capacity, case.head_dim)
        if case.page:
            pages = math.ceil(self.capacity / case.page)
            total = pages * case.batch
            order = torch.randperm(total, generator=torch.Generator().manual_seed(7))
            self.block_table = order.view(case.batch, pages).to(device, torch.int32)
            shape = (total, case.kv_heads, case.page, case.head_dim)
        self.k_cache, self.v_cache = normal(*shape), normal(*shape)
        self.lengths = torch.tensor(case.lengths, dtype=torch.int32, device=device)

    def append(self, places: tuple[Tensor, Tensor]) -> None:
        """Write the new token to contiguous caches; places: (sequences, positions) of unequal lengths."""
        if self.case.group == "equal":
            self.k_cache[:, :, self.case.length] = self.key[:, :, 0]
            self.v_cache[:, :, self.case.length] = self.value[:, :, 0]
            return
        sequences, positions = places
        self.k_cache[sequences, :, positions] = self.key[:, :, 0]
        self.v_cache[sequences, :, positions] = self.value[:, :, 0]

    def append_paged(self) -> None:
        """Write the new token to the pages of each sequence."""
        assert self.block_table is not None
        pages = self.block_table.long().gather(1, (self.lengths.long() // self.case.page)[:, None])[:, 0]
        within = self.lengths.long() % self.case.page
        self.k_cache[pages, :, within] = self.key[:, :, 0]
        self.v_cache[pages, :, within] = self.value[:, :, 0]

    def gathered(self, cache: Tensor) -> Tensor:
        """(B, Hkv, pages * page, D) of a paged cache."""
        assert self.block_table is not None
        return cache[self.block_table.long()].transpose(1, 2).flatten(2, 3)
