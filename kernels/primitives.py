"""Device functions of the attention kernels: ranges of blocks, tiles in and out, logits, softmax, dropout.

`VARIANT` is the `AttentionVariant` of variants.py, `optional` the `OptionalTensors` of arguments.py. `rows` are query
and `cols` key indices, already expanded, so one function serves tiles laid out queries by keys (rows [M, 1], cols [1,
N]) and keys by queries (rows [1, M], cols [N, 1]). A matrix is a tuple (pointer to its first row, row stride, number of
rows); a score matrix, of a mask or a bias, is a tuple (pointer to its first element, row stride, column stride), with
stride 0 where it is broadcast.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

import triton
import triton.language as tl

# The integers of the attention kernels. One variant serves every length and stride, so none of them is specialised on.
INTEGERS = (
    *(f"stride_{tensor}{dim}" for tensor in ("q", "k", "v", "o", "do", "dq", "dk", "dv") for dim in "bhsd"),
    *(f"stride_new_{tensor}{dim}" for tensor in "kv" for dim in "bhs"),
    *(f"stride_{tensor}_{dim}" for tensor in ("mask", "bias", "dweights") for dim in "bhqk"),
    *("stride_slopes_b", "stride_split_dk", "stride_split_dv", "stride_table", "stride_cos", "stride_sin"),
    *("num_heads", "num_kv_heads", "batch_size", "seqlen_q", "seqlen_k", "shift", "left", "right"),
    *("bias_batch", "bias_heads", "bias_rows", "bias_cols", "keep_threshold", "first_split", "num_splits"),
    *("num_rows", "new_keys", "capacity", "rotary_positions"),
)
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.constexpr_function
def padded(dim):
    """The block width a head dim is padded to."""
    return max(16, triton.next_power_of_2(dim))


@triton.jit
def program_coordinates(num_tiles, num_heads, HEAVY_LAST: tl.constexpr):
    """(tile, batch, head) of this program; tiles run fastest, the longest first when work grows with the tile."""
    program = tl.program_id(0)
    tile = program % num_tiles
    if HEAVY_LAST:
        tile = num_tiles - 1 - tile
    head = (program // num_tiles) % num_heads
    batch = program // num_tiles // num_heads
    return tile, batch, head


@triton.jit
def head_matrix(pointer, strides, batch, head, first_row, num_rows, VARIANT: tl.constexpr):
    """The matrix of one head; its sequence begins at `first_row` where sequences are packed.

    Strides count units of 16 bytes where all are multiples of it, so alignment is known.
    """
    stride_batch, stride_head, stride_row = strides
    offset = head.to(tl.int64) * stride_head
    if VARIANT.varlen:
        offset += first_row.to(tl.int64) * stride_row
    else:
        offset += batch.to(tl.int64) * stride_batch
    return pointer + offset * VARIANT.unit, stride_row, num_rows


@triton.jit
def score_matrix(pointer, strides, batch, head):
    """One head's (Sq, Sk) matrix of a tensor that broadcasts to (B, H, Sq, Sk); undefined where it is absent."""
    stride_batch, stride_head, stride_row, stride_col = strides
    base = 0
    if pointer is not None:
        base = pointer + batch.to(tl.int64) * stride_batch + head.to(tl.int64) * stride_head
    return base, stride_row, stride_col


@triton.jit
def head_rows(pointer, batch, head, num_heads, first_row, num_rows, VARIANT: tl.constexpr):
    """The start of one head's row of a contiguous (B, H, rows) tensor, or of a sequence's part of (H, rows)."""
    if VARIANT.varlen:
        base = pointer + head.to(tl.int64) * num_rows + first_row
    else:
        base = pointer + (batch.to(tl.int64) * num_heads + head) * num_rows
    return base


@triton.jit
def tile_pointers(matrix, first_row, DIM: tl.constexpr, BLOCK_ROWS: tl.constexpr, VARIANT: tl.constexpr):
    """Pointers [BLOCK_ROWS, padded(DIM)] to consecutive rows; the distance to the first row is always 64-bit."""
    base, stride_row, _ = matrix
    rows = tl.arange(0, BLOCK_ROWS)[:, None]
    cols = tl.arange(0, padded(DIM))[None, :]
    if VARIANT.int64_offsets:
        rows = rows.to(tl.int64)
    start = base + first_row.to(tl.int64) * stride_row * VARIANT.unit
    return start + (rows * stride_row * VARIANT.unit + cols)


