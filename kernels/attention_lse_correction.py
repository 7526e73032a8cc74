"""The factor by which recomputed weights of a row sum to 1 where |lse| is too large for float32 to hold it finely."""

# mypy: allow-untyped-defs, allow-incomplete-defs

import triton.language as tl

from .jit import kernel
from .primitives import (
    INTEGERS,
    head_matrix,
    head_rows,
    key_blocks,
    load_seq_key_end,
    load_tile,
)
from .scores import (
    LOG2E,
    exponents,
    head_scoring,
    load_lse,
    logits,
)
from .sequences import program_tile

EXTREME_LSE = tl.constexpr(1e4)  # beyond it, too few digits are left for the logarithm of a sum


@kernel(INTEGERS)
def attention_lse_correction_kernel(
    q, k, lse, lse_correction, optional,
    stride_qb, stride_qh, stride_qs, stride_kb, stride_kh, stride_ks,
    stride_mask_b, stride_mask_h, stride_mask_q, stride_mask_k,
    stride_bias_b, stride_bias_h, stride_bias_q, stride_bias_k, stride_slopes_b,
    num_heads, batch_size, seqlen_q, seqlen_k, shift, left, right, scale, softcap,
    VARIANT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """lse_correction = 1 / sum(exp(logits - lse)) where |lse| is extreme, else 1. A row whose biases are all the least
    float32, for example, has lse equal to it for any number of keys.

    One program owns BLOCK_M queries of one head and looks at keys only if it has an extreme row.
    """
    lengths = (seqlen_q, seqlen_k, shift)
    tile, head, sequence = program_tile(lengths, (), num_heads, False, VARIANT.has_right, BLOCK_M, VARIANT)
    batch = sequence[0]
    kv_head = head // VARIANT.group_size
    first_query = tile * BLOCK_M
    tile_query_end = tl.minimum(first_query + BLOCK_M, seqlen_q)
    seq_key_end = load_seq_key_end(optional.key_lengths, batch, seqlen_k, VARIANT)
    queries = head_matrix(q, (stride_qb, stride_qh, stride_qs), batch, head, 0, seqlen_q, VARIANT)
    keys = head_matrix(k, (stride_kb, stride_kh, stride_ks), batch, kv_head, 0, seq_key_end, VARIANT)
    score_strides = (
        stride_mask_b, stride_mask_h, stride_mask_q, stride_mask_k,
        stride_bias_b, stride_bias_h, stride_bias_q, stride_bias_k, stride_slopes_b,
    )  # fmt: skip
    positions = (seqlen_q, seqlen_k, shift, left, right)
    scoring = head_scoring(
        batch, head, seq_key_end, optional, score_strides, positions, scale, softcap, VARIANT
    )
    blocks = key_blocks(first_query, tile_query_end, seq_key_end, shift, left, right, VARIANT, BLOCK_N)
    rows = first_query + tl.arange(0, BLOCK_M)

    lse_base = head_rows(lse, batch, head, num_heads, 0, seqlen_q, VARIANT)
    lse_rows = load_lse(lse_base, first_query, seqlen_q, BLOCK_M, True, VARIANT)
    extreme = (tl.abs(lse_rows) > EXTREME_LSE) & (tl.abs(lse_rows) < float("inf"))
    total = tl.zeros([BLOCK_M], tl.float32)
    if VARIANT.sinks:
        total += tl.exp2((tl.load(optional.sinks + head) - lse_rows) * LOG2E)
    query_tile = load_tile(queries, first_query, VARIANT.head_dim, BLOCK_M, True, VARIANT)
    any_extreme = tl.max(extreme.to(tl.int32), 0) > 0
    for step in range(tl.where(any_extreme, blocks[3] - blocks[0], 0)):
        first_key = (blocks[0] + step) * BLOCK_N
        cols = first_key + tl.arange(0, BLOCK_N)
        key_tile = load_tile(keys, first_key, VARIANT.head_dim, BLOCK_N, True, VARIANT)
        products = tl.dot(query_tile, tl.trans(key_tile), input_precision=VARIANT.dot_precision)
        scores, _ = logits(products, rows[:, None], cols[None, :], scoring, True, VARIANT)
        total += tl.sum(tl.exp2(exponents(scores, lse_rows[:, None], scale, VARIANT)), 1)
    factor = 1.0 / tl.where(extreme & (total > 0.0), total, 1.0)
    correction_rows = head_rows(lse_correction, batch, head, num_heads, 0, seqlen_q, VARIANT) + rows
    tl.store(correction_rows, factor, mask=rows < seqlen_q)
