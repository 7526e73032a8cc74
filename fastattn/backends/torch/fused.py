"""Tiles by torch's fused CPU attention: forward, backward, and the rows in which its results are not ours."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from fastattn import torch_compat
from fastattn.backends.torch.gradient_sums import query_heads
from fastattn.backends.torch.parts import COL_BLOCK, ROW_BLOCK, Part, cols_of, merged, rows_of
from fastattn.backends.torch.schedule import Tile
from fastattn.integers import cdiv
from fastattn.spec import AttentionCall, AttentionSpec
from fastattn.strides import empty_in_order

FOLDED_MAX_DIM = 128  # head dims from which more rows take the kernel longer than to read the keys again
FEW_ROWS = 64  # row statistics of at most so many rows are checked in Python, without an operation
# the integers of a dtype's size, and the one with the bits of -inf
_MINUS_INFINITY = {
    dtype: (integer, int(torch.tensor(-torch.inf, dtype=dtype, device="cpu").view(integer)))
    for dtype, integer in (
        (torch.float64, torch.int64), (torch.float32, torch.int32), (torch.bfloat16, torch.int16),
        (torch.float16, torch.int16),
    )
}  # fmt: skip
SEQUENCES_MIN_ELEMENTS = 2**16  # of the queries, from which on copying results takes longer than making views
FUSED_SHARE_BYTES = 2**21  # gradients of a tile larger than this are computed some heads at a time


def can_run(spec: AttentionSpec) -> bool:
    """Whether torch's fused CPU kernel can express the tiles of a call."""
    if not torch_compat.has_cpu_flash_attention(backward=False):
        return False
    if spec.device != "cpu" or spec.softcap or spec.dropout or spec.bias_grad or spec.alibi_grad:
        return False
    # in dims that are not multiples of 8 its products round worse than the rule
    if spec.head_dim != spec.value_dim or spec.head_dim % 8:
        return False
    exact = spec.dtype in (torch.float32, torch.float64)  # additive terms reach the kernel in the input dtype
    return exact or not (spec.bias or spec.alibi)


def fused_rows(part: Part, row_tiles: list[Tile]) -> tuple[Tensor, Tensor]:
    """One row range by torch's fused kernel; its at most two tiles are merged by their lse."""
    out: Tensor | None = None
    for tile in row_tiles:
        mask = fused_mask(part, tile)
        query, key, value = rows_of(part.query, tile), cols_of(part.key, tile), cols_of(part.value, tile)
        if mask is not None and folds(query, key):
            tile_out, tile_lse = folded(query, key, value, mask, part.call.scale)
        elif mask is None and are_sequences(query, key, value):
            q, k, v = map(as_sequences, (query, key, value))
            tile_out, tile_lse = torch_compat.cpu_flash_attention(
                q, k, v, tile.structure == "causal", None, part.call.scale
            )
            tile_out, tile_lse = tile_out.view(query.shape), tile_lse.view(query.shape[:3])
        else:
            tile_out, tile_lse = torch_compat.cpu_flash_attention(
                query, key, value, tile.structure == "causal", mask, part.call.scale
            )
        tile_out, tile_lse = _with_irregular_rows(part, tile, mask, tile_out, tile_lse)
        if out is None:
            out, lse = tile_out, tile_lse
        else:
            lse, share, tile_share = merged(lse, tile_lse)
            out = out * share[..., None] + tile_out * tile_share[..., None]
    assert out is not None
    return (out if out.dtype == part.query.dtype else out.to(part.query.dtype)), lse


def are_sequences(query: Tensor, key: Tensor, *others: Tensor) -> bool:
    """Whether every head may be a sequence of its own to the kernel, for which heads share no keys.

    Its results lie in the order (B, S, H, D); those of sequences of one head are contiguous, as these tensors are, so
    that none has to be copied. Views take longer than to copy few elements.
    """
    if query.numel() < SEQUENCES_MIN_ELEMENTS:
        return False
    contiguous = query.is_contiguous() and key.is_contiguous() and all(t.is_contiguous() for t in others)
    return contiguous and query.shape[1] == key.shape[1]


def as_sequences(tensor: Tensor) -> Tensor:
    """(B, H, S, D) as (B * H, 1, S, D), and (B, H, S) as (B * H, 1, S)."""
    batch, heads, *rest = tensor.shape
    return tensor.view(batch * heads, 1, *rest)


