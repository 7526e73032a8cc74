"""The attention weights, recomputed from lse, for `return_weights`."""

# mypy: allow-untyped-defs, allow-incomplete-defs

import triton.language as tl

from .jit import kernel
from .primitives import (
    INTEGERS,
    head_matrix,
    head_rows,
    key_blocks,
    load_rows,
    load_seq_key_end,
    load_tile,
    score_tile_coordinates,
)
from .scores import (
    dropout_keep,
    exponents,
    head_scoring,
    load_lse,
    logits,
)


@kernel(INTEGERS)
def attention_weights_kernel(
    q, k, lse, lse_correction, weights, optional,
    stride_qb, stride_qh, stride_qs, stride_kb, stride_kh, stride_ks,
    stride_mask_b, stride_mask_h, stride_mask_q, stride_mask_k,
    stride_bias_b, stride_bias_h, stride_bias_q, stride_bias_k, stride_slopes_b,
    num_heads, batch_size, seqlen_q, seqlen_k, shift, left, right, keep_threshold, scale, softcap, keep_scale,
    MEAN: tl.constexpr, VARIANT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """weights = dropout(lse_correction * exp(logits - lse)), (B, H, Sq, Sk), or their MEAN over heads; contiguous.

    One program owns a tile of one head, or of the mean, whose heads it adds up in their order.
    """
    row_tiles = tl.cdiv(seqlen_q, BLOCK_M)
    col_tiles = tl.cdiv(seqlen_k, BLOCK_N)
    row_tile, col_tile, matrix = score_tile_coordinates(row_tiles, col_tiles)
    first_key = col_tile * BLOCK_N
    first_query = row_tile * BLOCK_M
    heads = num_heads
    batch = matrix
    first_head = 0
    if not MEAN:
        heads = 1
        batch = matrix // num_heads
        first_head = matrix % num_heads
    seq_key_end = load_seq_key_end(optional.key_lengths, batch, seqlen_k, VARIANT)
    tile_query_end = tl.minimum(first_query + BLOCK_M, seqlen_q)
    score_strides = (
        stride_mask_b, stride_mask_h, stride_mask_q, stride_mask_k,
        stride_bias_b, stride_bias_h, stride_bias_q, stride_bias_k, stride_slopes_b,
    )  # fmt: skip
    positions = (seqlen_q, seqlen_k, shift, left, right)
    blocks = key_blocks(first_query, tile_query_end, seq_key_end, shift, left, right, VARIANT, BLOCK_N)
    seen = (first_key >= blocks[0] * BLOCK_N) & (first_key < blocks[3] * BLOCK_N)
    rows = first_query + tl.arange(0, BLOCK_M)
    cols = first_key + tl.arange(0, BLOCK_N)

    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for step in range(tl.where(seen, heads, 0)):
        head = first_head + step
        kv_head = head // VARIANT.group_size
        queries = head_matrix(q, (stride_qb, stride_qh, stride_qs), batch, head, 0, seqlen_q, VARIANT)
        keys = head_matrix(k, (stride_kb, stride_kh, stride_ks), batch, kv_head, 0, seq_key_end, VARIANT)
        scoring = head_scoring(
            batch, head, seq_key_end, optional, score_strides, positions, scale, softcap, VARIANT
        )
        query_tile = load_tile(queries, first_query, VARIANT.head_dim, BLOCK_M, True, VARIANT)
        key_tile = load_tile(keys, first_key, VARIANT.head_dim, BLOCK_N, True, VARIANT)
        products = tl.dot(query_tile, tl.trans(key_tile), input_precision=VARIANT.dot_precision)
        scores, _ = logits(products, rows[:, None], cols[None, :], scoring, True, VARIANT)
        lse_base = head_rows(lse, batch, head, num_heads, 0, seqlen_q, VARIANT)
        lse_rows = load_lse(lse_base, first_query, seqlen_q, BLOCK_M, True, VARIANT)
        probs = tl.exp2(exponents(scores, lse_rows[:, None], scale, VARIANT))
        probs = tl.where(scores == float("-inf"), 0.0, probs)  # also in a row whose lse is NaN
        if VARIANT.bias:
            correction_base = head_rows(lse_correction, batch, head, num_heads, 0, seqlen_q, VARIANT)
            probs *= load_rows(correction_base, first_query, seqlen_q, 1.0, BLOCK_M, True)[:, None]
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
            probs = tl.where(keep, probs * keep_scale, 0.0)
        total += probs

    if MEAN:
        total = total / num_heads
    offsets = (matrix.to(tl.int64) * seqlen_q + rows[:, None]) * seqlen_k + cols[None, :]
    inside = (rows < seqlen_q)[:, None] & (cols < seqlen_k)[None, :]
    tl.store(weights + offsets, total.to(weights.dtype.element_ty), mask=inside)
