"""Attention against a key/value cache: append, split attention over the cached keys, combine.

`CACHE` is the `CacheVariant` of decode_launches.py, `cached` its `CacheTensors`. A cache is a tuple (pointer to the
first element of this head, stride from page to page, from row to row and from column to column, this sequence's row of
the block table, length). Query heads that share a key head are rows of one tile: row r is query r // group_size of head
r % group_size.
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
    padded,
    program_coordinates,
)
from .scores import (
    LN2,
    LOG2E,
    logits,
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
    """Pointers to the first element of each of `keys`, in whichever page; undefined where `exists` is false."""
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
    """Rows of DIM columns whose first elements are at `starts`, the leading rotary_dim columns rotated to `positions`:
    x * cos + partner * sin, where the partner of the first column of a pair enters with its sign changed."""
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
def split_sizes(blocks, per_size, split_blocks):
    """(size, count): the blocks of the first splits of a range of key blocks, and how many splits there are, one at
    least. There are per_size splits of a size, then of twice the size ...; with 0 split_blocks, per_size equal ones."""
    num_blocks = blocks[3] - blocks[0]
    size = tl.where(split_blocks > 0, split_blocks, tl.maximum(tl.cdiv(num_blocks, per_size), 1))
    size_blocks = per_size * size
    reached = num_blocks // size_blocks + 1
    doublings = 0 * size
    for power in tl.static_range(1, 25):
        doublings += (reached >= (1 << power)).to(tl.int32)
    rest = num_blocks - size_blocks * ((1 << doublings) - 1)
    count = per_size * doublings + tl.cdiv(rest, size << doublings)
    return size, tl.maximum(count, 1)


@triton.jit
def split_of(blocks, split, per_size, size):
    """The key blocks of a split, of those that `split_sizes` has counted."""
    first, full_first, full_last, last = blocks
    doublings = split // per_size
    before = size * (per_size * ((1 << doublings) - 1) + ((split % per_size) << doublings))
    begin = tl.minimum(first + before, last)
    end = tl.minimum(begin + (size << doublings), last)
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


@triton.jit
def attend_split(
    query_tile, keys, values, cached, blocks, split, places, scoring, VARIANT: tl.constexpr, CACHE: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """(acc, row_max, row_sum) of online softmax over the key blocks of one split; the sink is the first split's."""
    queries = places[0]
    heads = places[1]
    batch = places[3]
    scale = scoring[0]
    row_max, row_sum = softmax_start(cached.sinks, batch + 0 * heads, heads, query_tile.shape[0], VARIANT)
    if VARIANT.sinks:
        row_max = tl.where(split == 0, row_max, float("-inf"))
        row_sum = tl.where(split == 0, row_sum, 0.0)
    acc = tl.zeros([query_tile.shape[0], padded(VARIANT.value_dim)], tl.float32)
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
    return acc, row_max, row_sum


@triton.jit
def store_split(result, out, strides, lse, split, places, VARIANT: tl.constexpr):
    """out[split] and lse[split] of the rows that exist."""
    acc, row_max, row_sum = result
    queries, heads, exists, batch, rows, num_rows = places
    tl.store(lse + split.to(tl.int64) * num_rows + rows, softmax_lse(row_max, row_sum, VARIANT), mask=exists)
    acc = acc / tl.where(row_sum == 0.0, 1.0, row_sum)[:, None]
    starts = packed_rows(out, strides, batch, heads, queries, VARIANT)
    starts += split.to(tl.int64) * num_rows * VARIANT.value_dim
    cols = tl.arange(0, padded(VARIANT.value_dim))[None, :]
    inside = exists[:, None] & (cols < VARIANT.value_dim)
    tl.store(starts[:, None] + cols, acc.to(out.dtype.element_ty), mask=inside)


