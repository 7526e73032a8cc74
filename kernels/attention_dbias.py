"""The gradient of the bias, in a pass of its own."""

# mypy: allow-untyped-defs, allow-incomplete-defs

import triton.language as tl

from .attention_bwd_tiles import gradient_tile, weights_tile
from .jit import kernel
from .primitives import (
    INTEGERS,
    head_matrix,
    head_rows,
    key_blocks,
    load_rows,
    load_seq_key_end,
    load_tile,
    score_matrix,
    score_tile_coordinates,
)
from .scores import (
    head_scoring,
)


@kernel(INTEGERS)
def attention_dbias_kernel(
    q, k, v, dout, upstream, dbias, optional,
    stride_qb, stride_qh, stride_qs, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    stride_dob, stride_doh, stride_dos,
    stride_dweights_b, stride_dweights_h, stride_dweights_q, stride_dweights_k,
    stride_mask_b, stride_mask_h, stride_mask_q, stride_mask_k,
    stride_bias_b, stride_bias_h, stride_bias_q, stride_bias_k, stride_slopes_b,
    bias_batch, bias_heads, bias_rows, bias_cols,
    num_heads, batch_size, seqlen_q, seqlen_k, shift, left, right, keep_threshold, scale, softcap, keep_scale,
    VARIANT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dbias = dscores summed over the dimensions in which the bias is broadcast; dbias is contiguous.

    One program owns a tile of the bias's own shape, BLOCK_M rows (or its one row) by BLOCK_N columns (or its one
    column), and loops over what the bias is broadcast to, always in the same order, skipping tiles no query sees.
    """
    row_tiles = tl.cdiv(bias_rows, BLOCK_M)
    col_tiles = tl.cdiv(bias_cols, BLOCK_N)
    row_tile, col_tile, matrix = score_tile_coordinates(row_tiles, col_tiles)
    bias_head = matrix % bias_heads
    bias_sequence = matrix // bias_heads
    score_strides = (
        stride_mask_b, stride_mask_h, stride_mask_q, stride_mask_k,
        stride_bias_b, stride_bias_h, stride_bias_q, stride_bias_k, stride_slopes_b,
    )  # fmt: skip
    positions = (seqlen_q, seqlen_k, shift, left, right)
    query_tiles = 1
    key_tiles = 1
    if VARIANT.bias_one_row:
        query_tiles = tl.cdiv(seqlen_q, BLOCK_M)
    if VARIANT.bias_one_col:
        key_tiles = tl.cdiv(seqlen_k, BLOCK_N)
    repeats_b = batch_size // bias_batch
    repeats_h = num_heads // bias_heads

    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for step in range(repeats_b * repeats_h * query_tiles * key_tiles):
        first_key = (col_tile + step % key_tiles) * BLOCK_N
        first_query = (row_tile + step // key_tiles % query_tiles) * BLOCK_M
        head = bias_head + step // key_tiles // query_tiles % repeats_h
        batch = bias_sequence + step // key_tiles // query_tiles // repeats_h
        seq_key_end = load_seq_key_end(optional.key_lengths, batch, seqlen_k, VARIANT)
        tile_query_end = tl.minimum(first_query + BLOCK_M, seqlen_q)
        blocks = key_blocks(first_query, tile_query_end, seq_key_end, shift, left, right, VARIANT, BLOCK_N)
        if (first_key >= blocks[0] * BLOCK_N) & (first_key < blocks[3] * BLOCK_N):
            kv_head = head // VARIANT.group_size
            queries = head_matrix(q, (stride_qb, stride_qh, stride_qs), batch, head, 0, seqlen_q, VARIANT)
            keys = head_matrix(k, (stride_kb, stride_kh, stride_ks), batch, kv_head, 0, seq_key_end, VARIANT)
            scoring = head_scoring(
                batch, head, seq_key_end, optional, score_strides, positions, scale, softcap, VARIANT
            )
            dropout = (optional.seed, batch * num_heads + head, keep_threshold, keep_scale)
            dweights_strides = (stride_dweights_b, stride_dweights_h, stride_dweights_q, stride_dweights_k)
            head_dweights = score_matrix(upstream.dweights, dweights_strides, batch, head)
            query_tile = load_tile(queries, first_query, VARIANT.head_dim, BLOCK_M, True, VARIANT)
            key_tile = load_tile(keys, first_key, VARIANT.head_dim, BLOCK_N, True, VARIANT)
            reference_base = head_rows(upstream.reference, batch, head, num_heads, 0, seqlen_q, VARIANT)
            reference_rows = load_rows(reference_base, first_query, seqlen_q, float("inf"), BLOCK_M, True)
            correction_base = head_rows(upstream.lse_correction, batch, head, num_heads, 0, seqlen_q, VARIANT)
            correction_rows = load_rows(correction_base, first_query, seqlen_q, 1.0, BLOCK_M, True)
            dout_tile = query_tile
            value_tile = key_tile
            delta_rows = reference_rows
            if not VARIANT.dweights:
                values = head_matrix(
                    v, (stride_vb, stride_vh, stride_vs), batch, kv_head, 0, seq_key_end, VARIANT
                )
                douts = head_matrix(
                    dout, (stride_dob, stride_doh, stride_dos), batch, head, 0, seqlen_q, VARIANT
                )
                value_tile = load_tile(values, first_key, VARIANT.value_dim, BLOCK_N, True, VARIANT)
                dout_tile = load_tile(douts, first_query, VARIANT.value_dim, BLOCK_M, True, VARIANT)
                delta_base = head_rows(upstream.delta, batch, head, num_heads, 0, seqlen_q, VARIANT)
                delta_rows = load_rows(delta_base, first_query, seqlen_q, 0.0, BLOCK_M, True)
            probs, weights, capped = weights_tile(
                query_tile, key_tile, reference_rows, correction_rows, first_query, first_key, scoring, dropout,
                False, True, VARIANT, BLOCK_M, BLOCK_N,
            )  # fmt: skip
            dscores, _ = gradient_tile(
                probs, weights, capped, dout_tile, value_tile, delta_rows, first_query, first_key, scoring, dropout,
                head_dweights, False, VARIANT, BLOCK_M, BLOCK_N,
            )  # fmt: skip
            total += dscores

    rows = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = col_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    matrix = bias_sequence.to(tl.int64) * bias_heads + bias_head
    if VARIANT.bias_one_row:
        total = tl.sum(total, 0)[None, :]
        rows = tl.arange(0, 1)
    if VARIANT.bias_one_col:
        total = tl.sum(total, 1)[:, None]
        cols = tl.arange(0, 1)
    offsets = (matrix * bias_rows + rows[:, None]) * bias_cols + cols[None, :]
    inside = (rows < bias_rows)[:, None] & (cols < bias_cols)[None, :]
    tl.store(dbias + offsets, total.to(dbias.dtype.element_ty), mask=inside)
