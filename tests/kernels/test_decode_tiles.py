"""Tiles and splits of attention against a cache, on both sides of every threshold."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from fastattn import backends
from fastattn.backends import triton as backend
from fastattn.kernels.decode_tiles import (
    DECODE_TABLE,
    SPLIT_KEYS,
    decode_tile_for,
    split_keys,
    splits_for,
)
from fastattn.kernels.tiles import FAMILIES, HEAD_DIMS, table_tiles
from fastattn.spec import AttentionSpec, KVCacheCall


def call_of(
    seqlen_q: int = 1, group: int = 4, dtype: torch.dtype = torch.float16, head_dim: int = 64
) -> KVCacheCall:
    cache = torch.empty(1, 1, 32, head_dim, dtype=dtype)
    query = torch.empty(1, group, seqlen_q, head_dim, dtype=dtype)
    return KVCacheCall(query, cache, cache, torch.zeros(1, dtype=torch.int32))


def spec_of(arch: int = 90, **sizes: object) -> AttentionSpec:
    call = call_of(**sizes)
    spec = AttentionSpec.of(call.attending(call.query, call.k_cache, call.v_cache, None))
    return spec.replace(device="cuda", arch=arch)


def test_every_key_has_a_row() -> None:
    assert set(DECODE_TABLE) == set(product(FAMILIES, (16, 32), HEAD_DIMS))


@pytest.mark.parametrize(
    ("rows", "block_m"), [(1, 16), (16, 16), (17, 32), (32, 32), (33, 64), (64, 64), (65, 128), (4096, 128)]
)
def test_rows_choose_the_tile(rows: int, block_m: int) -> None:
    spec = spec_of()
    assert decode_tile_for(spec, rows, paged=False).block_m == block_m
    assert table_tiles(spec).forward.block_m == 128


def test_float32_has_no_small_tiles_but_the_smallest() -> None:
    spec = spec_of(dtype=torch.float32)
    assert decode_tile_for(spec, 16, paged=False).block_m == 16
    assert decode_tile_for(spec, 17, paged=False) == table_tiles(spec).forward


def test_pages_take_a_longer_pipeline() -> None:
    dense, paged = (decode_tile_for(spec_of(), 4, paged=kind) for kind in (False, True))
    assert (dense.num_stages, paged.num_stages) == (4, 7)
    assert (dense.block_n, dense.num_warps) == (paged.block_n, paged.num_warps)


@pytest.mark.parametrize(
    ("head_dim", "keys"), [(16, 512), (64, 512), (65, 256), (128, 256), (129, 256), (256, 256)]
)
def test_a_split_holds_keys_by_the_head_dim(head_dim: int, keys: int) -> None:
    spec = spec_of(head_dim=head_dim)
    tile = decode_tile_for(spec, 4, paged=False)
    assert splits_for(spec, 4, keys, tile) == (1, keys // tile.block_n, False)
    assert splits_for(spec, 4, keys + 1, tile).count == 2
    assert splits_for(spec, 4, 9 * keys, tile).count == 9
    assert splits_for(spec, 4, 0, tile).count == 1


@pytest.mark.parametrize(("rows", "times"), [(0, 1), (1, 1), (16, 1), (17, 2), (32, 2), (33, 3), (4096, 256)])
def test_more_rows_take_larger_splits(rows: int, times: int) -> None:
    assert split_keys(spec_of(), rows) == SPLIT_KEYS[64] * times


def test_every_tile_cuts_at_the_same_keys() -> None:
    """A split is a whole number of every tile's blocks."""
    for key, (block_n, *_) in DECODE_TABLE.items():
        assert SPLIT_KEYS[key[2]] % block_n == 0


def test_a_window_may_begin_within_a_block() -> None:
    spec = spec_of().replace(window_left=True)
    tile = decode_tile_for(spec, 4, paged=False)
    assert splits_for(spec, 4, 512 - tile.block_n, tile).count == 1
    assert splits_for(spec, 4, 512, tile).count == 2


def test_few_sequences_fill_a_gpu() -> None:
    """Programs of one sequence, on the 132 multiprocessors of an H100."""
    spec = spec_of(head_dim=128)
    tile = decode_tile_for(spec, 8, paged=False)
    assert splits_for(spec, 8, 8192, tile).count * 8 >= 0.9 * 2 * 132


@pytest.mark.parametrize(
    ("options", "seen"),
    [
        ({}, 32),
        ({"window_left": 7}, 8),
        ({"window_left": 7, "causal": "none"}, 32),
        ({"window_left": 7, "window_right": 3, "causal": "none"}, 11),
        ({"window_left": 100}, 32),
    ],
)
def test_a_window_is_all_there_is_to_split(options: dict[str, object], seen: int) -> None:
    from fastattn.backends.triton import kv_cache as triton_kv_cache

    call = call_of()
    call = KVCacheCall(
        *(getattr(call, name) for name in ("query", "k_cache", "v_cache", "cache_lengths")), **options
    )
    assert triton_kv_cache._keys_seen(call) == seen


def test_decoding_on_a_gpu_runs_on_triton() -> None:
    spec = spec_of()
    assert backends.select(spec, "auto", "kv_cache_fwd") is backend
    assert "decode 16x64" in str(backends.explanation({"kv_cache_fwd": spec}, "auto"))
    assert "chunk 128x" in str(backends.explanation({"kv_cache_fwd": spec_of(seqlen_q=9)}, "auto"))
