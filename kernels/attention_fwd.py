"""Attention forward: online softmax over key blocks, in the log2 domain."""

# mypy: allow-untyped-defs, allow-incomplete-defs

import triton
import triton.language as tl

from .primitives import (
    block_at,
    block_count,
    head_base,
    key_blocks,
    keys_end,
    load_tile,
    logits,
    online_softmax_update,
    padded,
    program_coordinates,
    row_base,
    softmax_lse,
    store_tile,
    visible,
)

RUNTIME_INTEGERS = (
    *("query_stride_batch", "query_stride_head", "query_stride_row"),
    *("key_stride_batch", "key_stride_head", "key_stride_row"),
    *("value_stride_batch", "value_stride_head", "value_stride_row"),
    *("out_stride_batch", "out_stride_head", "out_stride_row"),
    *("num_heads", "seqlen_q", "seqlen_k", "shift", "left", "right"),
)


@triton.jit(do_not_specialize=RUNTIME_INTEGERS)
def attention_fwd_kernel(
    query,
    key,
    value,
    out,
    lse,
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
    out_stride_batch,
    out_stride_head,
    out_stride_row,
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
    """out = softmax(scale * q @ k.T) @ v and lse = logsumexp(scale * q @ k.T), over visible keys.

    One program owns BLOCK_M queries of one head. It visits the key blocks its queries see: first those that all of
    them see whole, without masking, then the edges. A row without keys gives out 0 and lse -inf.
    """
    tile, batch, head = program_coordinates(tl.cdiv(seqlen_q, BLOCK_M), num_heads, VARIANT.has_right)
    kv_head = head // VARIANT.group_size
    query_base = head_base(query, batch, head, query_stride_batch, query_stride_head, VARIANT.unit)
    key_base = head_base(key, batch, kv_head, key_stride_batch, key_stride_head, VARIANT.unit)
    value_base = head_base(value, batch, kv_head, value_stride_batch, value_stride_head, VARIANT.unit)
    out_base = head_base(out, batch, head, out_stride_batch, out_stride_head, VARIANT.unit)

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
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, padded(VARIANT.value_dim)], tl.float32)
    for EDGE in tl.static_range(2):
        for step in range(block_count(first, full_first, full_last, last, EDGE)):
            first_key = block_at(step, first, full_first, full_last, EDGE) * BLOCK_N
            key_tile = load_tile(
                key_base, first_key, key_end, key_stride_row, VARIANT.head_dim, BLOCK_N, EDGE, VARIANT
            )
            products = tl.dot(query_tile, tl.trans(key_tile), input_precision=VARIANT.dot_precision)
            scores = logits(products, scale, VARIANT)
            if EDGE:
                cols = first_key + tl.arange(0, BLOCK_N)
                inside = visible(rows[:, None], cols[None, :], key_end, shift, left, right, VARIANT)
                scores = tl.where(inside, scores, float("-inf"))
            probs, rescale, row_max, row_sum = online_softmax_update(
                scores, row_max, row_sum, scale, EDGE, VARIANT
            )
            value_tile = load_tile(
                value_base, first_key, key_end, value_stride_row, VARIANT.value_dim, BLOCK_N, EDGE, VARIANT
            )
            acc = acc * rescale[:, None]
            acc = tl.dot(probs.to(value_tile.dtype), value_tile, acc, input_precision=VARIANT.dot_precision)

    row_sum = tl.where(row_sum == 0.0, 1.0, row_sum)
    lse_rows = row_base(lse, batch, head, num_heads, seqlen_q) + rows
    tl.store(lse_rows, softmax_lse(row_max, row_sum, VARIANT), mask=rows < seqlen_q)
    acc = acc / row_sum[:, None]
    store_tile(out_base, acc, first_query, seqlen_q, out_stride_row, VARIANT.value_dim, BLOCK_M, VARIANT)