@kernel((*INTEGERS, "num_programs", "per_size", "split_blocks"))
def attention_decode_kernel(
    q, k_cache, v_cache, out, lse, cached,
    stride_qb, stride_qh, stride_qs,
    stride_kb, stride_kh, stride_ks, stride_kd, stride_vb, stride_vh, stride_vs, stride_vd,
    stride_ob, stride_oh, stride_os, stride_table, stride_cos, stride_sin, stride_slopes_b,
    rotary_positions, num_heads, num_kv_heads, num_programs, per_size, split_blocks, num_rows, seqlen_q, new_keys,
    capacity, left, right, scale, softcap,
    VARIANT: tl.constexpr, CACHE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, LOOPS: tl.constexpr,
):  # fmt: skip
    """out[split] = softmax(logits) @ v and lse[split] = logsumexp(logits), over the split's share of the cached keys.

    num_programs programs own BLOCK_M rows of one key head, so a key is read once for all the heads that share it. Each
    takes every num_programs-th split of the key blocks that the rows see, or without LOOPS the one of its number; the
    last splits, the longest, start first. How many there are goes to cached.split_counts; others are not written.
    """
    tile, batch, head = program_coordinates(
        tl.cdiv(seqlen_q * VARIANT.group_size, BLOCK_M), num_kv_heads * num_programs, VARIANT.has_right
    )
    kv_head = head // num_programs
    program = num_programs - 1 - head % num_programs
    length = capacity
    if CACHE.lengths:
        length = tl.minimum(tl.load(cached.lengths + batch) + new_keys, capacity)
    shift = 0 * length if CACHE.top_left else length - seqlen_q
    packed = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    queries = packed // VARIANT.group_size
    heads = kv_head * VARIANT.group_size + packed % VARIANT.group_size
    exists = queries < seqlen_q
    first_query = tile * BLOCK_M // VARIANT.group_size
    tile_query_end = tl.minimum(tl.cdiv((tile + 1) * BLOCK_M, VARIANT.group_size), seqlen_q)
    blocks = key_blocks(first_query, tile_query_end, length, shift, left, right, VARIANT, BLOCK_N)
    size, count = split_sizes(blocks, per_size, split_blocks)
    rows = (batch.to(tl.int64) * num_heads + heads) * seqlen_q + queries
    if cached.split_counts is not None:
        counted = tl.where(program == 0, seqlen_q, 0)
        tl.store(cached.split_counts + rows, 0 * queries + count, mask=queries < counted)
    if program >= count:
        return

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

    places = (queries, heads, exists, batch, rows, num_rows)
    if LOOPS:
        # hoisted, the loops' invariants would stay in registers throughout
        for turn in tl.range(tl.cdiv(count - program, num_programs), disable_licm=True):
            split = program + turn * num_programs
            share = split_of(blocks, split, per_size, size)
            result = attend_split(
                query_tile, keys, values, cached, share, split, places, scoring, VARIANT, CACHE, BLOCK_N
            )
            store_split(result, out, (stride_ob, stride_oh, stride_os), lse, split, places, VARIANT)
    else:
        share = split_of(blocks, program, per_size, size)
        result = attend_split(
            query_tile, keys, values, cached, share, program, places, scoring, VARIANT, CACHE, BLOCK_N
        )
        store_split(result, out, (stride_ob, stride_oh, stride_os), lse, program, places, VARIANT)


@kernel(INTEGERS)
def attention_combine_kernel(
    split_out, split_lse, split_counts, out, lse, stride_ob, stride_oh, stride_os,
    num_heads, num_rows, seqlen_q, VALUE_DIM: tl.constexpr, BLOCK_SPLITS: tl.constexpr,
):  # fmt: skip
    """lse = logsumexp(split_lse) and out = sum(exp(split_lse - lse) * split_out), over a row's splits in order.

    One program owns one row: a query of one head. split_out is (splits, rows, Dv). The bits of a row with one split
    are that split's, its weight being exactly 1, as is that of an infinite sink.
    """
    row = tl.program_id(0)
    query, batch, head = program_coordinates(seqlen_q, num_heads, False)
    count = tl.load(split_counts + row)
    cols = tl.arange(0, padded(VALUE_DIM))
    row_max = tl.full([1], float("-inf"), tl.float32)
    row_sum = tl.zeros([1], tl.float32)
    acc = tl.zeros([padded(VALUE_DIM)], tl.float32)
    for first_split in range(0, count, BLOCK_SPLITS):
        splits = first_split + tl.arange(0, BLOCK_SPLITS)
        index = splits.to(tl.int64) * num_rows + row
        scores = tl.load(split_lse + index, mask=splits < count, other=float("-inf"))
        inside = (splits < count)[:, None] & (cols < VALUE_DIM)[None, :]
        tile = tl.load(split_out + index[:, None] * VALUE_DIM + cols[None, :], mask=inside, other=0.0)
        new_max = tl.maximum(row_max, tl.max(scores, 0))
        safe_max = tl.where(new_max == float("-inf"), 0.0, new_max)
        weights = tl.where(scores == safe_max, 1.0, tl.exp2((scores - safe_max) * LOG2E))
        rescale = tl.where(row_max == safe_max, 1.0, tl.exp2((row_max - safe_max) * LOG2E))
        acc = acc * rescale + tl.sum(weights[:, None] * tile, 0)
        row_sum = row_sum * rescale + tl.sum(weights, 0)
        row_max = new_max
    tl.store(lse + row + tl.arange(0, 1), row_max + tl.log2(row_sum) * LN2)
    start = batch.to(tl.int64) * stride_ob + head.to(tl.int64) * stride_oh + query.to(tl.int64) * stride_os
    acc = acc / tl.where(row_sum == 0.0, 1.0, row_sum)
    tl.store(out + start + cols, acc.to(out.dtype.element_ty), mask=cols < VALUE_DIM)
