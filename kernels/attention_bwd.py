"""Attention backward: a row-wise preparation, then one pass for dK and dV and one for dQ, bitwise deterministic.

Every pass recomputes the weights from `reference`, which the preparation makes of lse, and with a bias from the
`lse_correction` of attention_lse_correction.py. The same passes are the backward of the weights themselves: `dweights`,
the gradients of the weights, then stand in place of dout @ v.T. With TMA, q, k, v and dout are descriptors. `optional`
and `upstream` are the tuples of tensors of arguments.py.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

import triton.language as tl

from .attention_bwd_splits import within_split
from .attention_bwd_tiles import gradient_tile, weights_tile
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
    load_rows,
    load_seq_key_end,
    load_tile,
    padded,
    query_blocks,
    score_matrix,
    store_tile,
    within_segments,
    zero_beyond,
)
from .scores import (
    distance,
    head_scoring,
    load_lse,
)
from .sequences import program_tile


@kernel(INTEGERS)
def attention_delta_kernel(
    out, dout, lse, dlse, delta, reference, stride_ob, stride_oh, stride_os, stride_dob, stride_doh, stride_dos,
    num_heads, seqlen_q, VARIANT: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """delta = rowsum(out * dout) - dlse, 0 where lse is -inf, for dscore = probs * (dprobs - delta); and reference, lse
    as `load_lse` returns it, for the exponents of the passes. Without `out`, reference alone.

    One program owns BLOCK_M queries of one head.
    """
    lengths = (seqlen_q, seqlen_q, 0)
    tile, head, sequence = program_tile(lengths, (), num_heads, False, False, BLOCK_M, VARIANT)
    batch, _, _, _, _, _ = sequence
    first_query = tile * BLOCK_M
    rows = first_query + tl.arange(0, BLOCK_M)
    lse_base = head_rows(lse, batch, head, num_heads, 0, seqlen_q, VARIANT)
    lse_rows = load_lse(lse_base, first_query, seqlen_q, BLOCK_M, True, VARIANT)
    reference_rows = head_rows(reference, batch, head, num_heads, 0, seqlen_q, VARIANT) + rows
    tl.store(reference_rows, lse_rows, mask=rows < seqlen_q)
    if out is not None:
        outs = head_matrix(out, (stride_ob, stride_oh, stride_os), batch, head, 0, seqlen_q, VARIANT)
        douts = head_matrix(dout, (stride_dob, stride_doh, stride_dos), batch, head, 0, seqlen_q, VARIANT)
        out_tile = load_tile(outs, first_query, VARIANT.value_dim, BLOCK_M, True, VARIANT)
        dout_tile = load_tile(douts, first_query, VARIANT.value_dim, BLOCK_M, True, VARIANT)
        result = tl.sum(out_tile.to(tl.float32) * dout_tile.to(tl.float32), 1)
        if dlse is not None:
            dlse_rows = head_rows(dlse, batch, head, num_heads, 0, seqlen_q, VARIANT) + rows
            result -= tl.load(dlse_rows, mask=rows < seqlen_q, other=0.0)
        has_key = tl.load(lse_base + rows, mask=rows < seqlen_q, other=0.0) != float("-inf")
        delta_rows = head_rows(delta, batch, head, num_heads, 0, seqlen_q, VARIANT) + rows
        tl.store(delta_rows, tl.where(has_key, result, 0.0), mask=rows < seqlen_q)


@kernel(INTEGERS)
def attention_dkdv_kernel(
    q, k, v, dout, upstream, dk, dv, optional,
    stride_qb, stride_qh, stride_qs, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    stride_dob, stride_doh, stride_dos, stride_dkb, stride_dkh, stride_dks, stride_dvb, stride_dvh, stride_dvs,
    stride_dweights_b, stride_dweights_h, stride_dweights_q, stride_dweights_k,
    stride_mask_b, stride_mask_h, stride_mask_q, stride_mask_k,
    stride_bias_b, stride_bias_h, stride_bias_q, stride_bias_k, stride_slopes_b,
    num_heads, batch_size, seqlen_q, seqlen_k, shift, left, right, keep_threshold, scale, softcap, keep_scale,
    first_split, stride_split_dk, stride_split_dv, SPLIT_HEADS: tl.constexpr, SPLIT_QUERIES: tl.constexpr,
    TMA: tl.constexpr, VARIANT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dv = weights.T @ dout and dk = scale * dproducts.T @ q; without dv where the weights' gradients are given.

    One program owns BLOCK_N keys of one key/value head and adds up the query heads it serves in their order. Tiles are
    keys by queries, so weights and gradients enter the products without a transpose. Rows of keys past the end hold
    arbitrary values until zeros replace them at the end.

    With SPLIT_HEADS, program_id(1) counts splits from first_split on. A split is SPLIT_HEADS query heads and
    SPLIT_QUERIES of their queries, a multiple of BLOCK_M, or all queries where it is 0. dk and dv then hold a float32
    sum per split, stride_split_* elements apart, which attention_bwd_splits.py adds up.
    """
    num_kv_heads = num_heads // VARIANT.group_size
    lengths = (seqlen_q, seqlen_k, shift)
    packing = (optional.cu_seqlens_q, optional.cu_seqlens_k, batch_size)
    tile, kv_head, sequence = program_tile(lengths, packing, num_kv_heads, True, False, BLOCK_N, VARIANT)
    batch, query_base, key_base, num_queries, num_keys, shift = sequence
    if VARIANT.varlen:  # noqa: SIM102 - at compile time
        if tile < 0:
            return
    first_key = tile * BLOCK_N
    seq_key_end = load_seq_key_end(optional.key_lengths, batch, num_keys, VARIANT)
    tile_key_end = tl.minimum(first_key + BLOCK_N, seq_key_end)
    keys = head_operand(
        k, (stride_kb, stride_kh, stride_ks), batch, kv_head, key_base, seq_key_end, TMA, VARIANT
    )
    score_strides = (
        stride_mask_b, stride_mask_h, stride_mask_q, stride_mask_k,
        stride_bias_b, stride_bias_h, stride_bias_q, stride_bias_k, stride_slopes_b,
    )  # fmt: skip
    positions = (num_queries, num_keys, shift, left, right)
    blocks = query_blocks(first_key, tile_key_end, num_queries, shift, left, right, VARIANT, BLOCK_M)
    blocks = within_segments(
        blocks, optional.segment_blocks, batch * tl.cdiv(seqlen_k, BLOCK_N) + tile, VARIANT
    )
    first_member = 0
    num_members = VARIANT.group_size
    if SPLIT_HEADS:
        first_member, num_members, blocks = within_split(
            blocks, first_split + tl.program_id(1), SPLIT_HEADS, SPLIT_QUERIES, VARIANT, BLOCK_M
        )

    key_tile = load_operand(keys, first_key, VARIANT.head_dim, BLOCK_N, True, TMA, VARIANT)
    value_tile = key_tile
    if not VARIANT.dweights:
        values = head_operand(
            v, (stride_vb, stride_vh, stride_vs), batch, kv_head, key_base, seq_key_end, TMA, VARIANT
        )
        value_tile = load_operand(values, first_key, VARIANT.value_dim, BLOCK_N, True, TMA, VARIANT)
    dk_tile = tl.zeros([BLOCK_N, padded(VARIANT.head_dim)], tl.float32)
    dv_tile = tl.zeros([BLOCK_N, padded(VARIANT.value_dim)], tl.float32)
    for member in range(num_members):
        head = kv_head * VARIANT.group_size + first_member + member
        queries = head_operand(
            q, (stride_qb, stride_qh, stride_qs), batch, head, query_base, num_queries, TMA, VARIANT
        )
        reference_base = head_rows(upstream.reference, batch, head, num_heads, query_base, seqlen_q, VARIANT)
        scoring = head_scoring(
            batch, head, seq_key_end, optional, score_strides, positions, scale, softcap, VARIANT
        )
        dropout = (optional.seed, batch * num_heads + head, keep_threshold, keep_scale)
        dweights_strides = (stride_dweights_b, stride_dweights_h, stride_dweights_q, stride_dweights_k)
        head_dweights = score_matrix(upstream.dweights, dweights_strides, batch, head)
        for IS_MASKED in tl.static_range(2):
            for step in range(block_count(blocks, IS_MASKED)):
                first_query = block_at(step, blocks, IS_MASKED) * BLOCK_M
                rows = first_query + tl.arange(0, BLOCK_M)
                query_tile = load_operand(
                    queries, first_query, VARIANT.head_dim, BLOCK_M, IS_MASKED, TMA, VARIANT
                )
                query_tile = zero_beyond(query_tile, rows, num_queries, IS_MASKED, TMA, VARIANT)
                reference_rows = load_rows(
                    reference_base, first_query, num_queries, float("inf"), BLOCK_M, IS_MASKED
                )
                correction_rows = reference_rows
                if VARIANT.bias:
                    correction_base = head_rows(
                        upstream.lse_correction, batch, head, num_heads, query_base, seqlen_q, VARIANT
                    )
                    correction_rows = load_rows(
                        correction_base, first_query, num_queries, 1.0, BLOCK_M, IS_MASKED
                    )
                delta_rows = reference_rows
                dout_tile = query_tile
                if not VARIANT.dweights:
                    strides = (stride_dob, stride_doh, stride_dos)
                    douts = head_operand(dout, strides, batch, head, query_base, num_queries, TMA, VARIANT)
                    dout_tile = load_operand(
                        douts, first_query, VARIANT.value_dim, BLOCK_M, IS_MASKED, TMA, VARIANT
                    )
                    dout_tile = zero_beyond(dout_tile, rows, num_queries, IS_MASKED, TMA, VARIANT)
                    delta_base = head_rows(
                        upstream.delta, batch, head, num_heads, query_base, seqlen_q, VARIANT
                    )
                    delta_rows = load_rows(delta_base, first_query, num_queries, 0.0, BLOCK_M, IS_MASKED)
                probs, weights, capped = weights_tile(
                    query_tile, key_tile, reference_rows, correction_rows, first_query, first_key, scoring, dropout,
                    True, IS_MASKED, VARIANT, BLOCK_M, BLOCK_N,
                )  # fmt: skip
                if not VARIANT.dweights:
                    factor = weights.to(dout_tile.dtype)
                    dv_tile = tl.dot(factor, dout_tile, dv_tile, input_precision=VARIANT.dot_precision)
                _, dproducts = gradient_tile(
                    probs, weights, capped, dout_tile, value_tile, delta_rows, first_query, first_key, scoring, dropout,
                    head_dweights, True, VARIANT, BLOCK_M, BLOCK_N,
                )  # fmt: skip
                dproducts = dproducts.to(query_tile.dtype)
                dk_tile = tl.dot(dproducts, query_tile, dk_tile, input_precision=VARIANT.dot_precision)

    if SPLIT_HEADS:
        dk += tl.program_id(1).to(tl.int64) * stride_split_dk
        dv += tl.program_id(1).to(tl.int64) * stride_split_dv
    exists = (first_key + tl.arange(0, BLOCK_N) < seq_key_end)[:, None]
    dks = head_matrix(dk, (stride_dkb, stride_dkh, stride_dks), batch, kv_head, key_base, num_keys, VARIANT)
    store_tile(dks, tl.where(exists, dk_tile * scale, 0.0), first_key, VARIANT.head_dim, BLOCK_N, VARIANT)
    if not VARIANT.dweights:
        dvs = head_matrix(
            dv, (stride_dvb, stride_dvh, stride_dvs), batch, kv_head, key_base, num_keys, VARIANT
        )
        if VARIANT.dropout:
            dv_tile *= keep_scale
        store_tile(dvs, tl.where(exists, dv_tile, 0.0), first_key, VARIANT.value_dim, BLOCK_N, VARIANT)


