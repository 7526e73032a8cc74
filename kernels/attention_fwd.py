"""Attention forward: online softmax over key blocks."""

# mypy: allow-untyped-defs, allow-incomplete-defs

import triton.language as tl

from .jit import kernel
from .primitives import (
    INTEGERS,
    block_at,
    block_count,
    head_matrix,
    head_operand,
    head_rows,
    key_blocks,
    load_operand,
    load_seq_key_end,
    padded,
    store_tile,
    within_segments,
    zero_beyond,
)
from .scores import (
    dropout_keep,
    head_scoring,
    logits,
    softmax_lse,
    softmax_start,
    softmax_update,
)
from .sequences import program_tile


@kernel(INTEGERS)
def attention_fwd_kernel(
    q, k, v, out, lse, optional,
    stride_qb, stride_qh, stride_qs, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    stride_ob, stride_oh, stride_os,
    stride_mask_b, stride_mask_h, stride_mask_q, stride_mask_k,
    stride_bias_b, stride_bias_h, stride_bias_q, stride_bias_k, stride_slopes_b,
    num_heads, batch_size, seqlen_q, seqlen_k, shift, left, right, keep_threshold, scale, softcap, keep_scale,
    TMA: tl.constexpr, VARIANT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """out = dropout(softmax(logits)) @ v and lse = logsumexp(logits), over the keys each query sees.

    One program owns BLOCK_M queries of one head. It visits the key blocks its queries see: first those that all of
    them see whole, without masking, then those that are masked. A row without keys gives out 0 and lse -inf, or its
    sink. With TMA, q, k and v are descriptors.
    """
    lengths = (seqlen_q, seqlen_k, shift)
    packing = (optional.cu_seqlens_q, optional.cu_seqlens_k, batch_size)
    tile, head, sequence = program_tile(
        lengths, packing, num_heads, False, VARIANT.has_right, BLOCK_M, VARIANT
    )
    batch, query_base, key_base, num_queries, num_keys, shift = sequence
    if VARIANT.varlen:  # noqa: SIM102 - at compile time
        if tile < 0:
            return
    kv_head = head // VARIANT.group_size
    first_query = tile * BLOCK_M
    tile_query_end = tl.minimum(first_query + BLOCK_M, num_queries)
    seq_key_end = load_seq_key_end(optional.key_lengths, batch, num_keys, VARIANT)
    strides = (stride_qb, stride_qh, stride_qs)
    queries = head_operand(q, strides, batch, head, query_base, num_queries, TMA, VARIANT)
    strides = (stride_kb, stride_kh, stride_ks)
    keys = head_operand(k, strides, batch, kv_head, key_base, seq_key_end, TMA, VARIANT)
    strides = (stride_vb, stride_vh, stride_vs)
    values = head_operand(v, strides, batch, kv_head, key_base, seq_key_end, TMA, VARIANT)
    outs = head_matrix(out, (stride_ob, stride_oh, stride_os), batch, head, query_base, num_queries, VARIANT)
    score_strides = (
        stride_mask_b, stride_mask_h, stride_mask_q, stride_mask_k,
        stride_bias_b, stride_bias_h, stride_bias_q, stride_bias_k, stride_slopes_b,
    )  # fmt: skip
    positions = (num_queries, num_keys, shift, left, right)
    scoring = head_scoring(
        batch, head, seq_key_end, optional, score_strides, positions, scale, softcap, VARIANT
    )
    blocks = key_blocks(first_query, tile_query_end, seq_key_end, shift, left, right, VARIANT, BLOCK_N)
    blocks = within_segments(
        blocks, optional.segment_blocks, batch * tl.cdiv(seqlen_q, BLOCK_M) + tile, VARIANT
    )
    rows = first_query + tl.arange(0, BLOCK_M)

    query_tile = load_operand(queries, first_query, VARIANT.head_dim, BLOCK_M, True, TMA, VARIANT)
    row_max, row_sum = softmax_start(optional.sinks, batch, head, BLOCK_M, VARIANT)
    acc = tl.zeros([BLOCK_M, padded(VARIANT.value_dim)], tl.float32)
    for IS_MASKED in tl.static_range(2):
        for step in range(block_count(blocks, IS_MASKED)):
            first_key = block_at(step, blocks, IS_MASKED) * BLOCK_N
            cols = first_key + tl.arange(0, BLOCK_N)
            key_tile = load_operand(keys, first_key, VARIANT.head_dim, BLOCK_N, IS_MASKED, TMA, VARIANT)
            products = tl.dot(query_tile, tl.trans(key_tile), input_precision=VARIANT.dot_precision)
            scores, _ = logits(products, rows[:, None], cols[None, :], scoring, IS_MASKED, VARIANT)
            probs, rescale, row_max, row_sum = softmax_update(scores, row_max, row_sum, scale, VARIANT)
            if VARIANT.dropout:
                keep = dropout_keep(
                    optional.seed,
                    batch * num_heads + head,
                    first_query,
                    first_key,
                    keep_threshold,
                    BLOCK_M,
                    BLOCK_N,
                )
                probs = tl.where(keep, probs, 0.0)
            value_tile = load_operand(values, first_key, VARIANT.value_dim, BLOCK_N, IS_MASKED, TMA, VARIANT)
            value_tile = zero_beyond(value_tile, cols, seq_key_end, IS_MASKED, TMA, VARIANT)
            acc = acc * rescale[:, None]
            acc = tl.dot(probs.to(value_tile.dtype), value_tile, acc, input_precision=VARIANT.dot_precision)

    row_sum = tl.where(row_sum == 0.0, 1.0, row_sum)
    lse_rows = head_rows(lse, batch, head, num_heads, query_base, seqlen_q, VARIANT) + rows
    tl.store(lse_rows, softmax_lse(row_max, row_sum, VARIANT), mask=rows < num_queries)
    if VARIANT.dropout:
        acc *= keep_scale
    store_tile(outs, acc / row_sum[:, None], first_query, VARIANT.value_dim, BLOCK_M, VARIANT)
