"""Tiles and splits of attention against a cache: pure functions of the call's sizes and the device's.

A tile holds the query heads of one key head: few rows while decoding, where the pipeline of loads is what counts, many
while a prompt is read in chunks, where the forward kernel's tiles serve. Neither depends on the batch or on lengths.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

from fastattn.integers import cdiv
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

# Splits hold a fixed number of keys, so that the bits of a sequence's result follow from its own keys.
SPLIT_KEYS_PER_ROW = (
    32  # with as many, a partial result is 1/32 of the bytes of the 16-bit keys and values it is of
)
FEWEST_SPLIT_KEYS = 256  # of the first splits; less is not worth a combine
SPLITS_OF_A_SIZE = 16  # then they have twice the keys
WHOLE_TILES = 16  # query tiles of a key head that fill a device without splits
WORKSPACE_BYTES = 256 * 2**20  # of partial results at a time

# Programs share splits out among them, which changes no bit: their number follows from the device and the batch.
PROGRAMS_PER_SM = 2
WAVES = 8  # of programs, that splits of unlike lengths even out; empty ones take about 2 ns each
MOST_PROGRAM_KEYS = 16384  # of one program while decoding, so that one long sequence does not delay a batch


@lru_cache(maxsize=1024)
def decode_tile_for(spec: AttentionSpec, rows: int, paged: bool) -> Tile:
    """The tile for `rows` rows, queries times the heads that share a key head.

    In a paged cache a load of the block table precedes the loads of keys, so that twice the stages keep as many bytes
    in flight.
    """
    block_m = next((size for size in DECODE_ROWS if size >= rows), 0)
    if not block_m or (block_m > DECODE_ROWS[0] and spec.dtype.itemsize == 4):
        tile = replace(tiles_without_tma(spec).forward, max_registers=None)
    else:
        key = key_of(spec)
        block_n, num_warps, num_stages = DECODE_TABLE[key.family, key.bits, key.head_dim]
        tile = Tile(block_m, block_n, num_warps if block_m == DECODE_ROWS[0] else WIDE_WARPS, num_stages)
    return replace(tile, num_stages=2 * tile.num_stages - 1) if paged else tile


class Splits(NamedTuple):
    """How the key blocks that a query tile sees are cut: `per_size` splits of `blocks` blocks from the first on, as
    many of twice the blocks, and so on; with 0 blocks, `per_size` equal splits."""

    per_size: int = 1
    blocks: int = 0
    most: int = 1  # the most there can be: partial results have room for as many
    programs: int = 1  # that share them out: program p has splits p, p + programs ...


WHOLE = Splits()


def splits_for(rows: int, tile: Tile, blocks: int, num_splits: int = 0) -> Splits:
    """The splits of a call, for one program. Nothing but `most` depends on the batch, the cache or the device.

    Args:
        rows: queries times the heads that share a key head.
        blocks: the most key blocks that a query tile may see; not how many there are now, which may change under a
            CUDA graph.
        num_splits: equal splits that the caller asks for; 0 leaves it to the size.
    """
    if num_splits:  # more than there are blocks would be empty
        return Splits(max(1, min(num_splits, blocks)), most=max(1, min(num_splits, blocks)))
    if rows > (WHOLE_TILES - 1) * tile.block_m:
        return WHOLE
    rows = 1 << (min(rows, tile.block_m) - 1).bit_length() if rows else 1
    keys = max(FEWEST_SPLIT_KEYS, SPLIT_KEYS_PER_ROW * rows)
    splits = Splits(SPLITS_OF_A_SIZE, max(1, keys // tile.block_n))
    return splits._replace(most=max(1, split_count(blocks, splits)))


def split_count(blocks: int, splits: Splits) -> int:
    """How many splits that many key blocks fall into, as `split_sizes` of attention_decode.py counts them."""
    per_size = splits.per_size
    size = splits.blocks or max(1, cdiv(blocks, per_size))
    doublings = (blocks // (per_size * size) + 1).bit_length() - 1
    rest = blocks - per_size * size * ((1 << doublings) - 1)
    return per_size * doublings + cdiv(rest, size << doublings)


def loops(tile: Tile, full: bool) -> bool:
    """Whether a program loops over several splits: for small tiles in a cache that is not full, where many splits may
    be empty. Larger tiles have no registers to spare for the loop."""
    return tile.block_m < DECODE_ROWS[-1] and not full


@lru_cache(maxsize=1024)
def programs_for(several: bool, tiles: int, count: int, keys: int, num_sms: int) -> int:
    """How many programs divide the splits of a query tile among them.

    Args:
        several: a program may take more than one.
        tiles: query tiles of all heads and sequences.
        count: the most splits of a query tile.
        keys: the most keys that a query tile sees.
        num_sms: multiprocessors of the device.
    """
    if not several:
        return count
    wanted = WAVES * PROGRAMS_PER_SM * num_sms // max(1, tiles)
    return max(1, min(count, max(wanted, cdiv(keys, MOST_PROGRAM_KEYS))))
