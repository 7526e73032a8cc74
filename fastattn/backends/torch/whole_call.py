"""Plans of calls that are one tile to torch's fused CPU attention, so that nothing has to be cut."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastattn import torch_compat
from fastattn.backends.torch import fused, single_query
from fastattn.backends.torch.attention import attention_fwd
from fastattn.backends.torch.dense import (
    FUSED_BWD_MIN_KEYS,
    additive,
    dense_bwd,
    prefers_whole_rows_bwd,
    runs_dense,
)
from fastattn.backends.torch.parts import parts
from fastattn.backends.torch.schedule import Tile
from fastattn.spec import AttentionCall, AttentionGrads, AttentionSpec, GradsNeeded, KVCacheCall
from fastattn.strides import in_order, strides_in_order
from fastattn.visibility import distances

Forward = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, "Tensor | None"]]
Masked = Callable[[Tensor, Tensor, Tensor, Tensor], "tuple[Tensor, Tensor | None] | None"]
Cached = Callable[[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, int], Any]
Backward = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], AttentionGrads | None]


def attention_fwd_plan(
    spec: AttentionSpec, call: AttentionCall, lse_in_order: bool, wants_lse: bool
) -> Forward | None:
    """(query, key, value) -> (out, lse) for calls like this one, as `attention_fwd`; None where it needs more tiles.

    lse_in_order: lse is contiguous.
    wants_lse: otherwise it may be None.
    """
    tile = _only_tile(spec, call)
    if tile is None:
        return None
    if single_query.can_run(spec):
        return _single_query_plan(spec, call, wants_lse)
    causal, scale = tile.structure == "causal", call.scale
    strides = strides_in_order(call.query.stride(), (*call.query.shape[:3], spec.value_dim))
    options: dict[str, Any] = {
        "causal": call.causal,
        "window_left": call.window_left,
        "window_right": call.window_right,
    }
    flash = torch_compat.cpu_flash_kernel()
    if fused.are_sequences(call.query, call.key, call.value):
        shape, of_lse = call.query.shape, call.query.shape[:3]
        rows, cols = (fused.as_sequences(t).shape for t in (call.query, call.key))

        def run_apart(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
            out, lse = flash(query.view(rows), key.view(cols), value.view(cols), 0.0, causal, scale=scale)
            if not fused.is_regular(lse):
                return attention_fwd(spec, AttentionCall(query, key, value, scale=scale, **options))
            return out.view(shape), lse.view(of_lse)

        return run_apart

    def run(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = flash(query, key, value, 0.0, causal, scale=scale)
        if not fused.is_regular(lse):
            return attention_fwd(spec, AttentionCall(query, key, value, scale=scale, **options))
        if out.stride() != strides:
            out = in_order(out, query)
        return out, lse.contiguous() if lse_in_order else lse

    return run


def _single_query_plan(spec: AttentionSpec, call: AttentionCall, wants_lse: bool) -> Forward:
    """`single_query` with all that follows from the shapes and strides of a call worked out."""
    batch, num_heads, _, dim = call.query.shape
    num_kv_heads, seqlen, value_dim = call.key.shape[1], call.key.shape[2], spec.value_dim
    group_size, scale = spec.group_size, call.scale
    elements, shape = num_kv_heads * seqlen * dim, (batch, num_heads, 1, value_dim)
    folded_shape = (batch, num_kv_heads, group_size, dim)
    in_products = single_query.in_one_product(call.key, call.value, spec.dtype, elements)
    groups, strides = batch * num_kv_heads, strides_in_order(call.query.stride(), shape)
    k_matrices, v_matrices = ((groups, seqlen, n) for n in (dim, value_dim))
    k_strides: tuple[int, ...] = ()
    v_strides: tuple[int, ...] = ()
    if in_products:
        k_strides, v_strides = (single_query.merged(t).stride() for t in (call.key, call.value))
    most_fused = _most_fused_keys(spec, num_kv_heads, scale)
    flash = torch_compat.cpu_flash_kernel()

    def run(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor | None]:
        lse: Tensor | None
        several = torch.get_num_threads() > 1
        if seqlen <= most_fused[several]:
            rows = query if group_size == 1 else query.reshape(folded_shape)
            # without the function around the kernel, which small calls notice, but for a lone matrix
            kernel = single_query.fused_rows if several and groups == 1 else flash
            out, lse = kernel(rows, key, value, scale=scale)
            if fused.is_regular(lse):
                out = out if group_size == 1 else out.reshape(shape)
                lse = lse.reshape(batch, num_heads, 1).contiguous() if wants_lse else None
                return (out if out.stride() == strides else in_order(out, query)), lse
        elif in_products:
            out, lse = single_query.products(
                query.reshape(groups, group_size, dim),
                key.as_strided(k_matrices, k_strides),
                value.as_strided(v_matrices, v_strides),
                scale, elements, True, 1, wants_lse,
            )  # fmt: skip
            out, lse = out.view(shape), None if lse is None else lse.view(batch, num_heads, 1)
            return (out if out.stride() == strides else in_order(out, query)), lse
        out, lse = single_query.results(query, key, value, scale, True, False, wants_lse)
        return in_order(out, query), lse

    return run


def masked_fwd_plan(spec: AttentionSpec, call: AttentionCall, wants_lse: bool) -> Masked | None:
    """(query, key, value, mask) -> (out, lse) for calls like this one of one query, as the forward of `attention`; the
    result is None where a row sees nothing or something is not finite.

    None for calls with more than a mask of the keys. lse may be None unless it is wanted.
    """
    mask = call.mask
    if mask is None or not spec.single_query or mask.shape[2] != 1 or mask.shape[3] != call.key.shape[2]:
        return None
    without = replace(call, mask=None)
    tile = _only_tile(AttentionSpec.of(without), without)
    if tile is None or tile.structure != "full":
        return None
    scale, folds = call.scale, fused.folds(call.query, call.key)
    batch, num_heads, _, dim = call.query.shape
    shape, num_kv_heads = (batch, num_heads, 1, dim), call.key.shape[1]
    folded_shape = (batch, num_kv_heads, num_heads // num_kv_heads, dim)
    per_head = None if mask.shape[1] == 1 else (mask.shape[0], *folded_shape[1:3], mask.shape[3])
    strides = strides_in_order(call.query.stride(), shape)
    flash, zero = torch_compat.cpu_flash_kernel(), torch.zeros((), dtype=spec.dtype, device="cpu")

    def run(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> tuple[Tensor, Tensor | None] | None:
        additive = torch.where(mask, zero, -torch.inf)
        if folds:  # as `fused.folded`
            query_rows = query.reshape(folded_shape)
            additive = additive if per_head is None else additive.reshape(per_head)
            out, lse = flash(query_rows, key, value, 0.0, False, attn_mask=additive, scale=scale)
            out = out.reshape(shape)
        else:
            out, lse = flash(query, key, value, 0.0, False, attn_mask=additive, scale=scale)
        # a hidden key's NaN would show in lse, one of its value in out
        if not fused.is_regular(lse) or not math.isfinite(out.sum().item()):
            return None
        if out.stride() != strides:
            out = in_order(out, query)
        return out, lse.reshape(batch, num_heads, 1).contiguous() if wants_lse else None

    return run


def attention_bwd_plan(spec: AttentionSpec, call: AttentionCall, needs: GradsNeeded) -> Backward | None:
    """(query, key, value, out, lse, dout) -> gradients for calls like this one, as `attention_bwd` gives them where no
    gradient of lse arrives; they are None where a row saw nothing finite."""
    tile = _only_tile(spec, call)
    if tile is None:
        return None
    scale, causal = call.scale, tile.structure == "causal"
    if runs_dense(spec, call):
        above = distances((0, len(tile.rows)), (0, len(tile.cols)), 0, None) < 0 if causal else None
        mask = additive(above, spec.group_size, spec.dtype)

        def run_dense(
            query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, dout: Tensor
        ) -> AttentionGrads | None:
            return dense_bwd(query, key, value, dout, scale, mask) if fused.is_finite(lse) else None

        return run_dense
    if (
        spec.single_query
        or spec.group_size > 1
        or call.key.shape[2] < FUSED_BWD_MIN_KEYS
        or prefers_whole_rows_bwd(spec, call.key.shape[2])
        or not torch_compat.has_cpu_flash_attention(backward=True)
    ):
        return None
    strides = tuple(strides_in_order(t.stride(), tuple(t.shape)) for t in (call.query, call.key, call.value))
    apart = fused.are_sequences(call.query, call.key, call.value)
    shape, of_keys = call.query.shape, call.key.shape
    rows, cols = ((s[0] * s[1], 1, *s[2:]) for s in (shape, of_keys))

    def run(
        query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, dout: Tensor
    ) -> AttentionGrads | None:
        if not fused.is_finite(lse):
            return None
        if apart and dout.is_contiguous():
            dq, dk, dv = torch_compat.cpu_flash_attention_backward(
                dout.view(rows), query.view(rows), key.view(cols), value.view(cols), out.view(rows),
                lse.view(rows[:3]), causal, None, scale,
            )  # fmt: skip
            return AttentionGrads(dq.view(shape), dk.view(of_keys), dv.view(of_keys))
        dq, dk, dv = torch_compat.cpu_flash_attention_backward(
            dout, query, key, value, out, lse.contiguous(), causal, None, scale
        )
        if (dq.stride(), dk.stride(), dv.stride()) != strides:
            dq, dk, dv = in_order(dq, query), in_order(dk, key), in_order(dv, value)
        return AttentionGrads(dq, dk, dv)

    return run


def kv_cache_fwd_plan(spec: AttentionSpec, call: KVCacheCall, return_lse: bool) -> Cached | None:
    """(query, k_cache, v_cache, key, value, start) -> what `kv_cache_fwd` gives for calls like this one whose sequences
    all hold `start` tokens: (out, lse), or out alone.

    None where a few queries do not see all that is in a dense cache before them; the result is None where the keys are
    too few or too many for that.
    """
    more = call.block_table is not None or call.rotary_cos is not None or call.sinks is not None
    unit = call.k_cache.stride(-1) == call.v_cache.stride(-1) == 1
    batch, num_heads, count, dim = call.query.shape
    causal = call.causal != "none"
    if (
        more
        or not unit
        or not batch
        or count > single_query.MOST_QUERIES
        or not single_query.keeps_scores(spec)
    ):
        return None
    if call.causal == "top_left" or call.window_left >= 0 or (call.window_right >= 0 and not causal):
        return None
    causal = causal and count > 1
    scale, new_keys, group_size, value_dim = call.scale, call.new_keys, spec.group_size, spec.value_dim
    num_kv_heads = num_heads // group_size
    most_fused = _most_fused_keys(spec, num_kv_heads, scale) if count == 1 else (0, 0)
    flash = torch_compat.cpu_flash_kernel()
    k_strides, v_strides = call.k_cache.stride(), call.v_cache.stride()
    k_step, v_step = k_strides[2], v_strides[2]
    groups = batch * num_kv_heads
    queries, shape = (groups, group_size * count, dim), (batch, num_heads, count, value_dim)
    folded_shape = (batch, num_kv_heads, group_size, dim)
    k_added, v_added = (batch, num_kv_heads, new_keys, dim), (batch, num_kv_heads, new_keys, value_dim)
    contiguous = call.query.is_contiguous()
    one = single_query.batch_merges(call.k_cache) and single_query.batch_merges(call.v_cache)
    # one matrix for each key/value head
    k_matrix, v_matrix = (
        (strides[1] if num_kv_heads > 1 else strides[0], strides[2], 1) for strides in (k_strides, v_strides)
    )
    widened = spec.dtype.itemsize < 4
    copy = torch_compat.copy_of_several()

    def run(
        query: Tensor, k_cache: Tensor, v_cache: Tensor, key: Tensor | None, value: Tensor | None, start: int
    ) -> Any:
        total = start + new_keys
        if not total or (count > 1 and not single_query.are_few(num_heads, count, total, causal)):
            return None
        # as_strided takes half the time of narrow
        if key is not None and value is not None:
            k_place = k_cache.as_strided(k_added, k_strides, k_cache.storage_offset() + start * k_step)
            v_place = v_cache.as_strided(v_added, v_strides, v_cache.storage_offset() + start * v_step)
            copy((k_place, v_place), (key, value))
        lse: Tensor | None
        several = torch.get_num_threads() > 1
        if total <= most_fused[several]:
            folded = query if group_size == 1 else query.reshape(folded_shape)
            keys = k_cache.as_strided((batch, num_kv_heads, total, dim), k_strides)
            values = v_cache.as_strided((batch, num_kv_heads, total, value_dim), v_strides)
            # without the function around the kernel, which small calls notice, but for a lone matrix
            kernel = single_query.fused_rows if several and groups == 1 else flash
            out, lse = kernel(folded, keys, values, scale=scale)
            if fused.is_regular(lse):
                if group_size > 1:
                    out = out.reshape(shape)
                if not contiguous:  # as out is, of one query
                    out = in_order(out, query)
                return (out, lse.reshape(batch, num_heads, 1).contiguous()) if return_lse else out
        elif (
            one
            and ((elements := num_kv_heads * total * dim) > single_query.FEW_ELEMENTS or not widened)
            and (batch == 1 or not single_query.halves(num_kv_heads, elements))
        ):
            out, lse = single_query.products(
                query.view(queries) if contiguous else query.reshape(queries),
                k_cache.as_strided((groups, total, dim), k_matrix),
                v_cache.as_strided((groups, total, value_dim), v_matrix),
                scale, elements, False, count if causal else 1, return_lse,
            )  # fmt: skip
            out = out.view(shape)
            if not contiguous:
                out = in_order(out, query)
            return out if lse is None else (out, lse.view(batch, num_heads, count))
        keys = k_cache.as_strided((batch, num_kv_heads, total, dim), k_strides)
        values = v_cache.as_strided((batch, num_kv_heads, total, value_dim), v_strides)
        # no gradient is computed from lse
        out, lse = single_query.results(query, keys, values, scale, False, causal, return_lse)
        out = in_order(out, query)
        return out if lse is None else (out, lse)

    return run


def _most_fused_keys(spec: AttentionSpec, num_kv_heads: int, scale: float) -> tuple[int, int]:
    """`most_fused_keys` with one thread, and with several."""
    one, several = (
        single_query.most_fused_keys(
            num_kv_heads, spec.group_size, spec.head_dim, spec.value_dim, spec.dtype, scale, threads
        )
        for threads in (False, True)
    )
    return one, several


def _only_tile(spec: AttentionSpec, call: AttentionCall) -> Tile | None:
    """The one tile that is all of a call and needs no mask, if the fused kernel runs it."""
    more = spec.mask or spec.bias or spec.segments or spec.key_lengths or spec.alibi or spec.sinks
    if more or not fused.can_run(spec) or not call.scale > 0 or not call.query.shape[0]:
        return None
    (part,) = parts(call)
    if not (call.query.shape[2] and call.key.shape[2]):
        return None
    first = next(part.schedule(True), [])
    if len(first) != 1 or not part.is_whole(first[0]) or first[0].structure == "masked":
        return None
    return first[0]
