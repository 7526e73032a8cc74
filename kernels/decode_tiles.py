"""Tiles and splits of attention against a cache: pure functions of the call's sizes and the device's.

A tile holds the query heads of one key head: few rows while decoding, where the pipeline of loads is what counts, many
while a prompt is read in chunks, where the forward kernel's tiles serve. Neither depends on the batch or on lengths.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

from fastattn.kernels.tiles import FAMILIES, Tile, key_of, tiles_without_tma
from fastattn.spec import AttentionSpec

APPEND_ROWS = 16  # new tokens a program of the append writes
COMBINE_SPLITS = 16  # splits a program of the combine reads at a time
DECODE_ROWS = (16, 32, 64)  # rows of query tiles smaller than the forward kernel's
WIDE_WARPS = 8  # of tiles with more rows than the first
# (family, bits, head dim): keys per block, warps and stages of the smallest tiles: two blocks of keys and of values
# in flight per program, and shared memory for two programs per multiprocessor.
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

PROGRAMS_PER_SM = 2
FILLED = 0.8  # of the device: with as many programs there is nothing to gain by splitting
WAVE_EFFICIENCY = 0.9  # of that of the best number of splits: a smaller number that reaches it is taken
MAX_SPLITS = 128
FEWEST_SPLIT_KEYS = 256  # less is not worth a combine
MOST_SPLIT_KEYS = 16384  # of one program while decoding, so that one long sequence does not delay a batch
SINGLE_QUERY_KEYS = (
    512  # of one program of a padded call with one query, whose splits may not depend on the batch
)


@lru_cache(maxsize=1024)
def decode_tile_for(spec: AttentionSpec, rows: int, paged: bool) -> Tile:
    """The tile for `rows` rows, queries times the heads that share a key head.

    In a paged cache, a load of the block table precedes the loads of keys: as many bytes in flight take twice the
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
def splits_for(batch: int, num_kv_heads: int, query_tiles: int, capacity: int, num_sms: int) -> int:
    """How many pieces to cut the keys of every sequence into.

    Args:
        capacity: keys a query tile may see; not how many there are now, which may change under a CUDA graph.
        num_sms: multiprocessors of the device.
    """
    programs, slots = batch * num_kv_heads * query_tiles, PROGRAMS_PER_SM * num_sms
    most = max(1, min(MAX_SPLITS, capacity // FEWEST_SPLIT_KEYS))
    least = min(most, -(-capacity // MOST_SPLIT_KEYS)) if query_tiles == 1 else 1
    if programs >= FILLED * slots or programs == 0:
        return max(1, least)
    efficiency = {splits: _efficiency(programs * splits, slots) for splits in range(max(1, least), most + 1)}
    wanted = WAVE_EFFICIENCY * max(efficiency.values())
    return next(splits for splits, reached in efficiency.items() if reached >= wanted)


def single_query_splits(keys: int) -> int:
    """The pieces that a padded call with one query cuts the keys it sees into, alone or in a batch."""
    return min(MAX_SPLITS, max(1, -(-keys // SINGLE_QUERY_KEYS)))


def _efficiency(programs: int, slots: int) -> float:
    """The share of the device's slots that programs of equal length keep busy until the last is done."""
    return programs / (slots * -(-programs // slots))