@triton.jit
def load_tile(
    matrix,
    first_row,
    DIM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    CHECK_ROWS: tl.constexpr,
    VARIANT: tl.constexpr,
):
    """Rows [first_row, first_row + BLOCK_ROWS) of a matrix of DIM columns; zeros beyond it."""
    pointers = tile_pointers(matrix, first_row, DIM, BLOCK_ROWS, VARIANT)
    rows = first_row + tl.arange(0, BLOCK_ROWS)[:, None]
    cols = tl.arange(0, padded(DIM))[None, :]
    if CHECK_ROWS and padded(DIM) > DIM:
        tile = tl.load(pointers, mask=(rows < matrix[2]) & (cols < DIM), other=0.0)
    elif CHECK_ROWS:
        tile = tl.load(pointers, mask=rows < matrix[2], other=0.0)
    elif padded(DIM) > DIM:
        tile = tl.load(pointers, mask=cols < DIM, other=0.0)
    else:
        tile = tl.load(pointers)
    return tile


@triton.jit
def head_operand(tensor, strides, batch, head, first_row, num_rows, TMA: tl.constexpr, VARIANT: tl.constexpr):
    """The source of `load_operand`: `head_matrix`, or with TMA a descriptor of the whole (B, H, S, D) tensor."""
    if TMA and VARIANT.varlen:
        operand = (tensor, 0, head, first_row)
    elif TMA:
        operand = (tensor, batch, head, 0)
    else:
        operand = head_matrix(tensor, strides, batch, head, first_row, num_rows, VARIANT)
    return operand


@triton.jit
def load_operand(
    operand, first_row, DIM: tl.constexpr, BLOCK_ROWS: tl.constexpr, CHECK_ROWS: tl.constexpr, TMA: tl.constexpr,
    VARIANT: tl.constexpr,
):  # fmt: skip
    """`load_tile`, or a load by TMA, which fills with zeros past the tensor but not past a sequence within it."""
    if TMA:
        descriptor, batch, head, before = operand
        block = descriptor.load([batch, head, before + first_row, 0])
        tile = tl.reshape(block, [BLOCK_ROWS, padded(DIM)])
    else:
        tile = load_tile(operand, first_row, DIM, BLOCK_ROWS, CHECK_ROWS, VARIANT)
    return tile


@triton.jit
def zero_beyond(tile, rows, num_rows, IS_MASKED: tl.constexpr, TMA: tl.constexpr, VARIANT: tl.constexpr):
    """A tile of `load_operand` that enters a sum over rows, with zeros in rows past num_rows: they may hold another
    sequence's NaN, and 0 * NaN is NaN."""
    if TMA and IS_MASKED and (VARIANT.varlen or VARIANT.key_lengths):
        tile = tl.where((rows < num_rows)[:, None], tile, 0.0)
    return tile


@triton.jit
def store_tile(matrix, tile, first_row, DIM: tl.constexpr, BLOCK_ROWS: tl.constexpr, VARIANT: tl.constexpr):
    """Store the part of a tile within a matrix of DIM columns, converted to its dtype."""
    pointers = tile_pointers(matrix, first_row, DIM, BLOCK_ROWS, VARIANT)
    rows = first_row + tl.arange(0, BLOCK_ROWS)[:, None]
    cols = tl.arange(0, padded(DIM))[None, :]
    tl.store(pointers, tile.to(matrix[0].dtype.element_ty), mask=(rows < matrix[2]) & (cols < DIM))


@triton.jit
def score_pointers(matrix, rows, cols, UNIT_COLS: tl.constexpr, VARIANT: tl.constexpr):
    """Pointers to elements of a score matrix; UNIT_COLS says that neighbouring columns are neighbours in memory."""
    base, stride_row, stride_col = matrix
    if VARIANT.int64_offsets:
        rows = rows.to(tl.int64)
        cols = cols.to(tl.int64)
    if UNIT_COLS:
        offsets = rows * stride_row + cols
    else:
        offsets = rows * stride_row + cols * stride_col
    return base + offsets


@triton.jit
def sequence_key_end(key_lengths, batch, seqlen_k, VARIANT: tl.constexpr):
    """One past the last key of this sequence."""
    end = seqlen_k
    if VARIANT.key_lengths:
        end = tl.minimum(tl.load(key_lengths + batch), seqlen_k)
    return end


