"""Calls against a cache that the kernel tests share: inputs, the Triton result with small tiles, the reference's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from attention_cases import DEVICE, SMALL_TILE, Maker
from kv_caches import Cache, Options, expected, rotary_tables
from torch import Tensor

from fastattn.backends import layout
from fastattn.backends import triton as backend
from fastattn.kernels.tiles import Tile
from fastattn.ops.kv_cache import call_arguments
from fastattn.spec import AttentionSpec, KVCacheCall
from numerics import assert_within_rule, plain_in_any_order

DEFAULTS: Options = {
    "block_table": None,
    "rotary_cos": None,
    "rotary_sin": None,
    "rotary_interleaved": False,
    "alibi_slopes": None,
    "sinks": None,
    "causal": True,
    "window": None,
    "softcap": None,
    "scale": None,
}


@dataclass(frozen=True)
class Case:
    """One call: its shapes, its cache, and its options, a function of a tensor maker."""

    name: str
    options: Callable[[Maker], Options] = field(default=lambda make: {})
    lengths: tuple[int, ...] = (0, 37)  # before the append
    new: int = 1  # queries, and tokens appended
    append: bool = True
    kind: str = "dense"
    page: int = 8
    capacity: int = 40
    kv_heads: int = 1
    group: int = 2
    head_dim: int = 16
    value_dim: int = 16
    num_splits: int | None = 2
    dtype: torch.dtype = torch.float16
    tile: Tile | None = SMALL_TILE

    def __str__(self) -> str:
        return self.name


@dataclass
class Inputs:
    """The tensors of a case."""

    case: Case
    cache: Cache
    query: Tensor
    key: Tensor | None
    value: Tensor | None
    options: Options

    @classmethod
    def of(cls, case: Case, seed: int = 0) -> Inputs:
        """Fresh inputs of a case; the cache's are always the same."""
        make, batch = Maker(seed), len(case.lengths)
        cache = Cache(
            list(case.lengths), case.dtype, kv_heads=case.kv_heads, head_dim=case.head_dim,
            value_dim=case.value_dim, capacity=case.capacity, page=case.page, spare=3, device=DEVICE,
        )  # fmt: skip
        query, key, value = (
            make.normal(batch, heads, case.new, dim, dtype=case.dtype)
            for heads, dim in (
                (case.kv_heads * case.group, case.head_dim),
                (case.kv_heads, case.head_dim),
                (case.kv_heads, case.value_dim),
            )
        )
        new = (key, value) if case.append else (None, None)
        return cls(case, cache, query, *new, case.options(make))

    def call(self, **changes: Any) -> KVCacheCall:
        """The normalised call a backend gets."""
        args = call_arguments(
            self.query, key=self.key, value=self.value, num_splits=self.case.num_splits,
            **{**DEFAULTS, **self.cache.call(self.case.kind), **self.options},
        )  # fmt: skip
        return replace(KVCacheCall(*args), **changes)

    def expected(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The reference's results."""
        return expected(self.cache, self.case.kind, self.query, self.key, self.value, dtype, **self.options)


def run(call: KVCacheCall, tile: Tile | None = SMALL_TILE) -> tuple[Tensor, Tensor]:
    """(out, lse) of the Triton backend."""
    call = layout.operands(call)
    spec = AttentionSpec.of(call.attending(call.query, call.k_cache, call.v_cache, call.alibi_slopes))
    assert backend.why_not(spec) is None
    return backend.kv_cache_fwd(spec, layout.for_backend(backend, call, spec), tile)


def check(case: Case, **changes: Any) -> tuple[Tensor, Tensor]:
    """Hold the results of a case to the error rule."""
    inputs = Inputs.of(case)
    golden = inputs.expected(torch.float64)
    plain = plain_in_any_order(partial(inputs.expected, case.dtype), golden)
    actual = run(inputs.call(**changes), case.tile)
    for a, p, g, result in zip(actual, plain, golden, ("out", "lse")):
        assert_within_rule(a, p, g, f"{case}: {result}", case.dtype)
    return actual


def slopes(make: Maker, *shape: int) -> Options:
    """Random slopes."""
    return {"alibi_slopes": make.normal(*shape).abs()}


def rotary(half: int, **more: Any) -> Callable[[Maker], Options]:
    """Tables of `half` frequencies for 40 positions."""
    return lambda make: {n: t.to(DEVICE) for n, t in rotary_tables(40, half).items()} | more


def everything(make: Maker) -> Options:
    """Every option at once, for two sequences of four heads."""
    return {
        **rotary(6)(make),
        **slopes(make, 2, 4),
        "sinks": make.normal(4),
        "softcap": 3.0,
        "window": (11, None),
    }
