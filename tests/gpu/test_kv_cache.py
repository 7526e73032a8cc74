"""Attention against a cache on a CUDA device: the tiles and splits users get, and CUDA graphs over growing caches."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from kv_caches import Cache, Options, expected, rotary_tables
from torch import Tensor

import fastattn
from numerics import assert_within_rule

pytestmark = pytest.mark.gpu

CAPACITY, KV_HEADS = 1100, 2
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
LENGTHS = [0, 1, 63, 64, 777, 1056]


def options_of(name: str, heads: int) -> Options:
    rotary = {n: t.cuda() for n, t in rotary_tables(CAPACITY, 24).items()}
    return {
        "plain": {},
        "rotary": rotary,
        "rotary interleaved": {**rotary, "rotary_interleaved": True},
        "window, softcap, slopes, sinks": {
            "window": (200, 0),
            "softcap": 5.0,
            "alibi_slopes": torch.rand(len(LENGTHS), heads).cuda(),
            "sinks": torch.randn(heads).cuda(),
        },
    }[name]


NAMES = ("plain", "rotary", "rotary interleaved", "window, softcap, slopes, sinks")
GRID = [  # the options and the number of splits alternate
    pytest.param(
        dtype, page, group, new, NAMES[turn % 4], (None, 1, 5)[turn % 3], id=f"{page}-{group}-{new}-{turn}"
    )
    for turn, (dtype, page, (group, new)) in enumerate(
        product(DTYPES, (0, 16, 64, 100), ((1, 1), (8, 1), (8, 4), (8, 8), (4, 44)))
    )
]


@pytest.mark.parametrize(("dtype", "page", "group", "new", "name", "num_splits"), GRID)
def test_error_rule(
    dtype: torch.dtype, page: int, group: int, new: int, name: str, num_splits: int | None
) -> None:
    dim, kind = {0: 128, 16: 64, 64: 128, 100: 80}[page], "paged" if page else "dense"
    sizes: dict[str, Any] = {"kv_heads": KV_HEADS, "head_dim": dim, "value_dim": dim, "capacity": CAPACITY}
    cache = Cache(LENGTHS, dtype, **sizes, page=page or 64, device="cuda")
    heads = KV_HEADS * group
    query = torch.randn(len(LENGTHS), heads, new, dim).to("cuda", dtype)
    key, value = (torch.randn(len(LENGTHS), KV_HEADS, new, dim).to("cuda", dtype) for _ in range(2))
    options = options_of(name, heads)
    golden, plain = (expected(cache, kind, query, key, value, d, **options) for d in (torch.float64, dtype))
    actual = fastattn.attention_kv_cache(
        query, **cache.call(kind), key=key, value=value, **options, num_splits=num_splits, return_lse=True,
        backend="triton",
    )  # fmt: skip
    for a, p, g, result in zip(actual, plain, golden, ("out", "lse")):
        assert_within_rule(a, p, g, result, dtype)
    values = cache.dense(kind)[1]
    for b, length in enumerate(LENGTHS):
        assert torch.equal(values[b, :, length : length + new], value[b])
        assert bool(values[b, :, length + new :].isnan().all())


@pytest.mark.parametrize("kind", ["dense", "paged"])
def test_a_graph_of_one_step_decodes_a_growing_cache(kind: str) -> None:
    """Captured once; every replay reads the lengths, appends and attends, as an eager call does, bit by bit."""
    sizes: dict[str, Any] = {
        "kv_heads": KV_HEADS,
        "head_dim": 64,
        "value_dim": 64,
        "capacity": 512,
        "page": 16,
    }
    captured, eager = (Cache([0, 150, 300], torch.float16, **sizes, device="cuda") for _ in range(2))
    rotary = {n: t.cuda() for n, t in rotary_tables(512, 32).items()}
    query = torch.randn(3, 8, 1, 64).to("cuda", torch.float16)
    key, value = (torch.randn(3, KV_HEADS, 1, 64).to("cuda", torch.float16) for _ in range(2))

    def step(cache: Cache) -> Tensor:
        return fastattn.attention_kv_cache(query, **cache.call(kind), key=key, value=value, **rotary)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(captured)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step(captured)
    for _ in range(200):
        for tensor in (query, key, value):
            tensor.copy_(torch.randn(tensor.shape))
        graph.replay()
        assert torch.equal(out, step(eager))
        for cache in (captured, eager):
            cache.lengths += 1
    for a, b in zip(captured.dense(kind), eager.dense(kind)):
        assert torch.equal(a.nan_to_num(), b.nan_to_num())


def test_nothing_waits_for_the_device() -> None:
    cache = Cache([0, 150, 300], torch.float16, capacity=512, device="cuda")
    query, key = torch.randn(3, 8, 1, 16).to("cuda", torch.float16), cache.k[:, :, :1].contiguous()
    fastattn.attention_kv_cache(query, **cache.call("paged"), key=key, value=key)
    torch.cuda.set_sync_debug_mode("error")
    try:
        fastattn.attention_kv_cache(query, **cache.call("paged"), key=key, value=key)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_page_beyond_32_bits() -> None:
    """A cache of 2**31 elements and more, whose last pages are in use."""
    free = torch.cuda.mem_get_info()[0] / 2**30
    if free < 12:
        pytest.skip(f"needs 12 GiB free, {free:.1f} are")
    pages, page, dim = 2**31 // (16 * 64) + 8, 16, 64
    k_cache, v_cache = (
        torch.zeros(pages, 1, page, dim, dtype=torch.float16, device="cuda") for _ in range(2)
    )
    table = torch.tensor([[pages - 1, 0, pages - 3]], dtype=torch.int32, device="cuda")
    past = [torch.randn(1, 1, 48, dim).to("cuda", torch.float16) for _ in range(2)]
    for cache, tokens in zip((k_cache, v_cache), past):
        cache[table[0].long()] = tokens[0].transpose(0, 1).unflatten(0, (3, page)).transpose(1, 2)
    query = torch.randn(1, 4, 1, dim).to("cuda", torch.float16)
    lengths = torch.tensor([45], dtype=torch.int32, device="cuda")
    out = fastattn.attention_kv_cache(query, k_cache, v_cache, lengths, block_table=table, backend="triton")
    dense = [tokens[:, :, :45] for tokens in past]
    torch.testing.assert_close(out, fastattn.attention(query, *dense, causal=True, backend="triton"))
