"""The launches of attention against a cache that the compile checks look at: shapes, layouts, features."""

from __future__ import annotations

from typing import Any

import torch

from fastattn.spec import AttentionSpec, KVCacheCall

LAYOUTS = ("dense", "paged 64", "paged 16", "any strides")
FEATURES: dict[str, dict[str, Any]] = {
    "plain": {"causal": "none"},
    "causal": {},
    "all": {
        "window_left": 100,
        "window_right": 3,
        "softcap": 30.0,
        "alibi_slopes": "slopes",
        "sinks": "sinks",
    },
    "rotary": {"rotary_cos": "table", "rotary_sin": "table"},
    "rotary interleaved": {"rotary_cos": "table", "rotary_sin": "table", "rotary_interleaved": True},
}
DTYPES = {16: torch.bfloat16, 32: torch.float32}


def cache_call(
    head_dim: int,
    bits: int = 16,
    group: int = 4,
    layout: str = "dense",
    features: str = "causal",
    *,
    batch: int = 2,
    kv_heads: int = 2,
    seqlen_q: int = 1,
    capacity: int = 4096,
) -> KVCacheCall:
    """A call with as many new keys as queries."""
    dtype, paged = DTYPES[bits], layout.startswith("paged")
    page = int(layout.split()[1]) if paged else capacity
    pages = -(-capacity // page)
    shape = (batch * pages, kv_heads, page, head_dim)
    last = 2 if layout == "any strides" else 1
    k_cache = torch.empty(*shape[:3], head_dim * last, dtype=dtype)[..., ::last]
    new = torch.empty(batch, kv_heads, seqlen_q, head_dim, dtype=dtype)
    tensors = {
        "slopes": torch.ones(1, kv_heads * group),
        "sinks": torch.ones(kv_heads * group),
        "table": torch.empty(capacity, head_dim // 2),
    }
    options = {name: tensors.get(value, value) if isinstance(value, str) else value
               for name, value in FEATURES[features].items()}  # fmt: skip
    return KVCacheCall(
        torch.empty(batch, kv_heads * group, seqlen_q, head_dim, dtype=dtype),
        k_cache,
        k_cache,
        torch.zeros(batch, dtype=torch.int32),
        new,
        new,
        torch.zeros(batch, pages, dtype=torch.int32) if paged else None,
        **{
            "causal": "bottom_right",
            "scale": 0.125,
            **options,
            **({"causal": "none"} if features == "plain" else {}),
        },
    )


def launches_of(call: KVCacheCall, arch: int, num_splits: int = 1) -> dict[str, Any]:
    """The launches of a call on an architecture by name."""
    from fastattn.kernels.decode_launches import append_launch, combine_launch, decode_launch
    from fastattn.kernels.decode_tiles import decode_tile_for

    query, value = call.query, call.v_cache
    spec = AttentionSpec.of(call.attending(query, call.k_cache, value, call.alibi_slopes)).replace(arch=arch)
    tile = decode_tile_for(spec, spec.group_size * query.shape[2], call.block_table is not None)
    out = query.new_empty(*query.shape[:3], value.shape[3])
    lse = query.new_empty(query.shape[:3], dtype=torch.float32)
    split_out = out if num_splits == 1 else out.new_empty((num_splits, *out.shape), dtype=torch.float32)
    split_lse = lse.new_empty(num_splits, *lse.shape)
    return {
        "decode": decode_launch(spec, call, split_out, split_lse, num_splits, tile),
        "append": append_launch(spec, call),
        "combine": combine_launch(
            spec, call, split_lse.new_empty(num_splits, *out.shape), split_lse, out, lse
        ),
    }
