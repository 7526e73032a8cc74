"""Tiles and splits of attention against a cache, on both sides of every threshold."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from fastattn import backends
from fastattn.backends import triton as backend
from fastattn.kernels.decode_tiles import (
    DECODE_TABLE,
    MOST_PROGRAM_KEYS,
    PROGRAMS_PER_SM,
    SPLITS_OF_A_SIZE,
    WAVES,
    WHOLE,
    Splits,
    decode_tile_for,
    loops,
    programs_for,
    split_count,
    splits_for,
)
from fastattn.kernels.tiles import FAMILIES, HEAD_DIMS, Tile, table_tiles
from fastattn.spec import AttentionSpec, KVCacheCall

SMS = 132
PROGRAMS = WAVES * PROGRAMS_PER_SM * SMS
SMALL, LARGE = Tile(16, 64, 4, 4), Tile(128, 64, 8, 2)


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
    ("rows", "tile", "keys"),
    [
        (1, SMALL, 256), (8, SMALL, 256), (9, SMALL, 512), (16, SMALL, 512), (17, Tile(32, 64, 8, 4), 1024),
        (64, Tile(64, 64, 8, 4), 2048), (65, LARGE, 4096), (128, LARGE, 4096), (15 * 128, LARGE, 4096),
        (1, Tile(16, 16, 4, 3), 256), (1, Tile(16, 512, 4, 3), 512),
    ],
)  # fmt: skip
def test_rows_choose_the_keys_of_a_split(rows: int, tile: Tile, keys: int) -> None:
    splits = splits_for(rows, tile, 1000)
    assert splits.blocks * tile.block_n == keys
    assert splits.per_size == SPLITS_OF_A_SIZE


def test_many_query_tiles_split_nothing() -> None:
    assert splits_for(15 * 128 + 1, LARGE, 1000) == WHOLE


@pytest.mark.parametrize("rows", [1, 8, 24, 200, 1000])
def test_the_cache_chooses_only_how_many_there_may_be(rows: int) -> None:
    tile = decode_tile_for(spec_of(), rows, paged=False)
    chosen = [splits_for(rows, tile, blocks) for blocks in (0, 1, 63, 64, 1000, 2**20)]
    assert len({(splits.per_size, splits.blocks) for splits in chosen}) == 1
    counts = [splits.most for splits in chosen]
    assert counts[:2] == [1, 1]
    assert counts == sorted(counts)
    assert counts[-1] > counts[2]


def test_splits_double_their_keys() -> None:
    """Of 2 blocks at first, three of a size: 2 2 2 4 4 4 8 8 8 ..., the last what is left."""
    splits, sizes = Splits(3, 2), [2] * 3 + [4] * 3 + [8] * 3 + [16] * 3
    for blocks in range(sum(sizes) + 1):
        wanted = next(n for n in range(len(sizes) + 1) if sum(sizes[:n]) >= blocks)
        assert split_count(blocks, splits) == wanted


@pytest.mark.parametrize(
    ("num_splits", "blocks", "wanted"), [(1, 100, 1), (7, 100, 7), (200, 100, 100), (3, 0, 1)]
)
def test_a_number_that_is_asked_for_is_of_equal_splits(num_splits: int, blocks: int, wanted: int) -> None:
    assert splits_for(4, SMALL, blocks, num_splits) == Splits(wanted, blocks=0, most=wanted)


def test_long_caches_have_few_splits() -> None:
    """131072 keys: 16 splits of each of 256, 512, 1024, 2048 and 4096 keys, and the 4096 keys left."""
    assert splits_for(8, SMALL, 131072 // 64).most == 81
    assert splits_for(8, SMALL, 2**20 // 64).most == 16 * 8 + 1


def test_programs_fill_a_device_and_little_more() -> None:
    assert programs_for(True, 8, 81, 131072, SMS) == 81
    assert programs_for(True, 512, 81, 4096, SMS) == PROGRAMS // 512
    assert programs_for(True, 10 * PROGRAMS, 81, 4096, SMS) == 1
    assert programs_for(True, 8, 3, 600, SMS) == 3
    assert programs_for(True, 0, 3, 600, SMS) == 3


def test_one_long_sequence_does_not_delay_a_batch() -> None:
    assert programs_for(True, 10 * PROGRAMS, 81, MOST_PROGRAM_KEYS, SMS) == 1
    assert programs_for(True, 10 * PROGRAMS, 81, MOST_PROGRAM_KEYS + 1, SMS) == 2
    assert programs_for(True, 10 * PROGRAMS, 81, 8 * MOST_PROGRAM_KEYS, SMS) == 8


def test_large_tiles_and_full_caches_have_a_program_for_each_split() -> None:
    assert loops(SMALL, full=False)
    assert not loops(LARGE, full=False)
    assert not loops(SMALL, full=True)
    assert programs_for(False, 10 * PROGRAMS, 36, 131072, SMS) == 36


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
    from fastattn.backends.triton.kv_cache import blocks_seen, keys_seen

    call = call_of()
    call = KVCacheCall(
        *(getattr(call, name) for name in ("query", "k_cache", "v_cache", "cache_lengths")), **options
    )
    assert keys_seen(call) == seen
    for block_n in (1, 4, 16, 64):
        ends = [(first // block_n, (first + seen - 1) // block_n) for first in range(32 - seen + 1)]
        assert blocks_seen(call, block_n) == max(last - first + 1 for first, last in ends), block_n


def test_decoding_on_a_gpu_runs_on_triton() -> None:
    spec = spec_of()
    assert backends.select(spec, "auto", "kv_cache_fwd") is backend
    assert "decode 16x64" in str(backends.explanation({"kv_cache_fwd": spec}, "auto"))
    assert "chunk 128x" in str(backends.explanation({"kv_cache_fwd": spec_of(seqlen_q=9)}, "auto"))
