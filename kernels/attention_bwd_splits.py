"""dk and dv of few key/value heads, split over queries: which queries a split takes, and the sum of the splits.

A program of attention_dkdv_kernel owns a tile of keys and walks over all queries of the heads that share it. With one
or two key/value heads there are too few programs for a GPU, and the longest takes twice the mean where calls are
causal. A split is a fixed number of heads and of queries, so that its bits depend neither on the batch nor on the
device; the splits are added up in their order, in float32.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

import triton
import triton.language as tl

from .jit import kernel
from .primitives import padded, program_coordinates


@triton.jit
def within_split(
    blocks, split, SPLIT_HEADS: tl.constexpr, SPLIT_QUERIES: tl.constexpr, VARIANT: tl.constexpr, BLOCK_M: tl.constexpr
):  # fmt: skip
    """(first head, number of heads) of a split within its group, and the query blocks that it takes of each head."""
    HEAD_SPLITS: tl.constexpr = (VARIANT.group_size + SPLIT_HEADS - 1) // SPLIT_HEADS
    first_member = 0
    num_members = VARIANT.group_size
    if HEAD_SPLITS > 1:
        first_member = split % HEAD_SPLITS * SPLIT_HEADS
        num_members = SPLIT_HEADS
        if VARIANT.group_size % SPLIT_HEADS:
            num_members = tl.minimum(SPLIT_HEADS, VARIANT.group_size - first_member)
    first, full_first, full_last, last = blocks
    if SPLIT_QUERIES:
        begin = split // HEAD_SPLITS * (SPLIT_QUERIES // BLOCK_M)
        end = begin + SPLIT_QUERIES // BLOCK_M
        first = tl.minimum(tl.maximum(first, begin), end)
        full_first = tl.minimum(tl.maximum(full_first, begin), end)
        full_last = tl.minimum(tl.maximum(full_last, begin), end)
        last = tl.minimum(tl.maximum(last, begin), end)
    return first_member, num_members, (first, full_first, full_last, last)


@kernel(("stride_split", "stride_b", "stride_h", "stride_s", "num_splits", "num_kv_heads", "seqlen_k"))
def sum_splits_kernel(
    partials, out, stride_split, stride_b, stride_h, stride_s, num_splits, num_kv_heads, seqlen_k,
    DIM: tl.constexpr, ROW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out (B, Hkv, Sk, DIM) = the sum over splits of partials (splits, B, Hkv, Sk, ROW) float32, the first split first.

    One program owns BLOCK keys of one head. `out` may be the first of the partials.
    """
    tiles = tl.cdiv(seqlen_k, BLOCK)
    tile, batch, head = program_coordinates(tiles, num_kv_heads, False)
    rows = tile * BLOCK + tl.arange(0, BLOCK)[:, None]
    cols = tl.arange(0, padded(DIM))[None, :]
    exists = (rows < seqlen_k) & (cols < DIM)
    source = partials + ((batch * num_kv_heads + head).to(tl.int64) * seqlen_k + rows) * ROW + cols
    total = tl.zeros([BLOCK, padded(DIM)], tl.float32)
    for _ in range(num_splits):
        total += tl.load(source, mask=exists, other=0.0)
        source += stride_split
    offsets = batch.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h + rows.to(tl.int64) * stride_s
    tl.store(out + offsets + cols, total.to(out.dtype.element_ty), mask=exists)
