"""Cross-entropy of rows of logits: an online pass for the loss, an elementwise one for its gradient."""

# mypy: allow-untyped-defs, allow-incomplete-defs

import triton.language as tl

from .jit import kernel
from .primitives import program_coordinates
from .softmax import finite_max

INTEGERS = ("num_classes", "ignore_index", "stride_logits", "stride_dlogits")


@kernel(INTEGERS)
def cross_entropy_fwd_kernel(
    logits, target, class_weight, weight_mean, losses, norms,
    stride_logits, num_classes, ignore_index, smoothing, z_loss,
    UNIT: tl.constexpr, COLUMN_UNIT: tl.constexpr, SMOOTHED: tl.constexpr, Z_LOSS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """loss = log(sum(exp(z - m))) + m - (1 - s) * z[target] - s * mean(z), m = max(z); norms = (m, the logarithm).

    With class weights w, lse = m + the logarithm: (1 - s) * w[target] * (lse - z[target]) + s * mean(w * (lse - z)).
    Z_LOSS adds z_loss * lse**2. One program owns one row. An ignored row has loss 0 and is not read; a target that is
    not a class gives NaN.
    """
    row = tl.program_id(0).to(tl.int64)
    num_classes = num_classes * COLUMN_UNIT
    chosen = tl.load(target + row)
    kept = chosen != ignore_index
    z = logits + row * stride_logits * UNIT
    lanes = tl.arange(0, BLOCK)
    largest = float("-inf")
    sums = tl.zeros([BLOCK], tl.float32)
    plain_sums = tl.zeros([BLOCK], tl.float32)
    for chunk in range(tl.where(kept, tl.cdiv(num_classes, BLOCK), 0)):
        cols = chunk * BLOCK + lanes
        inside = cols < num_classes
        values = tl.load(z + cols, mask=inside, other=float("-inf")).to(tl.float32)
        new_largest = tl.maximum(largest, tl.max(values, 0))
        shift = finite_max(new_largest)
        sums = sums * tl.exp(largest - shift) + tl.exp(values - shift)
        if SMOOTHED:
            if class_weight is not None:
                values *= tl.load(class_weight + cols, mask=inside, other=0.0)
            plain_sums += tl.where(inside, values, 0.0)
        largest = new_largest
    log_sum = tl.log(tl.where(kept, tl.sum(sums, 0), 1.0))
    valid = (chosen >= 0) & (chosen < num_classes)
    value = tl.load(z + chosen, mask=valid & kept, other=float("nan")).to(tl.float32)
    if class_weight is not None:
        own = tl.load(class_weight + chosen, mask=valid & kept, other=0.0) * (1.0 - smoothing)
        loss = own * (log_sum + (largest - value))
        if SMOOTHED:
            mean = tl.load(weight_mean)
            loss += smoothing * (mean * log_sum + (mean * largest - tl.sum(plain_sums, 0) / num_classes))
    elif SMOOTHED:
        mean = tl.sum(plain_sums, 0) / num_classes
        loss = log_sum + ((1.0 - smoothing) * (largest - value) + smoothing * (largest - mean))
    else:
        loss = log_sum + (largest - value)
    if Z_LOSS:
        loss += z_loss * (largest + log_sum) * (largest + log_sum)
    tl.store(losses + row, tl.where(kept, loss, 0.0))
    tl.store(norms + 2 * row, largest)
    tl.store(norms + 2 * row + 1, log_sum)


@kernel(INTEGERS)
def cross_entropy_bwd_kernel(
    logits, target, class_weight, weight_mean, norms, dlosses, dlogits,
    stride_logits, stride_dlogits, num_classes, ignore_index, smoothing, z_loss,
    UNIT: tl.constexpr, COLUMN_UNIT: tl.constexpr, SMOOTHED: tl.constexpr, Z_LOSS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dlogits = dloss * (exp(z - m - log sum) - (1 - s) * [target] - s / classes); 0 in an ignored row.

    With class weights w: ((1 - s) * w[target] + s * mean(w)) * exp(...) - (1 - s) * w[target] * [target] - s * w / V.
    Z_LOSS adds 2 * z_loss * (m + log sum) * exp(...).
    One program owns a part of one row, and writes only where it has read: dlogits may be the logits.
    """
    num_classes = num_classes * COLUMN_UNIT
    parts = tl.cdiv(num_classes, BLOCK)
    part, row, _ = program_coordinates(parts, 1, False)
    row = row.to(tl.int64)
    cols = part * BLOCK + tl.arange(0, BLOCK)
    chosen = tl.load(target + row)
    kept = chosen != ignore_index
    end = tl.where(kept, num_classes, 0)
    dloss = tl.load(dlosses + row).to(tl.float32)
    largest = tl.load(norms + 2 * row)
    log_sum = tl.load(norms + 2 * row + 1)
    z = logits + row * stride_logits * UNIT
    values = tl.load(z + cols, mask=cols < end, other=0.0).to(tl.float32)
    probs = tl.exp(values - largest - log_sum)
    valid = (chosen >= 0) & (chosen < num_classes)
    own = 1.0
    if SMOOTHED:
        own = 1.0 - smoothing
    factor = 1.0
    if class_weight is not None:
        own *= tl.load(class_weight + chosen, mask=valid & kept, other=0.0)
        factor = own
        if SMOOTHED:
            factor += smoothing * tl.load(weight_mean)
    if Z_LOSS:
        factor += 2.0 * z_loss * (largest + log_sum)
        probs *= factor
    elif class_weight is not None:
        probs *= factor
    if SMOOTHED:
        everywhere = smoothing / num_classes
        if class_weight is not None:
            everywhere *= tl.load(class_weight + cols, mask=cols < end, other=0.0)
        probs -= everywhere
    gradient = dloss * tl.where(cols == chosen, probs - own, probs)
    gradient = tl.where(kept, tl.where(valid, gradient, float("nan")), 0.0)
    target_row = dlogits + row * stride_dlogits * UNIT
    tl.store(target_row + cols, gradient.to(dlogits.dtype.element_ty), mask=cols < num_classes)
