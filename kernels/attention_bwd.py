"""Attention backward: a row-wise preparation, then one pass for dK and dV and one for dQ, all bitwise deterministic."""

# mypy: allow-untyped-defs, allow-incomplete-defs

import triton
import triton.language as tl

from .primitives import (
    block_at,
    block_count,
    exponents,
    head_base,
    key_blocks,
    keys_end,
    load_lse,
    load_tile,
    logits,
    padded,
    program_coordinates,
    query_blocks,
    row_base,
    store_tile,
    visible,
)

DELTA_INTEGERS = (
    *("out_stride_batch", "out_stride_head", "out_stride_row"),
    *("dout_stride_batch", "dout_stride_head", "dout_stride_row"),
    *("num_heads", "seqlen_q"),
)


@triton.jit(do_not_specialize=DELTA_INTEGERS)
def attention_delta_kernel(
    out,
    dout,
    lse,
    dlse,
    delta,
    out_stride_batch,
    out_stride_head,
    out_stride_row,
    dout_stride_batch,
    dout_stride_head,
    dout_stride_row,
    num_heads,
    seqlen_q,
    VARIANT: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """delta = rowsum(out * dout) - dlse, and 0 where lse is -inf: what dscore = probs * (dprobs - delta) subtracts.

    One program owns BLOCK_M queries of one head.
    """
    tile, batch, head = program_coordinates(tl.cdiv(seqlen_q, BLOCK_M), num_heads, False)
    out_base = head_base(out, batch, head, out_stride_batch, out_stride_head, VARIANT.unit)
    dout_base = head_base(dout, batch, head, dout_stride_batch, dout_stride_head, VARIANT.unit)
    first_query = tile * BLOCK_M
    rows = first_query + tl.arange(0, BLOCK_M)
    out_tile = load_tile(
        out_base, first_query, seqlen_q, out_stride_row, VARIANT.value_dim, BLOCK_M, True, VARIANT
    )
    dout_tile = load_tile(
        dout_base, first_query, seqlen_q, dout_stride_row, VARIANT.value_dim, BLOCK_M, True, VARIANT
    )
    result = tl.sum(out_tile.to(tl.float32) * dout_tile.to(tl.float32), 1)
    if dlse is not None:
        dlse_base = row_base(dlse, batch, head, num_heads, seqlen_q)
        result -= tl.load(dlse_base + rows, mask=rows < seqlen_q, other=0.0)
    lse_base = row_base(lse, batch, head, num_heads, seqlen_q)
    lse_rows = tl.load(lse_base + rows, mask=rows < seqlen_q, other=float("-inf"))
    result = tl.where(lse_rows == float("-inf"), 0.0, result)
    tl.store(row_base(delta, batch, head, num_heads, seqlen_q) + rows, result, mask=rows < seqlen_q)


DKDV_INTEGERS = (
    *("query_stride_batch", "query_stride_head", "query_stride_row"),
    *("key_stride_batch", "key_stride_head", "key_stride_row"),
    *("value_stride_batch", "value_stride_head", "value_stride_row"),
    *("dout_stride_batch", "dout_stride_head", "dout_stride_row"),
    *("dkey_stride_batch", "dkey_stride_head", "dkey_stride_row"),
    *("dvalue_stride_batch", "dvalue_stride_head", "dvalue_stride_row"),
    *("num_kv_heads", "seqlen_q", "seqlen_k", "shift", "left", "right"),
)


@triton.jit(do_not_specialize=DKDV_INTEGERS)
def attention_dkdv_kernel(
    query,
    key,
    value,
    dout,
    lse,
    delta,
    dkey,
    dvalue,
    key_lengths,
    query_stride_batch,
    query_stride_head,
    query_stride_row,
    key_stride_batch,
    key_stride_head,
    key_stride_row,
    value_stride_batch,
    value_stride_head,
    value_stride_row,
    dout_stride_batch,
    dout_stride_head,
    dout_stride_row,
    dkey_stride_batch,
    dkey_stride_head,
    dkey_stride_row,
    dvalue_stride_batch,
    dvalue_stride_head,
    dvalue_stride_row,
    num_kv_heads,
    seqlen_q,
    seqlen_k,
    shift,
    left,
    right,
    scale,
    VARIANT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dv = probs.T @ dout and dk = scale * dscores.T @ q, with dscores = probs * (dout @ v.T - delta).

    One program owns BLOCK_N keys of one key/value head and adds up the query heads it serves in their order. Tiles are
    keys by queries, so probs and dscores enter the products as they are. Keys that don't exist get their own garbage
    rows, which are replaced by zeros at the end.
    """
    tile, batch, kv_head = program_coordinates(tl.cdiv(seqlen_k, BLOCK_N), num_kv_heads, False)
    num_heads = num_kv_heads * VARIANT.group_size
    key_base = head_base(key, batch, kv_head, key_stride_batch, key_stride_head, VARIANT.unit)
    value_base = head_base(value, batch, kv_head, value_stride_batch, value_stride_head, VARIANT.unit)

    first_key = tile * BLOCK_N
    key_end = keys_end(key_lengths, batch, seqlen_k, VARIANT)
    end_key = tl.minimum(first_key + BLOCK_N, key_end)
    first, full_first, full_last, last = query_blocks(
        first_key, end_key, seqlen_q, shift, left, right, VARIANT, BLOCK_M
    )
    cols = first_key + tl.arange(0, BLOCK_N)
    key_tile = load_tile(
        key_base, first_key, key_end, key_stride_row, VARIANT.head_dim, BLOCK_N, True, VARIANT
    )
    value_tile = load_tile(
        value_base, first_key, key_end, value_stride_row, VARIANT.value_dim, BLOCK_N, True, VARIANT
    )
    dkey_tile = tl.zeros([BLOCK_N, padded(VARIANT.head_dim)], tl.float32)
    dvalue_tile = tl.zeros([BLOCK_N, padded(VARIANT.value_dim)], tl.float32)
    for member in range(VARIANT.group_size):
        head = kv_head * VARIANT.group_size + member
        query_base = head_base(query, batch, head, query_stride_batch, query_stride_head, VARIANT.unit)
        dout_base = head_base(dout, batch, head, dout_stride_batch, dout_stride_head, VARIANT.unit)
        lse_base = row_base(lse, batch, head, num_heads, seqlen_q)
        delta_base = row_base(delta, batch, head, num_heads, seqlen_q)
        for EDGE in tl.static_range(2):
            for step in range(block_count(first, full_first, full_last, last, EDGE)):
                first_query = block_at(step, first, full_first, full_last, EDGE) * BLOCK_M
                rows = first_query + tl.arange(0, BLOCK_M)
                query_tile = load_tile(
                    query_base,
                    first_query,
                    seqlen_q,
                    query_stride_row,
                    VARIANT.head_dim,
                    BLOCK_M,
                    EDGE,
                    VARIANT,
                )
                lse_rows = load_lse(lse_base, first_query, seqlen_q, BLOCK_M, VARIANT)
                products = tl.dot(key_tile, tl.trans(query_tile), input_precision=VARIANT.dot_precision)
                scores = logits(products, scale, VARIANT)
                probs = tl.exp2(exponents(scores, lse_rows[None, :], scale, VARIANT))
                if EDGE:
                    inside = visible(rows[None, :], cols[:, None], key_end, shift, left, right, VARIANT)
                    probs = tl.where(inside, probs, 0.0)
                dout_tile = load_tile(
                    dout_base,
                    first_query,
                    seqlen_q,
                    dout_stride_row,
                    VARIANT.value_dim,
                    BLOCK_M,
                    EDGE,
                    VARIANT,
                )
                dvalue_tile = tl.dot(
                    probs.to(dout_tile.dtype), dout_tile, dvalue_tile, input_precision=VARIANT.dot_precision
                )
                dprobs = tl.dot(value_tile, tl.trans(dout_tile), input_precision=VARIANT.dot_precision)
                delta_rows = tl.load(delta_base + rows, mask=rows < seqlen_q, other=0.0)
                dscores = probs * (dprobs - delta_rows[None, :])
                dkey_tile = tl.dot(
                    dscores.to(query_tile.dtype), query_tile, dkey_tile, input_precision=VARIANT.dot_precision
                )

    exists = (cols < key_end)[:, None]
    dkey_base = head_base(dkey, batch, kv_head, dkey_stride_batch, dkey_stride_head, VARIANT.unit)
    store_tile(
        dkey_base,
        tl.where(exists, dkey_tile * scale, 0.0),
        first_key,
        seqlen_k,
        dkey_stride_row,
        VARIANT.head_dim,
        BLOCK_N,
        VARIANT,
    )
    dvalue_base = head_base(dvalue, batch, kv_head, dvalue_stride_batch, dvalue_stride_head, VARIANT.unit)
    store_tile(
        dvalue_base,
        tl.where(exists, dvalue_tile, 0.0),
        first_key,
        seqlen_k,
        dvalue_stride_row,
        VARIANT.value_dim,
        BLOCK_N,
        VARIANT,
    )


DQ_INTEGERS = (
    *("query_stride_batch", "query_stride_head", "query_stride_row"),
    *("key_stride_batch", "key_stride_head", "key_stride_row"),
    *("value_stride_batch", "value_stride_head", "value_stride_row"),
    *("dout_stride_batch", "dout_stride_head", "dout_stride_row"),
    *("dquery_stride_batch", "dquery_stride_head", "dquery_stride_row"),
    *("num_heads", "seqlen_q", "seqlen_k", "shift", "left", "right"),
)


@triton.jit(do_not_specialize=DQ_INTEGERS)
def attention_dq_kernel(
    query,
    key,
    value,
    dout,
    lse,
    delta,
    dquery,
    key_lengths,
    query_stride_batch,
    query_stride_head,
    query_stride_row,
    key_stride_batch,
    key_stride_head,
    key_stride_row,
    value_stride_batch,
    value_stride_head,
    value_stride_row,
    dout_stride_batch,
    dout_stride_head,
    dout_stride_row,
    dquery_stride_batch,
    dquery_stride_head,
    dquery_stride_row,
    num_heads,
    seqlen_q,
    seqlen_k,
    shift,
    left,
    right,
    scale,
    VARIANT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dq = scale * dscores @ k. One program owns BLOCK_M queries of one head and visits the key blocks they see."""
    tile, batch, head = program_coordinates(tl.cdiv(seqlen_q, BLOCK_M), num_heads, VARIANT.has_right)
    kv_head = head // VARIANT.group_size
    query_base = head_base(query, batch, head, query_stride_batch, query_stride_head, VARIANT.unit)
    key_base = head_base(key, batch, kv_head, key_stride_batch, key_stride_head, VARIANT.unit)
    value_base = head_base(value, batch, kv_head, value_stride_batch, value_stride_head, VARIANT.unit)
    dout_base = head_base(dout, batch, head, dout_stride_batch, dout_stride_head, VARIANT.unit)

    first_query = tile * BLOCK_M
    end_query = tl.minimum(first_query + BLOCK_M, seqlen_q)
    key_end = keys_end(key_lengths, batch, seqlen_k, VARIANT)
    first, full_first, full_last, last = key_blocks(
        first_query, end_query, key_end, shift, left, right, VARIANT, BLOCK_N
    )
    rows = first_query + tl.arange(0, BLOCK_M)
    query_tile = load_tile(
        query_base, first_query, seqlen_q, query_stride_row, VARIANT.head_dim, BLOCK_M, True, VARIANT
    )
    dout_tile = load_tile(
        dout_base, first_query, seqlen_q, dout_stride_row, VARIANT.value_dim, BLOCK_M, True, VARIANT
    )
    lse_base = row_base(lse, batch, head, num_heads, seqlen_q)
    lse_rows = load_lse(lse_base, first_query, seqlen_q, BLOCK_M, VARIANT)
    delta_base = row_base(delta, batch, head, num_heads, seqlen_q)
    delta_rows = tl.load(delta_base + rows, mask=rows < seqlen_q, other=0.0)
    dquery_tile = tl.zeros([BLOCK_M, padded(VARIANT.head_dim)], tl.float32)
    for EDGE in tl.static_range(2):
        for step in range(block_count(first, full_first, full_last, last, EDGE)):
            first_key = block_at(step, first, full_first, full_last, EDGE) * BLOCK_N
            key_tile = load_tile(
                key_base, first_key, key_end, key_stride_row, VARIANT.head_dim, BLOCK_N, EDGE, VARIANT
            )
            products = tl.dot(query_tile, tl.trans(key_tile), input_precision=VARIANT.dot_precision)
            scores = logits(products, scale, VARIANT)
            probs = tl.exp2(exponents(scores, lse_rows[:, None], scale, VARIANT))
            if EDGE:
                cols = first_key + tl.arange(0, BLOCK_N)
                inside = visible(rows[:, None], cols[None, :], key_end, shift, left, right, VARIANT)
                probs = tl.where(inside, probs, 0.0)
            value_tile = load_tile(
                value_base, first_key, key_end, value_stride_row, VARIANT.value_dim, BLOCK_N, EDGE, VARIANT
            )
            dprobs = tl.dot(dout_tile, tl.trans(value_tile), input_precision=VARIANT.dot_precision)
            dscores = probs * (dprobs - delta_rows[:, None])
            dquery_tile = tl.dot(
                dscores.to(key_tile.dtype), key_tile, dquery_tile, input_precision=VARIANT.dot_precision
            )

    dquery_base = head_base(dquery, batch, head, dquery_stride_batch, dquery_stride_head, VARIANT.unit)
    store_tile(
        dquery_base,
        dquery_tile * scale,
        first_query,
        seqlen_q,
        dquery_stride_row,
        VARIANT.head_dim,
        BLOCK_M,
        VARIANT,
    )
