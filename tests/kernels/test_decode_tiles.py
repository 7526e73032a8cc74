"""Tiles and splits of attention against a cache, on both sides of every threshold."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from fastattn import backends
from fastattn.backends import triton as backend
from fastattn.kernels.decode_tiles import (
    DECODE_TABLE,
    FEWEST_SPLIT_KEYS,
    MAX_SPLITS,
    MOST_SPLIT_KEYS,
    PROGRAMS_PER_SM,
    decode_tile_for,
    splits_for,
)
from fastattn.kernels.tiles import FAMILIES, HEAD_DIMS, Tile, table_tiles
from fastattn.spec import AttentionSpec, KVCacheCall

SMS = 132
SLOTS = PROGRAMS_PER_SM * SMS
LONG = 8192


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


def test_a_full_device_splits_nothing() -> None:
    enough = int(0.8 * SLOTS) + 1
    assert splits_for(enough, 1, 1, LONG, SMS) == 1
    assert splits_for(1, enough, 1, LONG, SMS) == 1
    assert splits_for(1, 1, enough, 10 * LONG, SMS) == 1


def test_half_a_device_is_filled() -> None:
    assert splits_for(SLOTS // 2, 1, 1, LONG, SMS) == 2
    assert splits_for(1, 8, 1, 64 * LONG, SMS) * 8 in range(int(0.9 * SLOTS), SLOTS + 1)


def test_a_small_device_takes_fewer() -> None:
    assert splits_for(1, 4, 1, LONG, 4) == 2
    assert splits_for(1, 4, 1, LONG, 16) == 8
    assert splits_for(1, 1, 1, LONG, 0 + 1) == 2


def test_a_split_has_keys_enough() -> None:
    assert splits_for(1, 1, 1, 2 * FEWEST_SPLIT_KEYS - 1, SMS) == 1
    assert splits_for(1, 1, 1, 2 * FEWEST_SPLIT_KEYS, SMS) == 2
    assert splits_for(1, 1, 1, 5 * FEWEST_SPLIT_KEYS, SMS) == 5


def test_splits_have_a_limit() -> None:
    assert splits_for(1, 1, 1, FEWEST_SPLIT_KEYS * 2 * MAX_SPLITS, 10 * SMS) in range(
        MAX_SPLITS - 20, MAX_SPLITS + 1
    )


def test_one_long_sequence_does_not_hold_up_a_batch() -> None:
    assert splits_for(64, 8, 1, MOST_SPLIT_KEYS, SMS) == 1
    assert splits_for(64, 8, 1, MOST_SPLIT_KEYS + 1, SMS) == 2
    assert splits_for(64, 8, 1, 8 * MOST_SPLIT_KEYS, SMS) == 8
    assert (
        splits_for(64, 8, 2, 8 * MOST_SPLIT_KEYS, SMS) == 1
    )  # chunks of prompts: partial results would be large


def test_no_wave_is_left_nearly_empty() -> None:
    """Three quarters of the slots: two splits would leave a second wave half empty, so do four and none."""
    programs = SLOTS * 3 // 4
    chosen = splits_for(programs, 1, 1, LONG, SMS)
    waves = programs * chosen / SLOTS
    assert waves / -(-waves // 1) >= 0.9


@pytest.mark.parametrize(("batch", "capacity"), [(0, LONG), (1, 0), (0, 0)])
def test_nothing_is_one_split(batch: int, capacity: int) -> None:
    assert splits_for(batch, 4, 1, capacity, SMS) == 1


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
def test_a_window_is_all_there_is_to_split(
    options: dict[str, object], seen: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastattn.backends.triton import kv_cache as triton_kv_cache
    from fastattn.kernels import decode_tiles

    asked: list[tuple[int, ...]] = []
    monkeypatch.setattr(decode_tiles, "splits_for", lambda *sizes: asked.append(sizes) or 1)
    call = call_of()
    call = KVCacheCall(
        *(getattr(call, name) for name in ("query", "k_cache", "v_cache", "cache_lengths")), **options
    )
    triton_kv_cache._num_splits(spec_of(), call, Tile(16, 16, 4, 1))
    assert [sizes[3] for sizes in asked] == [seen]


def test_decoding_on_a_gpu_runs_on_triton() -> None:
    spec = spec_of()
    assert backends.select(spec, "auto", "kv_cache_fwd") is backend
    assert "decode 16x64" in str(backends.explanation({"kv_cache_fwd": spec}, "auto"))
    assert "chunk 128x" in str(backends.explanation({"kv_cache_fwd": spec_of(seqlen_q=9)}, "auto"))
