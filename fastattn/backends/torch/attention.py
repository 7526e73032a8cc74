"""Attention in torch operations: torch's fused CPU kernel where it can express a tile, blockwise softmax elsewhere.

Forward and backward need O(S) memory: tiles come from `schedule`, what no query sees is never visited.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from fastattn import torch_compat
from fastattn.backends.torch import fused as torch_kernel
from fastattn.backends.torch import ragged_query, segmented, single_query, whole_rows
from fastattn.backends.torch.blockwise import RowStatistics, blockwise_rows, blockwise_tile_bwd
from fastattn.backends.torch.dense import (
    FUSED_BWD_MIN_KEYS,
    additive,
    dense_bwd,
    fused_bwd_min_keys,
    prefers_whole_rows_bwd,
    runs_dense,
)
from fastattn.backends.torch.fused import (
    fused_mask,
    fused_rows,
    fused_tile_bwd,
    fused_whole_bwd,
    kv_head_chunks,
)
from fastattn.backends.torch.gradient_sums import GradientSums
from fastattn.backends.torch.parts import (
    COL_BLOCK,
    FUSED_ROW_BLOCK,
    ROW_BLOCK,
    Part,
    cols_of,
    merged,
    one_sequence,
    parts,
    rows_of,
)
from fastattn.backends.torch.references import delta_of, dsinks, is_extreme, references
from fastattn.backends.torch.schedule import Tile
from fastattn.spec import (
    AttentionCall,
    AttentionGrads,
    AttentionSpec,
    GradsNeeded,
    KVCacheCall,
    accumulation_dtype,
)
from fastattn.strides import empty_in_order, in_order


def tiles(spec: AttentionSpec) -> str:
    """The implementation of a tile, and its rows and columns."""
    if ragged_query.can_run(spec) and not spec.backward:
        return single_query.tiles(spec)
    usual = f"blockwise softmax in torch operations, {ROW_BLOCK}x{COL_BLOCK}"
    if torch_kernel.can_run(spec) and not (spec.backward and spec.single_query):
        usual = f"torch's fused CPU kernel, {FUSED_ROW_BLOCK} rows at a time along a window or mask"
    narrow_bwd = spec.backward and spec.dtype.itemsize < 4
    if not (spec.dropout or narrow_bwd):
        return usual
    most = f"{fused_bwd_min_keys(spec.dtype) - 1} keys and {whole_rows.ELEMENTS // 2} weights of a key head"
    if segmented.can_run(spec):
        most = f"{whole_rows.ELEMENTS} weights of all heads in a run of a segment" if spec.dropout else most
    elif not whole_rows.may_run(spec):
        return usual
    elif spec.dropout:
        most = f"{whole_rows.ELEMENTS // 2} weights of a key head"
    return f"softmax of whole rows in torch operations up to {most}, beyond {usual}"


def attention_fwd(spec: AttentionSpec, call: AttentionCall, first_sequence: int = 0) -> tuple[Tensor, Tensor]:
    """(out, lse) of a call whose batch starts at `first_sequence` of the dropout stream."""
    if (spec.segments or spec.key_lengths) and ragged_query.can_run(spec):
        out, lse = ragged_query.ragged_query(call, partial(_by_tiles, spec))
        out = in_order(out, call.query)
    else:
        out, lse = _by_tiles(spec, call, first_sequence)
    return with_sinks(call, out, lse)


def _by_tiles(spec: AttentionSpec, call: AttentionCall, first_sequence: int = 0) -> tuple[Tensor, Tensor]:
    """(out, lse) without sinks."""
    if spec.dropout and _whole_rows_can_run(spec, call):
        if segmented.can_run(spec):
            alone = partial(_by_tiles, spec.replace(segments=False))
            found = segmented.attention_fwd(call, first_sequence, alone)
        else:
            found = whole_rows.attention_fwd(call, first_sequence)
        if found is not None:
            return found
        if call.query.shape[0] > 1:
            return _one_by_one(spec, call, first_sequence)
    fused = torch_kernel.can_run(spec) and call.scale > 0
    run = fused_rows if fused else blockwise_rows
    if single_query.can_run(spec):
        fused, run = True, _single_query_rows
    shape = (*call.query.shape[:3], spec.value_dim)
    out: Tensor | None = None
    for part in parts(call, first_sequence):
        for row_tiles in part.schedule(fused):
            out_rows, lse_rows = run(part, row_tiles)
            if out is None:
                if out_rows.shape == shape:  # these rows are the whole result
                    return in_order(out_rows, call.query), lse_rows.contiguous()
                out, lse = nothing_seen(call, shape)
            tile = row_tiles[0]
            rows_of(part.of(out), tile).copy_(out_rows)
            rows_of(part.of(lse), tile).copy_(lse_rows)
    if out is None:
        return nothing_seen(call, shape)
    return out, lse


def attention_bwd(
    spec: AttentionSpec,
    call: AttentionCall,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor | None,
    needs: GradsNeeded,
    first_sequence: int = 0,
) -> AttentionGrads:
    """Gradients of (out, lse), recomputed from lse tile by tile in a fixed order."""
    lse_safe, has_nan = references(lse)
    extreme = is_extreme(call, lse)
    if lse_safe is lse and dlse is None and runs_dense(spec, call) and not has_nan:
        return _few_keys_bwd(call, dout)
    given = call, out, lse, dout, dlse
    several, found = call.query.shape[0] > 1, None
    if has_nan and several and not (needs.bias or needs.alibi_slopes or needs.sinks):
        return _one_by_one_bwd(partial(_alone_bwd, spec, needs), *given, first_sequence)
    if prefers_whole_rows_bwd(spec, call.key.shape[2]) and _whole_rows_can_run(spec, call):
        if segmented.can_run(spec) and not has_nan:
            alone_bwd = partial(_alone_bwd, spec.replace(segments=False), needs)
            found = segmented.attention_bwd(spec, *given, first_sequence, alone_bwd)
        elif lse_safe is lse and not has_nan:
            found = whole_rows.attention_bwd(call, dout, dlse, first_sequence)
        if found is not None:
            return found
        if several:
            return _one_by_one_bwd(partial(_alone_bwd, spec, needs), *given, first_sequence)
    forward_fused = torch_kernel.can_run(spec.replace(bias_grad=False, alibi_grad=False)) and call.scale > 0
    forward_fused = forward_fused or ragged_query.can_run(spec)
    fused = forward_fused and not (spec.bias_grad or spec.alibi_grad or extreme or has_nan) and dlse is None
    fused = fused and not spec.single_query and call.key.shape[2] >= FUSED_BWD_MIN_KEYS
    fused = fused and torch_compat.has_cpu_flash_attention(backward=True)
    delta = None if fused and not needs.sinks else delta_of(out, lse, dout, dlse)
    # lse of the fused forward came from products that round differently: where a tile holds a whole row, its weights
    # are made to sum to 1 again.
    normalise = not fused and (forward_fused or extreme)
    sink_weight = None if call.sinks is None else torch.exp(call.sinks[:, None] - lse_safe)
    sums: GradientSums | None = None
    for part in parts(call, first_sequence):
        for row_tiles in part.schedule(fused, whole_rows=extreme):
            for tile in row_tiles:
                if fused:
                    if sums is None and len(row_tiles) == 1 and part.is_whole(tile):
                        shares = fused_whole_bwd(part, tile, out, lse_safe, dout)
                        dq, dk, dv = (
                            in_order(g, t) for g, t in zip(shares, (call.query, call.key, call.value))
                        )
                        return AttentionGrads(dq, dk, dv, sinks=dsinks(sink_weight, delta, needs))
                    sums = sums or GradientSums(call, needs.bias, needs.alibi_slopes)
                    mask = fused_mask(part, tile)
                    for kv_heads in kv_head_chunks(part, tile):
                        shares = fused_tile_bwd(part, tile, mask, out, lse_safe, dout, kv_heads)
                        sums.add(part, tile, kv_heads, *shares)
                        del shares  # free these before the next are allocated
                else:
                    sums = sums or GradientSums(call, needs.bias, needs.alibi_slopes)
                    alone = len(row_tiles) == 1
                    rows = RowStatistics(
                        lse_safe, delta, dlse, sink_weight, alone and normalise, alone, has_nan
                    )  # fmt: skip
                    blockwise_tile_bwd(part, tile, rows, dout, sums)
    sums = sums or GradientSums(call, needs.bias, needs.alibi_slopes)
    return AttentionGrads(*sums.results(), dsinks(sink_weight, delta, needs))


def _whole_rows_can_run(spec: AttentionSpec, call: AttentionCall) -> bool:
    """Whether softmax of whole rows may give the results of each sequence."""
    return segmented.can_run(spec) or whole_rows.can_run(spec, call)


def _one_by_one(spec: AttentionSpec, call: AttentionCall, first_sequence: int) -> tuple[Tensor, Tensor]:
    """(out, lse) sequence by sequence, where one of them cannot run as the others: it changes no bit of theirs."""
    found = [_by_tiles(spec, one_sequence(call, b), first_sequence + b) for b in range(call.query.shape[0])]
    out, lse = (torch.cat(results) for results in zip(*found))
    return in_order(out, call.query), lse


def _one_by_one_bwd(
    run: Callable[..., AttentionGrads], call: AttentionCall, out: Tensor, lse: Tensor, dout: Tensor,
    dlse: Tensor | None, first_sequence: int,
) -> AttentionGrads:  # fmt: skip
    """The gradients likewise."""
    grads = tuple(empty_in_order(t, tuple(t.shape)) for t in (call.query, call.key, call.value))
    for b in range(call.query.shape[0]):
        row = slice(b, b + 1)
        of_lse = None if dlse is None else dlse[row]
        found = run(one_sequence(call, b), out[row], lse[row], dout[row], of_lse, first_sequence + b)
        for grad, share in zip(grads, (found.query, found.key, found.value)):
            if share is not None:
                grad[row] = share
    return AttentionGrads(*grads)


def _alone_bwd(
    spec: AttentionSpec, needs: GradsNeeded, call: AttentionCall, out: Tensor, lse: Tensor, dout: Tensor,
    dlse: Tensor | None, number: int,
) -> AttentionGrads:  # fmt: skip
    """The gradients of one sequence, `number` of the dropout stream."""
    return attention_bwd(spec, call, out, lse, dout, dlse, needs, number)


def _single_query_rows(part: Part, row_tiles: list[Tile]) -> tuple[Tensor, Tensor]:
    """The one row of a call, which sees every key of its one tile."""
    key, value = (cols_of(t, row_tiles[0]) for t in (part.key, part.value))
    return single_query.single_query(part.query, key, value, part.call.scale)


def _few_keys_bwd(call: AttentionCall, dout: Tensor) -> AttentionGrads:
    """The gradients of a call of few keys all of whose rows see some."""
    if not call.query.numel():
        return AttentionGrads(*(torch.zeros_like(t) for t in (call.query, call.key, call.value)))
    (part,) = parts(call)
    rows, cols = range(call.query.shape[2]), range(call.key.shape[2])
    hidden = part.hidden(Tile(rows, cols, "masked"))
    mask = additive(hidden, call.group_size, call.query.dtype)
    return dense_bwd(call.query, call.key, call.value, dout, call.scale, mask)


def nothing_seen(call: AttentionCall, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """(out, lse) of rows that see no key."""
    lse = call.query.new_full(shape[:3], -torch.inf, dtype=accumulation_dtype(call.query.dtype))
    return empty_in_order(call.query, shape).zero_(), lse


def with_sinks(call: AttentionCall | KVCacheCall, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """(out, lse) once each head's sink joins the softmax."""
    if call.sinks is None:
        return out, lse
    total, share, _ = merged(lse, call.sinks[:, None])
    return out.mul_(share[..., None]), total
