"""Device functions of the attention kernels: ranges of blocks, tiles in and out, scores, masking, online softmax.

`VARIANT` is the `AttentionVariant` of launches.py. Index vectors arrive already expanded, so one function serves
tiles laid out queries by keys (rows [M, 1], cols [1, N]) and keys by queries (rows [1, M], cols [N, 1]).
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


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
def head_base(pointer, batch, head, stride_batch, stride_head, UNIT: tl.constexpr):
    """Where one head of one sequence begins. Strides count UNITs of elements, which keeps their alignment known."""
    return pointer + (batch.to(tl.int64) * stride_batch + head.to(tl.int64) * stride_head) * UNIT


@triton.jit
def row_base(pointer, batch, head, num_heads, seqlen):
    """Where one head's row of a contiguous (B, H, S) tensor begins."""
    return pointer + (batch.to(tl.int64) * num_heads + head) * seqlen


@triton.constexpr_function
def padded(dim):
    """The block width a head dim is padded to."""
    return max(16, triton.next_power_of_2(dim))


@triton.jit
def tile_pointers(
    base, first_row, stride_row, DIM: tl.constexpr, BLOCK_ROWS: tl.constexpr, VARIANT: tl.constexpr
):
    """Pointers [BLOCK_ROWS, padded(DIM)] to consecutive rows; the distance to the first row is always 64-bit."""
    rows = tl.arange(0, BLOCK_ROWS)[:, None]
    cols = tl.arange(0, padded(DIM))[None, :]
    if VARIANT.wide_offsets:
        rows = rows.to(tl.int64)
    start = base + first_row.to(tl.int64) * stride_row * VARIANT.unit
    return start + (rows * stride_row * VARIANT.unit + cols)


@triton.jit
def load_tile(
    base,
    first_row,
    end_row,
    stride_row,
    DIM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    CHECK_ROWS: tl.constexpr,
    VARIANT: tl.constexpr,
):
    """Rows [first_row, first_row + BLOCK_ROWS) of a (rows, DIM) matrix; zeros from end_row on and beyond DIM."""
    pointers = tile_pointers(base, first_row, stride_row, DIM, BLOCK_ROWS, VARIANT)
    rows = first_row + tl.arange(0, BLOCK_ROWS)[:, None]
    cols = tl.arange(0, padded(DIM))[None, :]
    if CHECK_ROWS and padded(DIM) > DIM:
        tile = tl.load(pointers, mask=(rows < end_row) & (cols < DIM), other=0.0)
    elif CHECK_ROWS:
        tile = tl.load(pointers, mask=rows < end_row, other=0.0)
    elif padded(DIM) > DIM:
        tile = tl.load(pointers, mask=cols < DIM, other=0.0)
    else:
        tile = tl.load(pointers)
    return tile


@triton.jit
def store_tile(
    base,
    tile,
    first_row,
    end_row,
    stride_row,
    DIM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    VARIANT: tl.constexpr,
):
    """Writes the rows before end_row and the columns before DIM, converted to the tensor's dtype."""
    pointers = tile_pointers(base, first_row, stride_row, DIM, BLOCK_ROWS, VARIANT)
    rows = first_row + tl.arange(0, BLOCK_ROWS)[:, None]
    cols = tl.arange(0, padded(DIM))[None, :]
    tl.store(pointers, tile.to(base.dtype.element_ty), mask=(rows < end_row) & (cols < DIM))


@triton.jit
def keys_end(key_lengths, batch, seqlen_k, VARIANT: tl.constexpr):
    """One past the last key of this sequence."""
    end = seqlen_k
    if VARIANT.key_lengths:
        end = tl.minimum(tl.load(key_lengths + batch), seqlen_k)
    return end


