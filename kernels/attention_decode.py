"""Attention against a key/value cache: append, split attention over the cached keys, combine.

`CACHE` is the `CacheVariant` of decode_launches.py. A cache is a tuple (pointer to the first element of this head,
stride from page to page, from row to row and from column to column, this sequence's row of the block table, length).
Query heads that share a key head are rows of one tile: row r is query r // group_size of head r % group_size.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

import triton
import triton.language as tl

from .jit import kernel
from .primitives import (
    INTEGERS,
    block_at,
    block_count,
    key_blocks,
    load_tile,
    logits,
    padded,
    program_coordinates,
    softmax_lse,
    softmax_start,
    softmax_update,
)


@triton.jit
def packed_rows(pointer, strides, batch, heads, rows, VARIANT: tl.constexpr):
    """Pointers to the first element of each row of a tile: one row of one head each."""
    stride_batch, stride_head, stride_row = strides
    offsets = heads.to(tl.int64) * stride_head + rows.to(tl.int64) * stride_row
    return pointer + (batch.to(tl.int64) * stride_batch + offsets) * VARIANT.unit


@triton.jit
def head_cache(pointer, strides, table, batch, head, length, VARIANT: tl.constexpr, CACHE: tl.constexpr):
    """The cache of one head of one sequence, dense or in pages."""
    stride_block, stride_head, stride_row, stride_col = strides
    base = pointer + head.to(tl.int64) * stride_head * VARIANT.unit
    if not CACHE.page_size:
        base += batch.to(tl.int64) * stride_block * VARIANT.unit
    return base, stride_block, stride_row, stride_col, table, length


@triton.jit
def cache_rows(cache, keys, exists, VARIANT: tl.constexpr, CACHE: tl.constexpr):
    """Pointers to the first element of each of `keys`, wherever its page lies; meaningful where it exists."""
    base, stride_block, stride_row, _, table, _ = cache
    if CACHE.page_size:
        page = tl.load(table + keys // CACHE.page_size, mask=exists, other=0)
        starts = base + page.to(tl.int64) * stride_block * VARIANT.unit
        keys = keys % CACHE.page_size
    else:
        starts = base
    if VARIANT.int64_offsets:
        keys = keys.to(tl.int64)
    return starts + keys * stride_row * VARIANT.unit


@triton.jit
def cache_columns(cache, DIM: tl.constexpr, CACHE: tl.constexpr):
    """The offsets of a row's columns, [1, padded(DIM)]."""
    cols = tl.arange(0, padded(DIM))[None, :]
    if not CACHE.unit_columns:
        cols = cols.to(tl.int64) * cache[3]
    return cols


