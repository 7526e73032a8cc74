"""Softmax over rows of any strides: whole rows in registers where they fit, online in chunks where they don't.

A tensor is seen as (outer, mid, inner, columns); a row is one (outer, mid, inner). `VARIANT` is the `RowVariant` of
softmax_launches.py. Strides and the number of columns count units of VARIANT.unit elements, so alignment is known.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

import triton
import triton.language as tl

from .jit import kernel

SIZES = ("num_outer", "num_mid", "num_inner", "num_columns", "shift")
STRIDES = tuple(f"stride_{tensor}_{dim}" for tensor in ("x", "mask", "y", "dy", "dx") for dim in "omic")
INTEGERS = (*SIZES, *STRIDES)


@triton.jit
def row_coordinates(num_outer, num_mid, num_inner, VARIANT: tl.constexpr, BLOCK_ROWS: tl.constexpr):
    """(outer, mid, inner, inside) of the rows of this program: neighbours in `inner` if they are so in memory."""
    program = tl.program_id(0)
    if VARIANT.int64_offsets:  # else all offsets, and so all row numbers, fit in 32 bits
        program = program.to(tl.int64)
    lanes = tl.arange(0, BLOCK_ROWS)
    if VARIANT.unit_columns:
        rows = program * BLOCK_ROWS + lanes
        inner = rows % num_inner
        mid = rows // num_inner % num_mid
        outer = rows // num_inner // num_mid
        inside = outer < num_outer
    else:
        tiles = tl.cdiv(num_inner, BLOCK_ROWS)
        inner = program % tiles * BLOCK_ROWS + lanes
        mid = program // tiles % num_mid
        outer = program // tiles // num_mid
        inside = inner < num_inner
    return outer.to(tl.int64), mid.to(tl.int64), inner.to(tl.int64), inside


@triton.jit
def row_pointers(tensor, strides, rows, VARIANT: tl.constexpr):
    """Pointers [rows, 1] to the first element of each row, and the distance of neighbours in it."""
    outer, mid, inner, _ = rows
    stride_outer, stride_mid, stride_inner, stride_column = strides
    if VARIANT.unit_columns:
        offsets = (outer * stride_outer + mid * stride_mid + inner * stride_inner) * VARIANT.unit
        step = 1
    elif VARIANT.unit_inner:
        offsets = (outer * stride_outer + mid * stride_mid) * VARIANT.unit + inner
        step = stride_column * VARIANT.unit
    else:
        offsets = outer * stride_outer + mid * stride_mid + inner * stride_inner
        step = stride_column
    return tensor + offsets[:, None], step


@triton.jit
def column_offsets(cols, step, VARIANT: tl.constexpr):
    """Offsets [1, columns] within a row."""
    if VARIANT.int64_offsets:
        cols = cols.to(tl.int64)
    return cols[None, :] * step


@triton.jit
def load_scores(x, mask, rows, cols, num_columns, shift, scale, VARIANT: tl.constexpr):
    """scale * x of some columns in float32, -inf where masked, where x is -inf, or beyond the row."""
    pointers, step = x
    inside = rows[3][:, None] & (cols < num_columns)[None, :]
    if VARIANT.causal == 1:
        inside = inside & (cols[None, :] <= rows[2][:, None] + shift)
    if VARIANT.causal == 2:
        inside = inside & (rows[2][:, None] <= cols[None, :] + shift)
    if VARIANT.mask:
        kept_pointers, kept_step = mask
        kept = tl.load(kept_pointers + column_offsets(cols, kept_step, VARIANT), mask=inside, other=0)
        inside = inside & (kept != 0)
    values = tl.load(pointers + column_offsets(cols, step, VARIANT), mask=inside, other=float("-inf")).to(
        tl.float32
    )
    return tl.where(values != float("-inf"), values * scale, float("-inf"))


@triton.jit
def store_columns(y, values, rows, cols, num_columns, VARIANT: tl.constexpr):
    """Writes some columns of the rows."""
    pointers, step = y
    inside = rows[3][:, None] & (cols < num_columns)[None, :]
    target = pointers + column_offsets(cols, step, VARIANT)
    tl.store(target, values.to(pointers.dtype.element_ty), mask=inside)


@triton.jit
def normalised(scores, row_max, row_sum, VARIANT: tl.constexpr):
    """exp(scores - row_max) / row_sum or its logarithm; what is -inf stays so, or is 0, even in a row with NaN."""
    if VARIANT.log:
        result = scores - row_max[:, None] - tl.log(row_sum)[:, None]
        constant = float("-inf")
    else:
        result = tl.exp(scores - row_max[:, None]) / row_sum[:, None]
        constant = 0.0
    return tl.where(scores == float("-inf"), constant, result)


@triton.jit
def finite_max(row_max):
    """The maximum, 0 where nothing is kept: -inf - -inf would be NaN."""
    return tl.where(row_max == float("-inf"), 0.0, row_max)


@triton.jit
def mask_pointers(mask, strides, rows):
    """`row_pointers` of a mask of any strides; undefined where there is none."""
    outer, mid, inner, _ = rows
    stride_outer, stride_mid, stride_inner, stride_column = strides
    pointers = 0
    if mask is not None:
        pointers = mask + (outer * stride_outer + mid * stride_mid + inner * stride_inner)[:, None]
    return pointers, stride_column


@kernel(INTEGERS)
def softmax_fwd_kernel(
    x, mask, y,
    stride_x_o, stride_x_m, stride_x_i, stride_x_c, stride_mask_o, stride_mask_m, stride_mask_i, stride_mask_c,
    stride_y_o, stride_y_m, stride_y_i, stride_y_c,
    num_outer, num_mid, num_inner, num_columns, shift, scale,
    VARIANT: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """y = softmax(scale * x), masked, per row; 0, or -inf in log, where a row keeps nothing.

    One program owns BLOCK_ROWS rows, each within BLOCK_COLUMNS.
    """
    rows = row_coordinates(num_outer, num_mid, num_inner, VARIANT, BLOCK_ROWS)
    xs = row_pointers(x, (stride_x_o, stride_x_m, stride_x_i, stride_x_c), rows, VARIANT)
    ys = row_pointers(y, (stride_y_o, stride_y_m, stride_y_i, stride_y_c), rows, VARIANT)
    masks = mask_pointers(mask, (stride_mask_o, stride_mask_m, stride_mask_i, stride_mask_c), rows)
    num_columns = num_columns * VARIANT.column_unit
    cols = tl.arange(0, BLOCK_COLUMNS)
    scores = load_scores(xs, masks, rows, cols, num_columns, shift, scale, VARIANT)
    row_max = finite_max(tl.max(scores, 1))
    row_sum = tl.sum(tl.exp(scores - row_max[:, None]), 1)
    if not VARIANT.log:
        # To the compiler this is another maximum, so it recomputes the exponentials and only the scores stay in
        # registers, without spills.
        row_max = tl.where(row_sum == row_sum, row_max, float("nan"))
    result = normalised(scores, row_max, tl.where(row_sum == 0.0, 1.0, row_sum), VARIANT)
    store_columns(ys, result, rows, cols, num_columns, VARIANT)


@kernel(INTEGERS)
def softmax_fwd_long_kernel(
    x, mask, y,
    stride_x_o, stride_x_m, stride_x_i, stride_x_c, stride_mask_o, stride_mask_m, stride_mask_i, stride_mask_c,
    stride_y_o, stride_y_m, stride_y_i, stride_y_c,
    num_outer, num_mid, num_inner, num_columns, shift, scale,
    VARIANT: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """y = softmax(scale * x), masked, per row, for rows of any length: maximum and sum online, then the result.

    One program owns BLOCK_ROWS rows. It writes from the end, whose scores were read last.
    """
    rows = row_coordinates(num_outer, num_mid, num_inner, VARIANT, BLOCK_ROWS)
    xs = row_pointers(x, (stride_x_o, stride_x_m, stride_x_i, stride_x_c), rows, VARIANT)
    ys = row_pointers(y, (stride_y_o, stride_y_m, stride_y_i, stride_y_c), rows, VARIANT)
    masks = mask_pointers(mask, (stride_mask_o, stride_mask_m, stride_mask_i, stride_mask_c), rows)
    num_columns = num_columns * VARIANT.column_unit
    num_chunks = tl.cdiv(num_columns, BLOCK_COLUMNS)
    lanes = tl.arange(0, BLOCK_COLUMNS)
    row_max = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
    sums = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
    for chunk in range(num_chunks):
        cols = chunk * BLOCK_COLUMNS + lanes
        scores = load_scores(xs, masks, rows, cols, num_columns, shift, scale, VARIANT)
        new_max = tl.maximum(row_max, tl.max(scores, 1))
        shift_max = finite_max(new_max)
        sums = sums * tl.exp(row_max - shift_max)[:, None] + tl.exp(scores - shift_max[:, None])
        row_max = new_max
    row_sum = tl.sum(sums, 1)
    row_sum = tl.where(row_sum == 0.0, 1.0, row_sum)
    row_max = finite_max(row_max)
    for step in range(num_chunks):
        cols = (num_chunks - 1 - step) * BLOCK_COLUMNS + lanes
        scores = load_scores(xs, masks, rows, cols, num_columns, shift, scale, VARIANT)
        store_columns(ys, normalised(scores, row_max, row_sum, VARIANT), rows, cols, num_columns, VARIANT)


@triton.jit
def load_upstream_grads(y, dy, rows, cols, num_columns, VARIANT: tl.constexpr):
    """(y, dy) of some columns in float32, dy 0 where y is constant or beyond the row."""
    y_pointers, y_step = y
    dy_pointers, dy_step = dy
    inside = rows[3][:, None] & (cols < num_columns)[None, :]
    constant = float("-inf") if VARIANT.log else 0.0
    result = tl.load(y_pointers + column_offsets(cols, y_step, VARIANT), mask=inside, other=constant).to(
        tl.float32
    )
    upstream_grad = tl.load(dy_pointers + column_offsets(cols, dy_step, VARIANT), mask=inside, other=0.0).to(
        tl.float32
    )
    return result, tl.where(result == constant, 0.0, upstream_grad)


@triton.jit
def reduced_terms(y, dy, VARIANT: tl.constexpr):
    """The terms summed over a row: y * dy, in log dy."""
    terms = dy
    if not VARIANT.log:
        terms = y * dy
    return terms


@triton.jit
def input_gradient(y, dy, total, scale, VARIANT: tl.constexpr):
    """scale * y * (dy - total), in log scale * (dy - exp(y) * total); 0 where y is constant."""
    if VARIANT.log:
        gradient = tl.where(y == float("-inf"), 0.0, dy - tl.exp(y) * total[:, None])
    else:
        gradient = tl.where(y == 0.0, 0.0, y * (dy - total[:, None]))
    return gradient * scale


@kernel(INTEGERS)
def softmax_bwd_kernel(
    y, dy, dx,
    stride_y_o, stride_y_m, stride_y_i, stride_y_c, stride_dy_o, stride_dy_m, stride_dy_i, stride_dy_c,
    stride_dx_o, stride_dx_m, stride_dx_i, stride_dx_c,
    num_outer, num_mid, num_inner, num_columns, scale,
    VARIANT: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """dx = scale * y * (dy - sum(y * dy)), in log scale * (dy - exp(y) * sum(dy)), per row.

    One program owns BLOCK_ROWS rows, each within BLOCK_COLUMNS.
    """
    rows = row_coordinates(num_outer, num_mid, num_inner, VARIANT, BLOCK_ROWS)
    ys = row_pointers(y, (stride_y_o, stride_y_m, stride_y_i, stride_y_c), rows, VARIANT)
    dys = row_pointers(dy, (stride_dy_o, stride_dy_m, stride_dy_i, stride_dy_c), rows, VARIANT)
    dxs = row_pointers(dx, (stride_dx_o, stride_dx_m, stride_dx_i, stride_dx_c), rows, VARIANT)
    num_columns = num_columns * VARIANT.column_unit
    cols = tl.arange(0, BLOCK_COLUMNS)
    result, upstream_grad = load_upstream_grads(ys, dys, rows, cols, num_columns, VARIANT)
    total = tl.sum(reduced_terms(result, upstream_grad, VARIANT), 1)
    gradient = input_gradient(result, upstream_grad, total, scale, VARIANT)
    store_columns(dxs, gradient, rows, cols, num_columns, VARIANT)


@kernel(INTEGERS)
def softmax_bwd_long_kernel(
    y, dy, dx,
    stride_y_o, stride_y_m, stride_y_i, stride_y_c, stride_dy_o, stride_dy_m, stride_dy_i, stride_dy_c,
    stride_dx_o, stride_dx_m, stride_dx_i, stride_dx_c,
    num_outer, num_mid, num_inner, num_columns, scale,
    VARIANT: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """The same for rows of any length: the sum first, then the gradient from the end, which was read last.

    One program owns BLOCK_ROWS rows.
    """
    rows = row_coordinates(num_outer, num_mid, num_inner, VARIANT, BLOCK_ROWS)
    ys = row_pointers(y, (stride_y_o, stride_y_m, stride_y_i, stride_y_c), rows, VARIANT)
    dys = row_pointers(dy, (stride_dy_o, stride_dy_m, stride_dy_i, stride_dy_c), rows, VARIANT)
    dxs = row_pointers(dx, (stride_dx_o, stride_dx_m, stride_dx_i, stride_dx_c), rows, VARIANT)
    num_columns = num_columns * VARIANT.column_unit
    num_chunks = tl.cdiv(num_columns, BLOCK_COLUMNS)
    lanes = tl.arange(0, BLOCK_COLUMNS)
    sums = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
    for chunk in range(num_chunks):
        cols = chunk * BLOCK_COLUMNS + lanes
        result, upstream_grad = load_upstream_grads(ys, dys, rows, cols, num_columns, VARIANT)
        sums += reduced_terms(result, upstream_grad, VARIANT)
    total = tl.sum(sums, 1)
    for step in range(num_chunks):
        cols = (num_chunks - 1 - step) * BLOCK_COLUMNS + lanes
        result, upstream_grad = load_upstream_grads(ys, dys, rows, cols, num_columns, VARIANT)
        gradient = input_gradient(result, upstream_grad, total, scale, VARIANT)
        store_columns(dxs, gradient, rows, cols, num_columns, VARIANT)
