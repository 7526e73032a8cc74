"""Tiles and splits of attention against a cache: pure functions of the call's spec and sizes.

A tile holds the query heads of one key head: few rows while decoding, where the pipeline of loads is what counts, many
while a prompt is read in chunks, where the forward kernel's tiles serve. Nothing depends on the batch or on lengths.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

from fastattn.kernels.tiles import FAMILIES, Tile, key_of, tiles_without_tma
from fastattn.spec import AttentionSpec

APPEND_ROWS = 16  # new tokens a program of the append writes
COMBINE_SPLITS = 16  # splits a program of the combine reads at a time
DECODE_ROWS = (16, 32, 64)  # rows of query tiles smaller than the forward kernel's
WIDE_WARPS = 8  # of tiles with more rows than the first
# (family, bits, head dim): keys per block, warps and stages of the smallest tiles: two blocks of keys and of values on
# their way per program, and shared memory for two programs per multiprocessor.
DECODE_TABLE = {
    **{(family, 16, 64): (64, 4, 4) for family in FAMILIES},
    **{(family, 16, 128): (64, 4, 3) for family in (80, 90, 100)},
    **{(family, 16, 256): (32, 4, 3) for family in (80, 90, 100)},
    **{(family, 16, 128): (32, 4, 3) for family in (86, 120)},
    **{(family, 16, 256): (16, 4, 3) for family in (86, 120)},
    **{(family, 32, 64): (32, 4, 2) for family in FAMILIES},
    **{(family, 32, 128): (32, 8, 2) for family in FAMILIES},
    **{(family, 32, 256): (16, 8, 2) for family in FAMILIES},
}

SPLIT_KEYS = {
    64: 512,
    128: 256,
    256: 256,
}  # by head dim: keys of one program that has SPLIT_ROWS rows at most
SPLIT_ROWS = (
    16  # with more, splits have as many times the keys, or their partial results would outweigh the keys
)


class KeySplits(NamedTuple):
    """How the keys of a sequence are divided among programs."""

    count: int  # of programs for a sequence with all the keys there is room for
    blocks: int = 0  # of keys that one takes; 0: an equal share of those of its sequence
    combine: bool = False  # also where there is one, so that more room for keys changes no bit


@lru_cache(maxsize=1024)
def decode_tile_for(spec: AttentionSpec, rows: int, paged: bool) -> Tile:
    """The tile for `rows` rows, queries times the heads that share a key head.

    In a paged cache, the block table is a load ahead of the loads of keys: as much on its way takes twice the
    stages.
    """
    block_m = next((size for size in DECODE_ROWS if size >= rows), 0)
    if not block_m or (block_m > DECODE_ROWS[0] and spec.dtype.itemsize == 4):
        tile = replace(tiles_without_tma(spec).forward, max_registers=None)
    else:
        key = key_of(spec)
        block_n, num_warps, num_stages = DECODE_TABLE[key.family, key.bits, key.head_dim]
        tile = Tile(block_m, block_n, num_warps if block_m == DECODE_ROWS[0] else WIDE_WARPS, num_stages)
    return replace(tile, num_stages=2 * tile.num_stages - 1) if paged else tile


@lru_cache(maxsize=1024)
def splits_for(spec: AttentionSpec, rows: int, keys: int, tile: Tile) -> KeySplits:
    """The splits of a call whose queries may see `keys` keys, however many there are now.

    A split holds a fixed number of keys, counted from the first that is seen: neither the batch nor the device nor the
    room in the cache decides where a sequence is cut, so none of them changes a bit of its result.

    Args:
        rows: queries times the heads that share a key head.
        keys: as for all the room in the cache; under a CUDA graph the number may change.
    """
    blocks = max(1, split_keys(spec, rows) // tile.block_n)
    seen = -(-keys // tile.block_n)
    if spec.window_left:
        seen += 1  # a window may begin within a block
    return KeySplits(max(1, -(-seen // blocks)), blocks, combine=spec.sinks)


def split_keys(spec: AttentionSpec, rows: int) -> int:
    """Keys of a split, by the class of the head dim and the rows of a sequence."""
    return SPLIT_KEYS[key_of(spec).head_dim] * -(-max(rows, 1) // SPLIT_ROWS)