@triton.jit
def split_blocks(begin, end, full_begin, full_end, BLOCK: tl.constexpr):
    """(first, full_first, full_last, last): the blocks meeting [begin, end), those wholly in [full_begin, full_end).

    Blocks [first, full_first) and [full_last, last) are masked element by element.
    """
    first = tl.maximum(begin, 0) // BLOCK
    last = tl.maximum(tl.cdiv(tl.maximum(end, 0), BLOCK), first)
    full_first = tl.minimum(tl.maximum(tl.cdiv(tl.maximum(full_begin, 0), BLOCK), first), last)
    full_last = tl.minimum(tl.maximum(tl.maximum(full_end, 0) // BLOCK, full_first), last)
    return first, full_first, full_last, last


@triton.jit
def key_blocks(
    first_query, end_query, seq_key_end, shift, left, right, VARIANT: tl.constexpr, BLOCK_N: tl.constexpr
):
    """The key blocks that queries [first_query, end_query) see: `split_blocks` of their windows."""
    begin = 0
    full_begin = 0
    end = seq_key_end
    full_end = seq_key_end
    if VARIANT.has_left:
        begin = first_query + shift - left
        full_begin = end_query - 1 + shift - left
    if VARIANT.has_right:
        end = tl.minimum(seq_key_end, end_query + shift + right)
        full_end = tl.minimum(seq_key_end, first_query + shift + right + 1)
    return split_blocks(begin, end, full_begin, full_end, BLOCK_N)


@triton.jit
def query_blocks(
    first_key, tile_key_end, seqlen_q, shift, left, right, VARIANT: tl.constexpr, BLOCK_M: tl.constexpr
):
    """The query blocks that see keys [first_key, tile_key_end), none without keys; see `key_blocks`."""
    begin = 0
    full_begin = 0
    end = seqlen_q
    full_end = seqlen_q
    if VARIANT.has_right:
        begin = first_key - shift - right
        full_begin = tile_key_end - 1 - shift - right
    if VARIANT.has_left:
        end = tl.minimum(seqlen_q, tile_key_end - shift + left)
        full_end = tl.minimum(seqlen_q, first_key - shift + left + 1)
    end = tl.where(first_key < tile_key_end, end, 0)
    return split_blocks(begin, end, full_begin, full_end, BLOCK_M)


@triton.jit
def within_segments(blocks, segment_blocks, tile_index, VARIANT: tl.constexpr):
    """Blocks narrowed to those `segment_blocks`, the prepass's (tiles, 4) table, found for this tile."""
    first, full_first, full_last, last = blocks
    if VARIANT.segments:
        entry = segment_blocks + tile_index.to(tl.int64) * 4
        first = tl.maximum(first, tl.load(entry))
        last = tl.maximum(tl.minimum(last, tl.load(entry + 3)), first)
        full_first = tl.minimum(tl.maximum(full_first, tl.load(entry + 1)), last)
        full_first = tl.maximum(full_first, first)
        full_last = tl.maximum(tl.minimum(tl.minimum(full_last, tl.load(entry + 2)), last), full_first)
    return first, full_first, full_last, last


@triton.jit
def block_at(step, blocks, IS_MASKED: tl.constexpr):
    """The step-th of the full blocks, or of the masked blocks on both sides taken as one sequence."""
    first, full_first, full_last, _ = blocks
    block = full_first + step
    if IS_MASKED:
        left_masked = full_first - first
        block = tl.where(step < left_masked, first + step, full_last + step - left_masked)
    return block


@triton.jit
def block_count(blocks, IS_MASKED: tl.constexpr):
    """How many blocks `block_at` enumerates."""
    first, full_first, full_last, last = blocks
    count = full_last - full_first
    if IS_MASKED:
        count = full_first - first + last - full_last
    return count


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
def load_rows(base, first_row, num_rows, other, BLOCK: tl.constexpr, CHECK_ROWS: tl.constexpr):
    """A block of one head's row of a (B, H, rows) tensor, `other` past its end."""
    rows = first_row + tl.arange(0, BLOCK)
    if CHECK_ROWS:
        values = tl.load(base + rows, mask=rows < num_rows, other=other)
    else:
        values = tl.load(base + rows)
    return values


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
