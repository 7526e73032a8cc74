"""Device functions of the attention kernels: coordinates of programs, tiles in and out, ranges of blocks.

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


@triton.constexpr_function
def padded(dim):
    """The block width a head dim is padded to."""
    return max(16, triton.next_power_of_2(dim))


@triton.jit
def program_coordinates(num_tiles, num_heads, HEAVY_LAST: tl.constexpr):
    """(tile, batch, head) of this program; tiles run fastest, the longest first when work grows with the tile.

    Where programs do not run over heads, num_heads is 1.
    """
    program = tl.program_id(0)
    tile = program % num_tiles
    if HEAVY_LAST:
        tile = num_tiles - 1 - tile
    head = (program // num_tiles) % num_heads
    batch = program // num_tiles // num_heads
    return tile, batch, head


@triton.jit
def score_tile_coordinates(row_tiles, col_tiles):
    """(row tile, column tile, matrix) of a program that owns a tile of a score matrix; columns run fastest."""
    program = tl.program_id(0)
    col_tile = program % col_tiles
    row_tile = program // col_tiles % row_tiles
    return row_tile, col_tile, program // col_tiles // row_tiles


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
def load_seq_key_end(key_lengths, batch, seqlen_k, VARIANT: tl.constexpr):
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
    first_query, tile_query_end, seq_key_end, shift, left, right, VARIANT: tl.constexpr, BLOCK_N: tl.constexpr
):
    """The key blocks that queries [first_query, tile_query_end) see: `split_blocks` of their windows."""
    begin = 0
    full_begin = 0
    end = seq_key_end
    full_end = seq_key_end
    if VARIANT.has_left:
        begin = first_query + shift - left
        full_begin = tile_query_end - 1 + shift - left
    if VARIANT.has_right:
        end = tl.minimum(seq_key_end, tile_query_end + shift + right)
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
def load_rows(base, first_row, num_rows, other, BLOCK: tl.constexpr, CHECK_ROWS: tl.constexpr):
    """A block of one head's row of a (B, H, rows) tensor, `other` past its end."""
    rows = first_row + tl.arange(0, BLOCK)
    if CHECK_ROWS:
        values = tl.load(base + rows, mask=rows < num_rows, other=other)
    else:
        values = tl.load(base + rows)
    return values