def folds(query: Tensor, key: Tensor) -> bool:
    """Whether the query heads of a key head are rows of one matrix to the kernel, which reads the keys once for all."""
    return query.shape[2] == 1 and key.shape[1] < query.shape[1] and query.shape[3] < FOLDED_MAX_DIM


def folded(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """(out, lse), (B, H, 1, D) and (B, H, 1), of one query of heads that share keys, by torch's fused kernel.

    mask: additive, (1 or B, 1 or H, 1, Sk), or (1, Sk).
    """
    batch, num_heads, _, dim = query.shape
    groups = (num_kv_heads := key.shape[1], num_heads // num_kv_heads)
    if mask.dim() == 4 and mask.shape[1] > 1:
        mask = mask.reshape(mask.shape[0], *groups, mask.shape[3])
    out, lse = torch_compat.cpu_flash_attention(
        query.reshape(batch, *groups, dim), key, value, False, mask, scale
    )
    return out.reshape(batch, num_heads, 1, dim), lse.reshape(batch, num_heads, 1)


def fused_tile_bwd(
    part: Part,
    tile: Tile,
    mask: Tensor | None,
    out: Tensor,
    lse_safe: Tensor,
    dout: Tensor,
    kv_heads: slice | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """A tile's share of dq, dk and dv, of some key heads and the query heads they serve, or of all.

    mask: `fused_mask` of the tile, the same for all its heads, so that it is made once.
    """
    kv_heads = kv_heads or slice(0, part.key.shape[1])
    heads = query_heads(part, kv_heads)
    key, value = (cols_of(t[:, kv_heads], tile) for t in (part.key, part.value))
    dout, query, out, lse_safe = (
        rows_of(t[:, heads], tile) for t in (part.of(dout), part.query, part.of(out), part.of(lse_safe))
    )
    group_size = part.call.group_size
    if group_size > 1:  # the kernel sums a group over all its rows at once, which rounds worse than per head
        key, value = (t.repeat_interleave(group_size, dim=1) for t in (key, value))
    if mask is not None and mask.dim() == 4 and mask.shape[1] > 1:
        mask = mask[:, heads]
    causal, scale = tile.structure == "causal", part.call.scale
    run = torch_compat.cpu_flash_attention_backward
    if mask is None and are_sequences(query, key, value, dout, out, lse_safe):
        do, q, k, v, o, lse = map(as_sequences, (dout, query, key, value, out, lse_safe))
        dq, dk, dv = run(do, q, k, v, o, lse, causal, None, scale)
        dq, dk, dv = dq.view(query.shape), dk.view(key.shape), dv.view(value.shape)
    else:
        dq, dk, dv = run(dout, query, key, value, out, lse_safe, causal, mask, scale)
    if group_size > 1:
        dk, dv = (g.unflatten(1, (g.shape[1] // group_size, group_size)).sum(2) for g in (dk, dv))
    return dq, dk, dv


def fused_whole_bwd(
    part: Part, tile: Tile, out: Tensor, lse_safe: Tensor, dout: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv of a call of one tile. Where heads share keys, some heads at a time: the kernel is given keys and
    values repeated, and gives a share of their gradients for every query head."""
    call = part.call
    chunks, mask = [*kv_head_chunks(part, tile)], fused_mask(part, tile)
    if call.group_size == 1 or len(chunks) == 1:
        return fused_tile_bwd(part, tile, mask, out, lse_safe, dout)
    grads = tuple(empty_in_order(t, tuple(t.shape)) for t in (call.query, call.key, call.value))
    for kv_heads in chunks:
        shares = fused_tile_bwd(part, tile, mask, out, lse_safe, dout, kv_heads)
        for grad, share, heads in zip(grads, shares, (query_heads(part, kv_heads), kv_heads, kv_heads)):
            grad[:, heads] = share
        del shares  # free these before the next are allocated
    dq, dk, dv = grads
    return dq, dk, dv


def kv_head_chunks(part: Part, tile: Tile) -> Iterator[slice]:
    """The key heads in runs whose shares of a tile's gradients stay small, yet give every thread a query head."""
    batch, num_kv_heads = part.key.shape[:2]
    shared_by = part.call.group_size
    per_head = batch * max(len(tile.rows), len(tile.cols)) * part.key.shape[3] * part.key.element_size()
    of_every_thread = cdiv(torch.get_num_threads(), max(batch * shared_by, 1))
    chunk = max(FUSED_SHARE_BYTES // max(per_head * shared_by, 1), of_every_thread)
    for start in range(0, num_kv_heads, chunk):
        yield slice(start, min(start + chunk, num_kv_heads))


def fused_mask(part: Part, tile: Tile) -> Tensor | None:
    """The tile's additive mask in the input dtype, or None where every pair is visible."""
    if tile.structure == "causal":
        return None
    mask, visible = part.additive(tile), part.visible(tile)
    if visible is None:
        return mask
    if mask is None:
        return _penalties(visible, part.query.dtype)
    if part.call.bias is None and visible.dim() == 2 and _slopes_stay_finite(part.call):
        # torch.where is not vectorized: it takes four times as long for a tile of every head
        return mask.add_(_penalties(visible, mask.dtype))
    return torch.where(visible, mask, -torch.inf)


def _penalties(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where a pair is visible, -inf elsewhere.

    By integers, which is faster than torch.where: 1 - 1 is 0, and 0 - 1 has every bit, of which those of -inf are kept.
    """
    integer, bits = _MINUS_INFINITY[dtype]
    return visible.to(integer).sub_(1).bitwise_and_(bits).view(dtype)


def _slopes_stay_finite(call: AttentionCall) -> bool:
    """Whether every alibi term of a call is finite, so that -inf may be added to it."""
    assert call.alibi_slopes is not None
    farthest = call.query.shape[2] + call.key.shape[2]
    return call.alibi_slopes.abs().amax().item() * farthest < torch.finfo(torch.float32).max


def _with_irregular_rows(
    part: Part, tile: Tile, mask: Tensor | None, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor]:
    """The results of torch's fused kernel on a tile, corrected in rows without a finite largest score.

    The kernel gives out 0 and lse 0 where it finds no largest score: in a row that sees nothing, one whose scores are
    all -inf and, depending on their number, one whose scores are NaN. A largest score of +inf becomes its lse. All
    other rows with a NaN have NaN in both. An lse without 0, +inf and NaN therefore needs no correction.
    """
    if not lse.numel() or is_regular(lse):
        return out, lse
    if mask is not None:
        seen = mask.amax(-1) != -torch.inf
        out, lse = out.masked_fill(~seen[..., None], 0), lse.masked_fill(~seen, -torch.inf)
    lse = lse.masked_fill(lse == torch.inf, torch.nan)
    doubtful = (lse == 0) & (out == 0).all(-1)
    if bool(doubtful.any()):
        largest = _largest_scores(part, tile)
        lse = torch.where(doubtful & ~(largest < torch.inf), torch.nan, lse)  # +inf or NaN
        lse = torch.where(doubtful & (largest == -torch.inf), -torch.inf, lse)
    return out.masked_fill(lse.isnan()[..., None], torch.nan), lse


def is_regular(lse: Tensor) -> bool:
    """Whether the fused kernel gave no row the lse 0, +inf or NaN: (B, H, rows) or (H, rows)."""
    if lse.numel() <= FEW_ROWS:
        rows = lse.ravel().tolist()
        if 0.0 < abs(math.prod(rows)) < math.inf:
            return True
        total = sum(rows)  # float32 is summed in float64, which finite numbers cannot overflow
        return total - total == 0.0 and 0.0 not in rows
    lowest, highest = torch.aminmax(lse)  # both NaN if one element is
    most = highest.item()
    return most < torch.inf and (lowest.item() > 0 or most < 0 or bool(lse.all()))


def is_finite(lse: Tensor) -> bool:
    """Whether every row has a finite lse: (B, H, rows) or (H, rows)."""
    if lse.numel() <= FEW_ROWS:
        total = sum(lse.ravel().tolist())
        return total - total == 0.0
    lowest, highest = torch.aminmax(lse)
    return bool(lowest.item() > -torch.inf and highest.item() < torch.inf)


def _largest_scores(part: Part, tile: Tile) -> Tensor:
    """The largest score of each row of a tile, NaN if one is NaN: (b, H, rows), in O(rows) memory."""
    found = []
    for start in range(tile.rows.start, tile.rows.stop, ROW_BLOCK):
        rows = range(start, min(start + ROW_BLOCK, tile.rows.stop))
        largest: Tensor | None = None
        for first in range(tile.cols.start, tile.cols.stop, COL_BLOCK):
            cols = range(first, min(first + COL_BLOCK, tile.cols.stop))
            of_block = part.scores(Tile(rows, cols, "masked"))[0].amax(-1)
            largest = of_block if largest is None else torch.maximum(largest, of_block)
        assert largest is not None
        found.append(largest)
    return torch.cat(found, dim=-1)
