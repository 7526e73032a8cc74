"""Decoding: one new token per sequence against a key/value cache, contiguous or paged."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from measure import calls
from measure.harness import Budget
from measure.protocols import CannotRun, Judgement, Step, Tensors
from peers import attention as attention_peers
from report import figures, schema

BUDGET = Budget(seconds=2.0, memory=False)


@dataclass(frozen=True)
class DecodeCase:
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

    def providers(self, device: torch.device) -> list[str]:
        """Ours first."""
        if self.peers:
            return ["fastattn", *self.peers]
        pinned = [f"sdpa-{name}" for name in ("cudnn", "flash", "efficient", "math")]
        return [*calls.our_backends(), *pinned, "flex", "flash_attn"]

    def open(self, device: torch.device) -> DecodeWorkload:
        """Random caches on the device."""
        return DecodeWorkload(self, device)

    def small(self) -> DecodeCase:
        """The same options on a short cache and two key/value heads."""
        group, kv_heads = self.heads // self.kv_heads, min(self.kv_heads, 2)
        return replace(
            self, batch=min(self.batch, 3), length=40, kv_heads=kv_heads, heads=kv_heads * group,
            page=16 if self.page else 0, target=None,
        )  # fmt: skip


class DecodeWorkload:
    """Caches, the new token and its query; a step writes the same token to the same place each time."""

    def __init__(self, case: DecodeCase, device: torch.device) -> None:
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
            pages = -(-self.capacity // case.page)
            total = pages * case.batch
            order = torch.randperm(total, generator=torch.Generator().manual_seed(7))
            self.block_table = order.view(case.batch, pages).to(device, torch.int32)
            shape = (total, case.kv_heads, case.page, case.head_dim)
        self.k_cache, self.v_cache = normal(*shape), normal(*shape)
        self.lengths = torch.tensor(case.lengths, dtype=torch.int32, device=device)

    def step(self, provider: str) -> Step:
        """Append the new token and attend to everything cached, the token itself included."""
        family, _, variant = provider.partition("-")
        makers: dict[str, Callable[[str], Callable[[], Tensor]]] = {
            "fastattn": self._fastattn,
            "sdpa": self._sdpa,
            "flex": self._flex,
            "flash_attn": self._flash_attn,
        }
        call = makers[family](variant)

        def step() -> Tensors:
            with torch.no_grad():
                return {"out": call()}

        return step

    def judge(self, provider: str) -> Judgement | None:
        """The truth in float64 for the last sequence, the longest, and its first key/value head."""
        return self._judgement

    @cached_property
    def _judgement(self) -> Judgement:
        from fastattn import reference

        group, length = self.case.heads // self.case.kv_heads, self.case.lengths[-1]
        rows = self.k_cache, self.v_cache
        if self.block_table is not None:
            rows = tuple(self._gathered(cache)[-1:] for cache in rows)  # type: ignore[assignment]
        keys, values = (
            torch.cat([cache[-1:, :1, :length], new[-1:, :1]], dim=2)
            for cache, new in zip(rows, (self.key, self.value))
        )
        few = {"query": self.query[-1:, :group], "key": keys, "value": values}

        def formula(*operands: Tensor) -> Tensor:
            out = reference.attention(*operands)
            assert isinstance(out, Tensor)
            return out

        over = f"the last sequence, query heads 0..{group - 1}"
        return calls.judge_by(
            formula, few, None, "forward", self.case.dtype, lambda name, t: t[-1:, :group], over
        )

    def _fastattn(self, backend: str) -> Callable[[], Tensor]:
        import fastattn

        def call() -> Tensor:
            out = fastattn.attention_kv_cache(
                self.query, self.k_cache, self.v_cache, self.lengths, key=self.key, value=self.value,
                block_table=self.block_table, backend=backend or "auto",
            )  # fmt: skip
            assert isinstance(out, Tensor)
            return out

        if backend:
            calls.unless_refused(call)
        return call

    def _sdpa(self, backend: str) -> Callable[[], Tensor]:
        """SDPA on the cached part; unequal lengths need a mask over the longest, pages are gathered first."""
        from torch.nn.attention import sdpa_kernel

        case = self.case
        gqa, stop = case.heads != case.kv_heads, case.length + 1
        places = torch.arange(case.batch, device=self.device), self.lengths.long()
        mask = None
        if case.group != "equal":
            mask = (torch.arange(stop, device=self.device) <= self.lengths[:, None])[:, None, None]

        def call() -> Tensor:
            if self.block_table is not None:
                self._append_paged()
                key, value = (self._gathered(cache)[:, :, :stop] for cache in (self.k_cache, self.v_cache))
            else:
                self._append(places)
                key, value = self.k_cache[:, :, :stop], self.v_cache[:, :, :stop]
            with sdpa_kernel(attention_peers.sdpa_backend(backend)) if backend else nullcontext():
                return F.scaled_dot_product_attention(self.query, key, value, attn_mask=mask, enable_gqa=gqa)

        return call

    def _flex(self, _: str) -> Callable[[], Tensor]:
        """FlexAttention's decoding, compiled for the shape; lengths are a mask_mod."""
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        case, lengths = self.case, self.lengths
        if self.block_table is not None:
            raise CannotRun("its paged form is experimental")
        places = torch.arange(case.batch, device=self.device), lengths.long()

        def mask_mod(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return j <= lengths[b]

        block_mask = None
        if case.group != "equal":
            block_mask = create_block_mask(
                mask_mod, case.batch, None, 1, case.length + 1, device=str(self.device)
            )
        compiled: Any = torch.compile(flex_attention, dynamic=False)
        gqa = case.heads != case.kv_heads

        def call() -> Tensor:
            self._append(places)
            out: Tensor = compiled(
                self.query, self.k_cache, self.v_cache, block_mask=block_mask, enable_gqa=gqa
            )
            return out

        return call

    def _flash_attn(self, _: str) -> Callable[[], Tensor]:
        """The flash-attn package's own cache kernel, where it is installed."""
        function = import_module("flash_attn").flash_attn_with_kvcache
        if self.case.page % 256:
            raise CannotRun("its pages hold a multiple of 256 tokens")

        def rows(tensor: Tensor) -> Tensor:
            return tensor.transpose(1, 2)

        def call() -> Tensor:
            out: Tensor = function(
                rows(self.query), rows(self.k_cache), rows(self.v_cache), rows(self.key), rows(self.value),
                cache_seqlens=self.lengths, block_table=self.block_table, causal=True,
            )  # fmt: skip
            return rows(out)

        return call

    def _append(self, places: tuple[Tensor, Tensor]) -> None:
        if self.case.group == "equal":
            self.k_cache[:, :, self.case.length] = self.key[:, :, 0]
            self.v_cache[:, :, self.case.length] = self.value[:, :, 0]
            return
        sequences, positions = places
        self.k_cache[sequences, :, positions] = self.key[:, :, 0]
        self.v_cache[sequences, :, positions] = self.value[:, :, 0]

    def _append_paged(self) -> None:
        assert self.block_table is not None
        pages = self.block_table.long().gather(1, (self.lengths.long() // self.case.page)[:, None])[:, 0]
        within = self.lengths.long() % self.case.page
        self.k_cache[pages, :, within] = self.key[:, :, 0]
        self.v_cache[pages, :, within] = self.value[:, :, 0]

    def _gathered(self, cache: Tensor) -> Tensor:
        """(B, Hkv, pages * page, D) of a paged cache."""
        assert self.block_table is not None
        return cache[self.block_table.long()].transpose(1, 2).flatten(2, 3)


def cases_for(device: torch.device) -> list[DecodeCase]:
    """Every case of a device, the most important first."""
    return cpu_cases() if device.type == "cpu" else gpu_cases()


def cpu_cases() -> list[DecodeCase]:
    """A small model's decoding: one sequence or a few, short and long caches."""
    mha = {"heads": 12, "kv_heads": 12, "head_dim": 64, "peers": ("sdpa",)}
    gqa = {**mha, "heads": 16, "kv_heads": 2}
    cases = [
        DecodeCase("mha-1x2048", "equal", 1, 2048, **mha),  # type: ignore[arg-type]
        DecodeCase("gqa-1x2048", "equal", 1, 2048, **{**gqa, "peers": ("sdpa", "flex")}),  # type: ignore[arg-type]
        DecodeCase("mha-8x1024", "equal", 8, 1024, **mha),  # type: ignore[arg-type]
        DecodeCase("mha-8x1024-ragged", "ragged", 8, 1024, **mha),  # type: ignore[arg-type]
        DecodeCase("gqa-8x1024-paged", "paged", 8, 1024, page=64, **gqa),  # type: ignore[arg-type]
        DecodeCase("mha-1x2048-bf16", "equal", 1, 2048, dtype=torch.bfloat16, **mha),  # type: ignore[arg-type]
    ]
    return cases + [DecodeCase(f"mha-1x{n}", "equal", 1, n, **mha) for n in (128, 512, 8192)]  # type: ignore[arg-type]


def gpu_cases() -> list[DecodeCase]:
    """KV 2k..128k, batch 1..64, MHA and GQA 8:1 in bfloat16; then unequal lengths and pages."""
    heads = {"mha": (16, 16), "gqa": (64, 8)}
    sizes = [(64, 2048), (16, 8192), (1, 131072), (4, 32768), (1, 8192), (16, 2048), (64, 8192), (1, 2048)]
    cases = [
        DecodeCase(f"{kind}-{batch}x{length}", "equal", batch, length, h, kv, 128, torch.bfloat16)
        for batch, length in sizes
        for kind, (h, kv) in heads.items()
    ]
    cases += [
        DecodeCase("gqa-32x8192-ragged", "ragged", 32, 8192, 64, 8, 128, torch.bfloat16),
        DecodeCase("gqa-32x8192-paged", "paged", 32, 8192, 64, 8, 128, torch.bfloat16, page=64),
        DecodeCase("gqa-32x8192-paged-256", "paged", 32, 8192, 64, 8, 128, torch.bfloat16, page=256),
    ]
    return cases