@triton.jit
def load_cached(
    cache,
    first_key,
    DIM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    CHECK_ROWS: tl.constexpr,
    VARIANT: tl.constexpr,
    CACHE: tl.constexpr,
):
    """Keys [first_key, first_key + BLOCK_ROWS) of a sequence; zeros past its length.

    A block within one page needs one load of the block table; others need one for each key.
    """
    base, stride_block, stride_row, _, table, length = cache
    if CACHE.page_size % BLOCK_ROWS == 0 and CACHE.unit_columns:
        first_row = first_key
        if CACHE.page_size:
            page = tl.load(table + first_key // CACHE.page_size)
            base += page.to(tl.int64) * stride_block * VARIANT.unit
            first_row = first_key % CACHE.page_size
        matrix = (base, stride_row, length - (first_key - first_row))
        tile = load_tile(matrix, first_row, DIM, BLOCK_ROWS, CHECK_ROWS, VARIANT)
    else:
        keys = first_key + tl.arange(0, BLOCK_ROWS)
        exists = keys < length
        pointers = cache_rows(cache, keys, exists, VARIANT, CACHE)[:, None] + cache_columns(cache, DIM, CACHE)
        inside = exists[:, None] & (tl.arange(0, padded(DIM))[None, :] < DIM)
        tile = tl.load(pointers, mask=inside, other=0.0)
    return tile


@triton.jit
def load_rotated(starts, exists, positions, rotary, DIM: tl.constexpr, CACHE: tl.constexpr):
    """Rows of DIM columns whose first elements are at `starts`, the leading rotary_dim columns turned to `positions`:
    each column times its cosine plus its partner, the first of a pair with the sign changed, times its sine."""
    cols = tl.arange(0, padded(DIM))[None, :]
    tile = tl.load(starts[:, None] + cols, mask=exists[:, None] & (cols < DIM), other=0.0)
    if CACHE.rotary_dim:
        cos, stride_cos, sin, stride_sin, rotary_positions = rotary
        if CACHE.rotary_interleaved:
            pair = cols // 2
            is_first = cols % 2 == 0
            partner = tl.where(is_first, cols + 1, cols - 1)
        else:
            half: tl.constexpr = CACHE.rotary_dim // 2
            pair = cols % half
            is_first = cols < half
            partner = tl.where(is_first, cols + half, cols - half)
        turned = exists[:, None] & (cols < CACHE.rotary_dim)
        known = turned & ((positions >= 0) & (positions < rotary_positions))[:, None]
        place = positions.to(tl.int64)[:, None]
        cosines = tl.load(cos + place * stride_cos + pair, mask=known, other=1.0).to(tl.float32)
        sines = tl.load(sin + place * stride_sin + pair, mask=known, other=0.0).to(tl.float32)
        others = tl.load(starts[:, None] + partner, mask=turned, other=0.0).to(tl.float32)
        rotated = tile.to(tl.float32) * cosines + tl.where(is_first, -others, others) * sines
        tile = tl.where(turned, rotated, tile.to(tl.float32)).to(tile.dtype)
    return tile


@triton.jit
def split_of(blocks, split, num_splits, split_blocks):
    """The split-th piece of a range of key blocks: split_blocks of them, or, where that is 0, one of num_splits equal
    shares, of which the last ones may be smaller."""
    first, full_first, full_last, last = blocks
    size = split_blocks
    if split_blocks == 0:
        size = tl.cdiv(last - first, num_splits)
    begin = tl.minimum(first + split * size, last)
    end = tl.minimum(begin + size, last)
    full_begin = tl.minimum(tl.maximum(full_first, begin), end)
    full_end = tl.maximum(tl.minimum(full_last, end), full_begin)
    return begin, full_begin, full_end, end


@kernel(INTEGERS)
def cache_append_kernel(
    key, value, k_cache, v_cache, cached,
    stride_new_kb, stride_new_kh, stride_new_ks, stride_new_vb, stride_new_vh, stride_new_vs,
    stride_kb, stride_kh, stride_ks, stride_kd, stride_vb, stride_vh, stride_vs, stride_vd,
    stride_table, stride_cos, stride_sin, rotary_positions, num_kv_heads, new_keys, capacity,
    VARIANT: tl.constexpr, CACHE: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    """k_cache[length + i] = rotate(key[i], length + i) and v_cache[length + i] = value[i].

    One program owns BLOCK_ROWS new tokens of one head of one sequence. What does not fit the cache is not written.
    """
    tile, batch, head = program_coordinates(tl.cdiv(new_keys, BLOCK_ROWS), num_kv_heads, False)
    tokens = tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    positions = tl.load(cached.lengths + batch) + tokens
    exists = (tokens < new_keys) & (positions >= 0) & (positions < capacity)
    table = 0
    if CACHE.page_size:
        table = cached.block_table + batch.to(tl.int64) * stride_table
    rotary = (cached.rotary_cos, stride_cos, cached.rotary_sin, stride_sin, rotary_positions)

    starts = packed_rows(key, (stride_new_kb, stride_new_kh, stride_new_ks), batch, head, tokens, VARIANT)
    keys = load_rotated(starts, exists, positions, rotary, VARIANT.head_dim, CACHE)
    strides = (stride_kb, stride_kh, stride_ks, stride_kd)
    cache = head_cache(k_cache, strides, table, batch, head, capacity, VARIANT, CACHE)
    inside = exists[:, None] & (tl.arange(0, padded(VARIANT.head_dim))[None, :] < VARIANT.head_dim)
    rows = cache_rows(cache, positions, exists, VARIANT, CACHE)
    tl.store(rows[:, None] + cache_columns(cache, VARIANT.head_dim, CACHE), keys, mask=inside)

    starts = packed_rows(value, (stride_new_vb, stride_new_vh, stride_new_vs), batch, head, tokens, VARIANT)
    cols = tl.arange(0, padded(VARIANT.value_dim))[None, :]
    inside = exists[:, None] & (cols < VARIANT.value_dim)
    values = tl.load(starts[:, None] + cols, mask=inside, other=0.0)
    strides = (stride_vb, stride_vh, stride_vs, stride_vd)
    cache = head_cache(v_cache, strides, table, batch, head, capacity, VARIANT, CACHE)
    rows = cache_rows(cache, positions, exists, VARIANT, CACHE)
    tl.store(rows[:, None] + cache_columns(cache, VARIANT.value_dim, CACHE), values, mask=inside)


@kernel(INTEGERS)
def attention_decode_kernel(
    q, k_cache, v_cache, out, lse, cached,
    stride_qb, stride_qh, stride_qs,
    stride_kb, stride_kh, stride_ks, stride_kd, stride_vb, stride_vh, stride_vs, stride_vd,
    stride_ob, stride_oh, stride_os, stride_table, stride_cos, stride_sin, stride_slopes_b,
    rotary_positions, num_heads, num_kv_heads, num_splits, split_blocks, num_rows, seqlen_q, new_keys, capacity,
    left, right, scale, softcap,
    VARIANT: tl.constexpr, CACHE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """out[split] = softmax(logits) @ v and lse[split] = logsumexp(logits), over the split's share of the cached keys.

    One program owns BLOCK_M rows of one key head and one of num_splits shares of the key blocks they see, so a key is
    read once for all the heads that share it. A share has split_blocks blocks, counted from the first one seen, so that
    a sequence's shares follow from its own keys; 0 cuts equal shares. An empty share leaves lse -inf and, but for the
    first, no out.
    """
    tile, batch, head = program_coordinates(
        tl.cdiv(seqlen_q * VARIANT.group_size, BLOCK_M), num_kv_heads * num_splits, VARIANT.has_right
    )
    kv_head = head // num_splits
    split = head % num_splits
    length = capacity
    if CACHE.lengths:
        length = tl.minimum(tl.load(cached.lengths + batch) + new_keys, capacity)
    shift = 0 * length if CACHE.top_left else length - seqlen_q
    packed = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    queries = packed // VARIANT.group_size
    heads = kv_head * VARIANT.group_size + packed % VARIANT.group_size
    exists = queries < seqlen_q
    first_query = tile * BLOCK_M // VARIANT.group_size
    end_query = tl.minimum(tl.cdiv((tile + 1) * BLOCK_M, VARIANT.group_size), seqlen_q)
    blocks = key_blocks(first_query, end_query, length, shift, left, right, VARIANT, BLOCK_N)
    blocks = split_of(blocks, split, num_splits, split_blocks)

    table = 0
    if CACHE.page_size:
        table = cached.block_table + batch.to(tl.int64) * stride_table
    strides = (stride_kb, stride_kh, stride_ks, stride_kd)
    keys = head_cache(k_cache, strides, table, batch, kv_head, length, VARIANT, CACHE)
    strides = (stride_vb, stride_vh, stride_vs, stride_vd)
    values = head_cache(v_cache, strides, table, batch, kv_head, length, VARIANT, CACHE)
    rotary = (cached.rotary_cos, stride_cos, cached.rotary_sin, stride_sin, rotary_positions)
    starts = packed_rows(q, (stride_qb, stride_qh, stride_qs), batch, heads, queries, VARIANT)
    query_tile = load_rotated(starts, exists, length - seqlen_q + queries, rotary, VARIANT.head_dim, CACHE)
    slope = 0.0
    if VARIANT.alibi:
        slope = tl.load(cached.slopes + batch * stride_slopes_b + heads, mask=exists, other=0.0)[:, None]
    nothing = (0, 0, 0)
    positions = (seqlen_q, length, shift, left, right)
    scoring = (scale, softcap, slope, nothing, nothing, (0, 0), positions)

    row_max, row_sum = softmax_start(cached.sinks, batch + 0 * heads, heads, BLOCK_M, VARIANT)
    acc = tl.zeros([BLOCK_M, padded(VARIANT.value_dim)], tl.float32)
    for IS_MASKED in tl.static_range(2):
        for step in range(block_count(blocks, IS_MASKED)):
            first_key = block_at(step, blocks, IS_MASKED) * BLOCK_N
            cols = first_key + tl.arange(0, BLOCK_N)
            key_tile = load_cached(keys, first_key, VARIANT.head_dim, BLOCK_N, IS_MASKED, VARIANT, CACHE)
            products = tl.dot(query_tile, tl.trans(key_tile), input_precision=VARIANT.dot_precision)
            scores, _ = logits(products, queries[:, None], cols[None, :], scoring, IS_MASKED, VARIANT)
            probs, rescale, row_max, row_sum = softmax_update(scores, row_max, row_sum, scale, VARIANT)
            value_tile = load_cached(values, first_key, VARIANT.value_dim, BLOCK_N, IS_MASKED, VARIANT, CACHE)
            acc = acc * rescale[:, None]
            acc = tl.dot(probs.to(value_tile.dtype), value_tile, acc, input_precision=VARIANT.dot_precision)

    rows = (batch.to(tl.int64) * num_heads + heads) * seqlen_q + queries
    tl.store(lse + split.to(tl.int64) * num_rows + rows, softmax_lse(row_max, row_sum, VARIANT), mask=exists)
    acc = acc / tl.where(row_sum == 0.0, 1.0, row_sum)[:, None]
    starts = packed_rows(out, (stride_ob, stride_oh, stride_os), batch, heads, queries, VARIANT)
    starts += split.to(tl.int64) * num_rows * VARIANT.value_dim
    cols = tl.arange(0, padded(VARIANT.value_dim))[None, :]
    needed = tl.where((split == 0) | (blocks[0] < blocks[3]), seqlen_q, 0)
    inside = (queries < needed)[:, None] & (cols < VARIANT.value_dim)
    tl.store(starts[:, None] + cols, acc.to(out.dtype.element_ty), mask=inside)


@kernel(INTEGERS)
def attention_combine_kernel(
    split_out, split_lse, out, lse, sinks, stride_ob, stride_oh, stride_os,
    num_heads, num_splits, num_rows, seqlen_q, VARIANT: tl.constexpr, BLOCK_SPLITS: tl.constexpr,
):  # fmt: skip
    """lse = logsumexp(split_lse, sink) and out = sum(exp(split_lse - lse) * split_out), over the splits in order.

    One program owns one row: a query of one head. split_out (splits, rows, Dv) is read where a split has keys.
    """
    row = tl.program_id(0)
    query = row % seqlen_q
    head = row // seqlen_q % num_heads
    batch = row // seqlen_q // num_heads
    cols = tl.arange(0, padded(VARIANT.value_dim))
    row_max, row_sum = softmax_start(sinks, batch, head, 1, VARIANT)
    acc = tl.zeros([padded(VARIANT.value_dim)], tl.float32)
    for first_split in range(0, num_splits, BLOCK_SPLITS):
        splits = first_split + tl.arange(0, BLOCK_SPLITS)
        index = splits.to(tl.int64) * num_rows + row
        scores = tl.load(split_lse + index, mask=splits < num_splits, other=float("-inf"))
        inside = (scores != float("-inf"))[:, None] & (cols < VARIANT.value_dim)[None, :]
        tile = tl.load(split_out + index[:, None] * VARIANT.value_dim + cols[None, :], mask=inside, other=0.0)
        scores = scores[None, :]
        probs, rescale, row_max, row_sum = softmax_update(scores, row_max, row_sum, 1.0, VARIANT)
        acc = acc * rescale + tl.sum(tl.trans(probs) * tile, 0)
    tl.store(lse + row + tl.arange(0, 1), softmax_lse(row_max, row_sum, VARIANT))
    start = batch.to(tl.int64) * stride_ob + head.to(tl.int64) * stride_oh + query.to(tl.int64) * stride_os
    acc = acc / tl.where(row_sum == 0.0, 1.0, row_sum)
    tl.store(out + start + cols, acc.to(out.dtype.element_ty), mask=cols < VARIANT.value_dim)
