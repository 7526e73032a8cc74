"""Device functions of the attention kernels: logits, softmax and dropout of a tile of scores.

`VARIANT`, `optional`, `rows` and `cols` are those of primitives.py.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

import triton
import triton.language as tl

from .primitives import load_rows, score_matrix, score_pointers

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def tanh(x):
    """tanh(x) within 2 units in the last place: a polynomial below 0.625, where 1 - 2 / (exp(2x) + 1) cancels."""
    magnitude = tl.abs(x)
    square = x * x
    polynomial = square * -0.006096714165578375 + 0.020997178998974037
    polynomial = polynomial * square - 0.05385090957855562
    polynomial = polynomial * square + 0.13332769736977804
    polynomial = polynomial * square - 0.33333328944134344
    small = x + x * square * polynomial
    large = 1.0 - 2.0 / (tl.exp2(magnitude * (2.0 * LOG2E)) + 1.0)
    return tl.where(magnitude < 0.625, small, tl.where(x < 0.0, -large, large))


@triton.jit
def distance(rows, cols, shift):
    """|pos(i) - j| with pos(i) = i + shift, what ALiBi slopes multiply."""
    return tl.abs(rows + shift - cols).to(tl.float32)


@triton.jit
def head_scoring(
    batch, head, seq_key_end, optional, score_strides, positions, scale, softcap, VARIANT: tl.constexpr
):
    """All that turns q.k of one head into logits, as one tuple for `logits`; what is absent is undefined there.

    score_strides: the four of the mask, the four of the bias and that of the slopes; positions: (seqlen_q, seqlen_k,
    shift, left, right).
    """
    mask_b, mask_h, mask_q, mask_k, bias_b, bias_h, bias_q, bias_k, slopes_b = score_strides
    seqlen_q, seqlen_k, shift, left, right = positions
    slope = 0.0
    if VARIANT.alibi:
        slope = tl.load(optional.slopes + batch * slopes_b + head, mask=batch >= 0, other=0.0)
    ids = (0, 0)
    if VARIANT.segments:
        query_ids = optional.query_ids + batch.to(tl.int64) * seqlen_q
        key_ids = optional.key_ids + batch.to(tl.int64) * seqlen_k
        ids = (query_ids, key_ids)
    head_mask = score_matrix(optional.mask, (mask_b, mask_h, mask_q, mask_k), batch, head)
    head_bias = score_matrix(optional.bias, (bias_b, bias_h, bias_q, bias_k), batch, head)
    return scale, softcap, slope, head_mask, head_bias, ids, (seqlen_q, seq_key_end, shift, left, right)


@triton.jit
def visible(rows, cols, head_mask, ids, positions, IS_MASKED: tl.constexpr, VARIANT: tl.constexpr):
    """Which keys exist and are not masked: pos - left <= j <= pos + right, same segment, mask. Full blocks need only
    the mask. Queries past the last count as visible: nothing of theirs is stored, and backward reads their lse as +inf.
    """
    seqlen_q, seq_key_end, shift, left, right = positions
    inside = cols < seq_key_end
    if IS_MASKED:
        if VARIANT.has_right:
            inside &= cols <= rows + (shift + right)
        if VARIANT.has_left:
            inside &= cols >= rows + (shift - left)
        if VARIANT.segments:
            row_ids = tl.load(ids[0] + rows, mask=rows < seqlen_q, other=-1)
            col_ids = tl.load(ids[1] + cols, mask=cols < seq_key_end, other=-1)
            inside &= (row_ids == col_ids) & (row_ids >= 0)
    if VARIANT.mask:
        pointers = score_pointers(head_mask, rows, cols, VARIANT.unit_mask, VARIANT)
        inside &= tl.load(pointers, mask=(rows < seqlen_q) & (cols < seq_key_end), other=0) != 0
    return inside


@triton.jit
def logits(products, rows, cols, scoring, IS_MASKED: tl.constexpr, VARIANT: tl.constexpr):
    """(scores, capped) of a tile of q.k: scores = softcap * tanh(scale * q.k / softcap) - slope * distance + bias, -inf
    where a query may not look; capped is the tanh. Where it can be folded into the exponent, the scale is missing.
    """
    scale, softcap, slope, head_mask, head_bias, ids, positions = scoring
    seqlen_q, seq_key_end, shift, _, _ = positions
    scores = products
    capped = products
    if not VARIANT.fold_scale:
        scores = products * scale
    if VARIANT.softcap:
        capped = tanh(scores / softcap)
        scores = capped * softcap
    if VARIANT.alibi:
        scores -= slope * distance(rows, cols, shift)
    if VARIANT.bias:
        pointers = score_pointers(head_bias, rows, cols, VARIANT.unit_bias, VARIANT)
        bias = tl.load(pointers, mask=(rows < seqlen_q) & (cols < seq_key_end), other=0.0)
        scores += bias.to(tl.float32)
    if IS_MASKED or VARIANT.mask:
        inside = visible(rows, cols, head_mask, ids, positions, IS_MASKED, VARIANT)
        scores = tl.where(inside, scores, float("-inf"))
    return scores, capped


@triton.jit
def exponents(scores, reference, scale, VARIANT: tl.constexpr):
    """log2 of exp(logit - reference). With a folded scale one fused multiply-add does it, the reference being in the
    log2 domain; otherwise the reference is subtracted first, which is exact where a logit is close to it."""
    if VARIANT.fold_scale:
        result = scores * (scale * LOG2E) - reference
    else:
        result = (scores - reference) * LOG2E
    return result


@triton.jit
def softmax_start(sinks, batch, head, BLOCK_M: tl.constexpr, VARIANT: tl.constexpr):
    """(row_max, row_sum) before any key: (-inf, 0), or those of the sink, which is one more key without a value.

    Tokens that belong to no sequence, whose batch is -1, have no sink.
    """
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    if VARIANT.sinks:
        row_max = tl.maximum(row_max, tl.load(sinks + head, mask=batch >= 0, other=float("-inf")))
        row_sum += 1.0
    return row_max, row_sum


@triton.jit
def softmax_update(scores, row_max, row_sum, scale, VARIANT: tl.constexpr):
    """One step of online softmax over columns: (probs, rescale, row_max, row_sum), probs = exp(logit - row_max).

    row_max is in the domain of `exponents`' reference; earlier sums are multiplied by rescale. A row that has seen no
    key yet, or only scores of -inf, keeps a maximum of -inf but subtracts 0, since -inf - -inf is NaN.
    """
    if VARIANT.fold_scale:
        new_max = tl.maximum(row_max, tl.max(scores, 1) * (scale * LOG2E))
    else:
        new_max = tl.maximum(row_max, tl.max(scores, 1))
    safe_max = tl.where(new_max == float("-inf"), 0.0, new_max)
    probs = tl.exp2(exponents(scores, safe_max[:, None], scale, VARIANT))
    if VARIANT.fold_scale:
        rescale = tl.exp2(row_max - safe_max)
    else:
        rescale = tl.exp2((row_max - safe_max) * LOG2E)
    if VARIANT.sinks:  # a sink of +inf stays the maximum, and inf - inf is NaN
        rescale = tl.where(row_max == new_max, 1.0, rescale)
    return probs, rescale, new_max, row_sum * rescale + tl.sum(probs, 1)


@triton.jit
def softmax_lse(row_max, row_sum, VARIANT: tl.constexpr):
    """Natural log of the sum of exp(logit), from the state of `softmax_update`; -inf for a row without keys."""
    if VARIANT.fold_scale:
        lse = (row_max + tl.log2(row_sum)) * LN2
    else:
        lse = row_max + tl.log2(row_sum) * LN2
    return lse


@triton.jit
def load_lse(base, first_row, num_rows, BLOCK: tl.constexpr, CHECK_ROWS: tl.constexpr, VARIANT: tl.constexpr):
    """lse of a block of rows as the reference of `exponents`; +inf, which makes every weight 0, for rows that saw no
    key or do not exist."""
    lse = load_rows(base, first_row, num_rows, float("-inf"), BLOCK, CHECK_ROWS)
    if VARIANT.fold_scale:
        reference = lse * LOG2E
    else:
        reference = lse
    return tl.where(lse == float("-inf"), float("inf"), reference)


@triton.jit
def philox_round(c0, c1, c2, c3, key_low, key_high):
    """One round of Philox4x32 on four uint32 counter words."""
    factor0 = tl.full([1, 1], 0xD2511F53, tl.uint32)
    factor1 = tl.full([1, 1], 0xCD9E8D57, tl.uint32)
    next0 = tl.umulhi(c2, factor1) ^ c1 ^ key_low
    next2 = tl.umulhi(c0, factor0) ^ c3 ^ key_high
    return next0, c2 * factor1, next2, c0 * factor0


@triton.jit
def dropout_keep(
    seed, head_index, first_query, first_key, threshold, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Which weights of a [BLOCK_M, BLOCK_N] tile are kept: the stream of fastattn/philox.py, one call per 8 keys.

    The counter is (key // 8, query, b * H + h, 0), the key the two halves of the seed; half j % 8 of a call's 128 bits
    belongs to key j.
    """
    seed = tl.load(seed).to(tl.uint64, bitcast=True)
    key_low = (seed & 0xFFFFFFFF).to(tl.uint32)
    key_high = (seed >> 32).to(tl.uint32)
    c0 = (first_key // 8 + tl.arange(0, BLOCK_N // 8))[None, :].to(tl.uint32)
    c1 = (first_query + tl.arange(0, BLOCK_M))[:, None].to(tl.uint32)
    c2 = tl.full([1, 1], 0, tl.uint32) + head_index.to(tl.uint32)
    c3 = tl.full([1, 1], 0, tl.uint32)
    weyl_low = tl.full([], 0x9E3779B9, tl.uint32)
    weyl_high = tl.full([], 0xBB67AE85, tl.uint32)
    for _ in tl.static_range(10):
        c0, c1, c2, c3 = philox_round(c0, c1, c2, c3, key_low, key_high)
        key_low += weyl_low
        key_high += weyl_high
    even = tl.join(tl.join(c0 & 0xFFFF, c2 & 0xFFFF), tl.join(c1 & 0xFFFF, c3 & 0xFFFF))
    odd = tl.join(tl.join(c0 >> 16, c2 >> 16), tl.join(c1 >> 16, c3 >> 16))
    halves = tl.join(even, odd)  # [M, N / 8, word / 2, word % 2, half]
    return tl.reshape(halves, [BLOCK_M, BLOCK_N]) >= threshold.to(tl.uint32)
