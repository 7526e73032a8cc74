"""Which tile of which sequence a program owns, padded or packed, and sums over the tiles of packed sequences.

Packed sequences lie one after another, sequence b from cu_seqlens[b] to cu_seqlens[b + 1]. A grid must not depend on
data on the device, so it has a slot for every tile there may be: the slots of sequence b begin at
cu_seqlens[b] // BLOCK + b, which leaves room for all its tiles and at most one slot without work per sequence. A ragged
batch costs a few programs that end at once, where a grid of B * cdiv(longest, BLOCK) would be mostly such programs.
Within a sequence the longest tiles come first; ordering sequences by length would take a sort before every launch.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

import triton
import triton.language as tl

from .jit import kernel
from .primitives import program_coordinates

SEARCH = tl.constexpr(256)  # entries of cu_seqlens that a program compares at a time


@triton.jit
def num_slots(num_tokens, batch_size, BLOCK: tl.constexpr):
    """Slots of all tiles, those of the tokens after the last sequence included."""
    return num_tokens // BLOCK + batch_size + 1


@triton.jit
def first_slot(start, sequence, BLOCK: tl.constexpr):
    """The first slot of a sequence that begins at token `start`."""
    return start // BLOCK + sequence


@triton.jit
def sequence_at(slot, cu_seqlens, batch_size, BLOCK: tl.constexpr):
    """The sequence whose slots hold `slot`; batch_size means the tokens after the last."""
    begun = slot * 0
    for first in range(0, batch_size + 1, SEARCH):
        sequences = first + tl.arange(0, SEARCH)
        exists = sequences <= batch_size
        starts = tl.load(cu_seqlens + sequences, mask=exists, other=0)
        begun += tl.sum((exists & (first_slot(starts, sequences, BLOCK) <= slot)).to(tl.int32), 0)
    return tl.maximum(begun - 1, 0)


@triton.jit
def token_range(cu_seqlens, sequence, batch_size, num_tokens):
    """(first, number) of a sequence's tokens. cu_seqlens cannot be checked without waiting for the device: whatever it
    holds, the range lies within the tensor."""
    first = tl.load(cu_seqlens + sequence)
    end = tl.load(cu_seqlens + sequence + 1, mask=sequence < batch_size, other=num_tokens)
    first = tl.minimum(tl.maximum(first, 0), num_tokens)
    return first, tl.minimum(tl.maximum(end, first), num_tokens) - first


@triton.jit
def program_tile(
    lengths, packing, num_heads, OF_KEYS: tl.constexpr, HEAVY_LAST: tl.constexpr, BLOCK: tl.constexpr,
    VARIANT: tl.constexpr,
):  # fmt: skip
    """(tile, head, sequence) of this program, sequence = (batch, first query, first key, number of queries, of keys,
    shift); firsts are rows of the packed tensors, 0 where none are packed. Tiles are of keys or of queries and run
    fastest, the longest first where work grows with the tile.

    lengths = (seqlen_q, seqlen_k, shift) of the tensors; of packed ones, shift is 1 where positions are aligned to
    each sequence's last key and 0 where to its first. tile is -1 in a slot without one. batch is -1 for the tokens
    after the last sequence, which have no counterparts to attend to.
    """
    seqlen_q, seqlen_k, shift = lengths
    if VARIANT.varlen:
        cu_seqlens_q, cu_seqlens_k, batch_size = packing
        cu_seqlens = cu_seqlens_q
        num_tokens = seqlen_q
        if OF_KEYS:
            cu_seqlens = cu_seqlens_k
            num_tokens = seqlen_k
        slots = num_slots(num_tokens, batch_size, BLOCK)
        slot, head, _ = program_coordinates(slots, 1, False)  # one row of slots holds all sequences
        batch = sequence_at(slot, cu_seqlens, batch_size, BLOCK)
        first_query, num_queries = token_range(cu_seqlens_q, batch, batch_size, seqlen_q)
        first_key, num_keys = token_range(cu_seqlens_k, batch, batch_size, seqlen_k)
        tile = slot - first_slot(tl.load(cu_seqlens + batch), batch, BLOCK)
        if OF_KEYS:
            num_tiles = tl.cdiv(num_keys, BLOCK)
            num_queries = tl.where(batch < batch_size, num_queries, 0)
        else:
            num_tiles = tl.cdiv(num_queries, BLOCK)
            num_keys = tl.where(batch < batch_size, num_keys, 0)
        has_tile = tile < num_tiles
        if HEAVY_LAST:
            tile = num_tiles - 1 - tile
        tile = tl.where(has_tile, tile, -1)
        batch = tl.where(batch < batch_size, batch, -1)
        sequence = (batch, first_query, first_key, num_queries, num_keys, shift * (num_keys - num_queries))
    else:
        num_tiles = tl.cdiv(seqlen_q, BLOCK)
        if OF_KEYS:
            num_tiles = tl.cdiv(seqlen_k, BLOCK)
        tile, batch, head = program_coordinates(num_tiles, num_heads, HEAVY_LAST)
        sequence = (batch, 0, 0, seqlen_q, seqlen_k, shift)
    return tile, head, sequence


@kernel(("batch_size", "num_heads", "num_tokens"))
def sequence_sums_kernel(
    tiles, cu_seqlens, sums, batch_size, num_heads, num_tokens, BLOCK: tl.constexpr, CHUNK: tl.constexpr
):  # fmt: skip
    """sums[b, h] = the sum of tiles (H, slots), one number per slot, over the tiles of sequence b; float64.

    One program owns one sequence of one head and adds CHUNK slots at a time, so that nothing depends on where in the
    batch a sequence stands.
    """
    _, sequence, head = program_coordinates(1, num_heads, False)
    slots = num_slots(num_tokens, batch_size, BLOCK)
    _, length = token_range(cu_seqlens, sequence, batch_size, num_tokens)
    begin = first_slot(tl.load(cu_seqlens + sequence), sequence, BLOCK)
    total = tl.zeros([CHUNK], tl.float64)
    for start in range(0, tl.cdiv(length, BLOCK), CHUNK):
        tile = start + tl.arange(0, CHUNK)
        exists = (tile < tl.cdiv(length, BLOCK)) & (begin + tile < slots)
        total += tl.load(tiles + head.to(tl.int64) * slots + begin + tile, mask=exists, other=0.0)
    tl.store(sums + tl.program_id(0), tl.sum(total, 0))
