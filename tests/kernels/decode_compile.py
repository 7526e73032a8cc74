"""What the kernels on caches are compiled with, for compile_entries.py; run by itself, compiles a few and prints JSON.

python tests/kernels/decode_compile.py                what launches of many sizes are looked up by, and PTX of decoding
python tests/kernels/decode_compile.py --compile      the tiles of decoding, and PTX of decoding in float32
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from functools import cache
from typing import Any

import torch

from fastattn.spec import AttentionSpec, KVCacheCall

DTYPES = {16: torch.bfloat16, 32: torch.float32}
CAPACITY = 4096
HEADS = {"1 head": 1, "4 heads": 4, "8 heads": 8}  # that share a key head
QUERIES = {"4 queries": 4, "8 queries": 8, "64 queries": 64}  # with 8 heads: 32, 64 and 512 rows
PAGES = {"pages of 64": 64, "pages of 16": 16}
FEATURES = {  # of decode, by bits
    16: (
        "8 heads",
        "4 heads, pages of 64",
        "1 head, pages of 16",
        "8 heads, rotary",
        "8 heads, full",
        "8 heads, pages of 16, all",
        "8 heads, 4 queries",
        "8 heads, 8 queries, pages of 64",
        "8 heads, 64 queries, pages of 16",
    ),
    32: ("8 heads", "1 head, pages of 16", "8 heads, pages of 16, all"),
}
APPEND, COMBINE = "pages of 16, rotary", "8 heads, sinks"


def cache_call(
    features: str, head_dim: int, bits: int, *, batch: int = 2, kv_heads: int = 2, capacity: int = CAPACITY
) -> KVCacheCall:
    """A call with the named features that appends as many keys as it has queries."""
    names, dtype = features.split(", "), DTYPES[bits]
    group, seqlen_q, page = (
        next((sizes[name] for name in names if name in sizes), default)
        for sizes, default in ((HEADS, 8), (QUERIES, 1), (PAGES, 0))
    )
    pages = -(-capacity // page) if page else 1
    cache = torch.empty(batch * pages, kv_heads, page or capacity, head_dim, dtype=dtype)
    full = "full" in names  # a padded call with one query
    new = torch.empty(batch, kv_heads, seqlen_q, head_dim, dtype=dtype)
    options: dict[str, Any] = {"causal": "bottom_right", "scale": 0.125}
    if "rotary" in names or "all" in names:
        table = torch.empty(capacity, head_dim // 2)
        options |= {"rotary_cos": table, "rotary_sin": table}
    if "sinks" in names or "all" in names:
        options["sinks"] = torch.ones(kv_heads * group)
    if "all" in names:
        slopes = torch.ones(1, kv_heads * group)
        options |= {"window_left": 100, "softcap": 30.0, "alibi_slopes": slopes, "rotary_interleaved": True}
    return KVCacheCall(
        query=torch.empty(batch, kv_heads * group, seqlen_q, head_dim, dtype=dtype),
        k_cache=cache,
        v_cache=cache,
        cache_lengths=torch.zeros(0 if full else batch, dtype=torch.int32),
        key=new,
        value=new,
        block_table=torch.zeros(batch, pages, dtype=torch.int32) if page else None,
        **options,
    )


def launches_of(call: KVCacheCall, arch: int, num_splits: int, num_stages: int = 0) -> dict[str, Any]:
    """The launches of a call on an architecture, by kernel; with its tile's own stages unless others are named."""
    from fastattn.kernels.decode_launches import append_launch, combine_launch, decode_launch
    from fastattn.kernels.decode_tiles import Splits, loops

    tile, spec = tile_of(call, arch), _spec_of(call, arch)
    if num_stages:
        tile = replace(tile, num_stages=num_stages)
    query = call.query
    out = query.new_empty(*query.shape[:3], call.v_cache.shape[3])
    lse = query.new_empty(query.shape[:3], dtype=torch.float32)
    split_out = out.new_empty((num_splits, *out.shape), dtype=torch.float32)
    split_lse = lse.new_empty(num_splits, *lse.shape)
    counts = lse.new_empty(lse.shape, dtype=torch.int32)
    several = loops(tile, full=call.cache_lengths.numel() == 0)
    splits = Splits(16, 4, num_splits, programs=max(1, num_splits // 2 if several else num_splits))
    if num_splits == 1:
        decode = decode_launch(spec, call, out, lse, splits, tile)
    else:
        decode = decode_launch(spec, call, split_out, split_lse, splits, tile, counts)
    return {
        "decode": decode,
        "cache_append": append_launch(spec, call),
        "combine": combine_launch(split_out, split_lse, counts, out, lse),
    }


def tile_of(call: KVCacheCall, arch: int) -> Any:
    """The tile a call gets on an architecture."""
    from fastattn.kernels.decode_tiles import decode_tile_for

    spec = _spec_of(call, arch)
    return decode_tile_for(spec, spec.group_size * call.query.shape[2], call.block_table is not None)


def _spec_of(call: KVCacheCall, arch: int) -> AttentionSpec:
    spec = AttentionSpec.of(call.attending(call.query, call.k_cache, call.v_cache, call.alibi_slopes))
    return spec.replace(arch=arch)


Row = tuple[int, int, str, str]  # bits, head dim, kernel, features


def entries() -> Iterator[Row]:
    """Every kind of tile with every kind of cache and feature."""
    from fastattn.kernels.tiles import HEAD_DIMS

    for bits, every in FEATURES.items():
        for head_dim in HEAD_DIMS:
            for features in every:
                yield bits, head_dim, "decode", features
            yield bits, head_dim, "cache_append", APPEND
            yield bits, head_dim, "combine", COMBINE


@cache
def launches(arch: int, bits: int, head_dim: int, features: str, num_stages: int = 0) -> dict[str, Any]:
    """The launches of a row of the compile table, by kernel."""
    num_splits = 1 if "all" in features else 8
    return launches_of(cache_call(features, head_dim, bits), arch, num_splits, num_stages)


def signatures() -> dict[str, list[str]]:
    """What Triton would look compiled kernels up by, over caches, batches and splits that should share one variant."""
    from compile_inspect import specialise, target_of

    found: dict[str, list[str]] = {}
    sizes = [
        (2, 2, 2, 2),
        (17, 2, 2, 3),
        (1000, 2, 2, 16),
        (1024, 1, 2, 2),
        (1024, 16, 1, 64),
        (4096, 3, 16, 7),
    ]
    for layout in ("rotary", "pages of 16, rotary", "all"):
        for capacity, batch, kv_heads, num_splits in sizes:
            call = cache_call(layout, 64, 16, batch=batch, kv_heads=kv_heads, capacity=capacity)
            for name, launch in launches_of(call, 90, num_splits).items():
                source, options = specialise(launch, target_of("90"))
                given = (
                    source.signature,
                    source.constants,
                    source.attrs,
                    options.num_warps,
                    options.num_stages,
                )
                found.setdefault(f"{name}, {layout}", []).append(str(given))
    return found


FEW: tuple[tuple[str, Row], ...] = (
    ("80", (16, 128, "decode", "8 heads")),
    ("90", (16, 128, "decode", "4 heads, pages of 64")),
    ("90", (16, 64, "decode", "1 head, pages of 16")),
    ("90", (16, 128, "cache_append", APPEND)),
    ("90", (16, 128, "combine", COMBINE)),
)


def compiled(entry: tuple[str, Row]) -> dict[str, dict[str, Any]]:
    """What the compiler made of an entry."""
    from compile_inspect import compile_launch

    arch, (bits, head_dim, kernel, features) = entry
    launch = launches(int(arch), bits, head_dim, features)[kernel]
    return {f"sm_{arch} {bits}-bit D{head_dim} {kernel} [{features}]": asdict(compile_launch(launch, arch))}


def arithmetic(bits: int) -> list[dict[str, int]]:
    """How often each floating-point instruction stands in the PTX of decoding: into the result, into splits' results,
    and into those of a full cache."""
    from compile_inspect import specialise, target_of
    from triton import compile

    found = []
    for features, num_splits in (("8 heads", 1), ("8 heads", 8), ("8 heads, full", 8)):
        launch = launches_of(cache_call(features, 64, bits), 90, num_splits)["decode"]
        source, options = specialise(launch, target_of("90"))
        ptx = compile(source, target=target_of("90"), options=options.__dict__).asm["ptx"]
        found.append(
            dict(Counter(re.findall(r"^\s*(?:@%\w+ )?([a-z][\w.]*\.(?:f32|bf16)[\w.]*)\s", ptx, re.M)))
        )
    return found


def main() -> None:
    """The command line."""
    reports: dict[str, dict[str, Any]] = {}
    if sys.argv[1:] == ["--compile"]:
        with ProcessPoolExecutor(2) as pool:
            for made in pool.map(compiled, FEW):
                reports |= made
        print(json.dumps({"compiled": reports, "arithmetic": {32: arithmetic(32)}}, indent=1))
    else:
        print(json.dumps({"signatures": signatures(), "arithmetic": {16: arithmetic(16)}}, indent=1))


if __name__ == "__main__":
    main()