@triton.jit
def split_blocks(begin, end, full_begin, full_end, BLOCK: tl.constexpr):
    """(first, full_first, full_last, last): the blocks meeting [begin, end), those wholly in [full_begin, full_end).

    Blocks [first, full_first) and [full_last, last) are the edges, where elements must be masked one by one.
    """
    first = tl.maximum(begin, 0) // BLOCK
    last = tl.maximum(tl.cdiv(tl.maximum(end, 0), BLOCK), first)
    full_first = tl.minimum(tl.maximum(tl.cdiv(tl.maximum(full_begin, 0), BLOCK), first), last)
    full_last = tl.minimum(tl.maximum(tl.maximum(full_end, 0) // BLOCK, full_first), last)
    return first, full_first, full_last, last


@triton.jit
def key_blocks(
    first_query, end_query, key_end, shift, left, right, VARIANT: tl.constexpr, BLOCK_N: tl.constexpr
):
    """The key blocks that queries [first_query, end_query) see: `split_blocks` of their windows."""
    begin = 0
    full_begin = 0
    end = key_end
    full_end = key_end
    if VARIANT.has_left:
        begin = first_query + shift - left
        full_begin = end_query - 1 + shift - left
    if VARIANT.has_right:
        end = tl.minimum(key_end, end_query + shift + right)
        full_end = tl.minimum(key_end, first_query + shift + right + 1)
    return split_blocks(begin, end, full_begin, full_end, BLOCK_N)


@triton.jit
def query_blocks(
    first_key, end_key, seqlen_q, shift, left, right, VARIANT: tl.constexpr, BLOCK_M: tl.constexpr
):
    """The query blocks that see keys [first_key, end_key), none when there are no keys: the mirror of `key_blocks`."""
    begin = 0
    full_begin = 0
    end = seqlen_q
    full_end = seqlen_q
    if VARIANT.has_right:
        begin = first_key - shift - right
        full_begin = end_key - 1 - shift - right
    if VARIANT.has_left:
        end = tl.minimum(seqlen_q, end_key - shift + left)
        full_end = tl.minimum(seqlen_q, first_key - shift + left + 1)
    end = tl.where(first_key < end_key, end, 0)
    return split_blocks(begin, end, full_begin, full_end, BLOCK_M)


@triton.jit
def block_at(step, first, full_first, full_last, EDGE: tl.constexpr):
    """The step-th block of the full blocks, or of the two edges taken as one sequence."""
    block = full_first + step
    if EDGE:
        left_edge = full_first - first
        block = tl.where(step < left_edge, first + step, full_last + step - left_edge)
    return block


@triton.jit
def block_count(first, full_first, full_last, last, EDGE: tl.constexpr):
    """How many blocks `block_at` enumerates."""
    count = full_last - full_first
    if EDGE:
        count = full_first - first + last - full_last
    return count


@triton.jit
def visible(rows, cols, key_end, shift, left, right, VARIANT: tl.constexpr):
    """Which keys exist and lie in each query's window: pos - left <= j <= pos + right with pos = i + shift.

    Queries past the last are not excluded here: nothing of theirs is stored, and backward reads their lse as +inf.
    """
    inside = cols < key_end
    if VARIANT.has_right:
        inside &= cols <= rows + (shift + right)
    if VARIANT.has_left:
        inside &= cols >= rows + (shift - left)
    return inside


@triton.jit
def logits(products, scale, VARIANT: tl.constexpr):
    """The logits of a tile of q.k, short of the scale where that is folded into the exponent."""
    if not VARIANT.fold_scale:
        products *= scale
    return products


@triton.jit
def exponents(scores, reference, scale, VARIANT: tl.constexpr):
    """log2 of exp(logit - reference). With a folded scale one fused multiply-add does it, the reference being in the
    log2 domain; otherwise the difference comes first, which loses nothing where a logit is close to its reference."""
    if VARIANT.fold_scale:
        result = scores * (scale * LOG2E) - reference
    else:
        result = (scores - reference) * LOG2E
    return result


@triton.jit
def online_softmax_update(scores, row_max, row_sum, scale, GUARD: tl.constexpr, VARIANT: tl.constexpr):
    """One step of softmax over columns: (probs, rescale, row_max, row_sum), probs = exp(logit - row_max).

    row_max is in the domain of `exponents`' reference, rescale is what earlier sums are worth now. GUARD admits rows
    that have seen no key yet, whose maximum is -inf.
    """
    if VARIANT.fold_scale:
        new_max = tl.maximum(row_max, tl.max(scores, 1) * (scale * LOG2E))
        unit: tl.constexpr = 1.0
    else:
        new_max = tl.maximum(row_max, tl.max(scores, 1))
        unit: tl.constexpr = LOG2E
    if GUARD:
        safe_max = tl.where(new_max == float("-inf"), 0.0, new_max)
    else:
        safe_max = new_max
    probs = tl.exp2(exponents(scores, safe_max[:, None], scale, VARIANT))
    rescale = tl.exp2((row_max - safe_max) * unit)
    return probs, rescale, new_max, row_sum * rescale + tl.sum(probs, 1)


@triton.jit
def softmax_lse(row_max, row_sum, VARIANT: tl.constexpr):
    """Natural log of the sum of exp(logit), from the state of `online_softmax_update`; -inf for a row without keys."""
    if VARIANT.fold_scale:
        lse = (row_max + tl.log2(row_sum)) * LN2
    else:
        lse = row_max + tl.log2(row_sum) * LN2
    return lse


@triton.jit
def load_lse(base, first_row, end_row, BLOCK: tl.constexpr, VARIANT: tl.constexpr):
    """lse of a block of rows as `exponents` wants its reference; +inf, which makes every weight 0, for rows that saw no
    key or don't exist."""
    rows = first_row + tl.arange(0, BLOCK)
    lse = tl.load(base + rows, mask=rows < end_row, other=float("-inf"))
    if VARIANT.fold_scale:
        reference = lse * LOG2E
    else:
        reference = lse
    return tl.where(lse == float("-inf"), float("inf"), reference)