@kernel(INTEGERS)
def attention_dq_kernel(
    q, k, v, dout, upstream, dq, dslope_tiles, dlse, optional,
    stride_qb, stride_qh, stride_qs, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    stride_dob, stride_doh, stride_dos, stride_dqb, stride_dqh, stride_dqs,
    stride_dweights_b, stride_dweights_h, stride_dweights_q, stride_dweights_k,
    stride_mask_b, stride_mask_h, stride_mask_q, stride_mask_k,
    stride_bias_b, stride_bias_h, stride_bias_q, stride_bias_k, stride_slopes_b,
    num_heads, batch_size, seqlen_q, seqlen_k, shift, left, right, keep_threshold, scale, softcap, keep_scale,
    TMA: tl.constexpr, VARIANT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dq = scale * dproducts @ k, and the other sums over keys: the slope's gradient -sum(dscores * distance), one
    number per program in dslope_tiles, and dlse = -rowsum(dscores) with `dweights`.

    One program owns BLOCK_M queries of one head and visits the key blocks they see.
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
    queries = head_operand(
        q, (stride_qb, stride_qh, stride_qs), batch, head, query_base, num_queries, TMA, VARIANT
    )
    keys = head_operand(
        k, (stride_kb, stride_kh, stride_ks), batch, kv_head, key_base, seq_key_end, TMA, VARIANT
    )
    values = head_operand(
        v, (stride_vb, stride_vh, stride_vs), batch, kv_head, key_base, seq_key_end, TMA, VARIANT
    )
    score_strides = (
        stride_mask_b, stride_mask_h, stride_mask_q, stride_mask_k,
        stride_bias_b, stride_bias_h, stride_bias_q, stride_bias_k, stride_slopes_b,
    )  # fmt: skip
    positions = (num_queries, num_keys, shift, left, right)
    scoring = head_scoring(
        batch, head, seq_key_end, optional, score_strides, positions, scale, softcap, VARIANT
    )
    dropout = (optional.seed, batch * num_heads + head, keep_threshold, keep_scale)
    dweights_strides = (stride_dweights_b, stride_dweights_h, stride_dweights_q, stride_dweights_k)
    head_dweights = score_matrix(upstream.dweights, dweights_strides, batch, head)
    blocks = key_blocks(first_query, tile_query_end, seq_key_end, shift, left, right, VARIANT, BLOCK_N)
    blocks = within_segments(
        blocks, optional.segment_blocks, batch * tl.cdiv(seqlen_q, BLOCK_M) + tile, VARIANT
    )
    rows = first_query + tl.arange(0, BLOCK_M)

    query_tile = load_operand(queries, first_query, VARIANT.head_dim, BLOCK_M, True, TMA, VARIANT)
    reference_base = head_rows(upstream.reference, batch, head, num_heads, query_base, seqlen_q, VARIANT)
    reference_rows = load_rows(reference_base, first_query, num_queries, float("inf"), BLOCK_M, True)
    correction_rows = reference_rows
    if VARIANT.bias:
        correction_base = head_rows(
            upstream.lse_correction, batch, head, num_heads, query_base, seqlen_q, VARIANT
        )
        correction_rows = load_rows(correction_base, first_query, num_queries, 1.0, BLOCK_M, True)
    dout_tile = query_tile
    delta_rows = reference_rows
    if not VARIANT.dweights:
        strides = (stride_dob, stride_doh, stride_dos)
        douts = head_operand(dout, strides, batch, head, query_base, num_queries, TMA, VARIANT)
        dout_tile = load_operand(douts, first_query, VARIANT.value_dim, BLOCK_M, True, TMA, VARIANT)
        delta_base = head_rows(upstream.delta, batch, head, num_heads, query_base, seqlen_q, VARIANT)
        delta_rows = load_rows(delta_base, first_query, num_queries, 0.0, BLOCK_M, True)
    dq_tile = tl.zeros([BLOCK_M, padded(VARIANT.head_dim)], tl.float32)
    dslope = tl.zeros([BLOCK_M], tl.float32)
    dlse_rows = tl.zeros([BLOCK_M], tl.float32)
    for IS_MASKED in tl.static_range(2):
        for step in range(block_count(blocks, IS_MASKED)):
            first_key = block_at(step, blocks, IS_MASKED) * BLOCK_N
            cols = first_key + tl.arange(0, BLOCK_N)
            key_tile = load_operand(keys, first_key, VARIANT.head_dim, BLOCK_N, IS_MASKED, TMA, VARIANT)
            key_tile = zero_beyond(key_tile, cols, seq_key_end, IS_MASKED, TMA, VARIANT)
            value_tile = key_tile
            if not VARIANT.dweights:
                value_tile = load_operand(
                    values, first_key, VARIANT.value_dim, BLOCK_N, IS_MASKED, TMA, VARIANT
                )
                value_tile = zero_beyond(value_tile, cols, seq_key_end, IS_MASKED, TMA, VARIANT)
            probs, weights, capped = weights_tile(
                query_tile, key_tile, reference_rows, correction_rows, first_query, first_key, scoring, dropout,
                False, IS_MASKED, VARIANT, BLOCK_M, BLOCK_N,
            )  # fmt: skip
            dscores, dproducts = gradient_tile(
                probs, weights, capped, dout_tile, value_tile, delta_rows, first_query, first_key, scoring, dropout,
                head_dweights, False, VARIANT, BLOCK_M, BLOCK_N,
            )  # fmt: skip
            if VARIANT.alibi_grad:
                dslope -= tl.sum(dscores * distance(rows[:, None], cols[None, :], shift), 1)
            if VARIANT.dweights:
                dlse_rows -= tl.sum(dscores, 1)
            dproducts = dproducts.to(key_tile.dtype)
            dq_tile = tl.dot(dproducts, key_tile, dq_tile, input_precision=VARIANT.dot_precision)

    dqs = head_matrix(dq, (stride_dqb, stride_dqh, stride_dqs), batch, head, query_base, num_queries, VARIANT)
    store_tile(dqs, dq_tile * scale, first_query, VARIANT.head_dim, BLOCK_M, VARIANT)
    if VARIANT.alibi_grad:
        tl.store(dslope_tiles + tl.program_id(0), tl.sum(dslope, 0))
    if VARIANT.dweights:
        dlse_base = head_rows(dlse, batch, head, num_heads, query_base, seqlen_q, VARIANT)
        tl.store(dlse_base + rows, dlse_rows, mask=rows < num_queries)
