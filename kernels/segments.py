"""The prepass of segments: which key tiles each query tile can meet, and the reverse, from the range of their ids."""

# mypy: allow-untyped-defs, allow-incomplete-defs

import triton
import triton.language as tl

from .jit import kernel
from .primitives import program_coordinates

NO_ID = tl.constexpr(2**31 - 1)


@triton.jit
def id_range(ids, index, length, AXIS: tl.constexpr):
    """(smallest non-negative id, largest id or -1, smallest id) of each tile; ids past the end are ignored."""
    exists = index < length
    values = tl.load(ids + index, mask=exists, other=-1)
    lowest = tl.min(tl.where(values >= 0, values, NO_ID), AXIS)
    highest = tl.maximum(tl.max(values, AXIS), -1)
    return lowest, highest, tl.min(tl.where(exists, values, NO_ID), AXIS)


@kernel(("seqlen", "other_seqlen"))
def segment_blocks_kernel(
    ids, other_ids, blocks, seqlen, other_seqlen,
    BLOCK: tl.constexpr, OTHER_BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """blocks[b, tile] = (first, full_first, full_last, last). [first, last) holds the blocks of the other side whose
    range of ids meets this tile's. [full_first, full_last) holds those with a single id, which is also the only id of
    this tile; it is empty where they are not contiguous.

    One program owns a tile of BLOCK ids of one sequence and reads the other side CHUNK blocks at a time.
    """
    num_tiles = tl.cdiv(seqlen, BLOCK)
    tile, batch, _ = program_coordinates(num_tiles, 1, False)
    ids += batch.to(tl.int64) * seqlen
    other_ids += batch.to(tl.int64) * other_seqlen
    lowest, highest, smallest = id_range(ids, tile * BLOCK + tl.arange(0, BLOCK), seqlen, 0)
    uniform = (smallest == highest) & (highest >= 0)

    first = seqlen * 0 + NO_ID
    full_first = first
    last = seqlen * 0
    full_last = last
    full_count = last
    other_tiles = tl.cdiv(other_seqlen, OTHER_BLOCK)
    for start in range(0, other_tiles, CHUNK):
        block = start + tl.arange(0, CHUNK)
        index = block[:, None] * OTHER_BLOCK + tl.arange(0, OTHER_BLOCK)[None, :]
        other_lowest, other_highest, other_smallest = id_range(other_ids, index, other_seqlen, 1)
        meets = tl.maximum(lowest, other_lowest) <= tl.minimum(highest, other_highest)
        full = uniform & (other_smallest == highest) & (other_highest == highest)
        first = tl.minimum(first, tl.min(tl.where(meets, block, NO_ID), 0))
        last = tl.maximum(last, tl.max(tl.where(meets, block + 1, 0), 0))
        full_first = tl.minimum(full_first, tl.min(tl.where(full, block, NO_ID), 0))
        full_last = tl.maximum(full_last, tl.max(tl.where(full, block + 1, 0), 0))
        full_count += tl.sum(full.to(tl.int32), 0)

    full_last = tl.where(full_last - full_first == full_count, full_last, 0)
    entry = blocks + tl.program_id(0).to(tl.int64) * 4
    tl.store(entry, first)
    tl.store(entry + 1, full_first)
    tl.store(entry + 2, full_last)
    tl.store(entry + 3, last)
