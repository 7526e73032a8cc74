"""Plans of calls that are one tile to torch's fused CPU attention, so that nothing has to be cut."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastattn import torch_compat
from fastattn.backends.torch import fused, single_query
from fastattn.backends.torch.attention import attention_fwd
from fastattn.backends.torch.dense import FUSED_BWD_MIN_KEYS, additive, dense_bwd, runs_dense
from fastattn.backends.torch.parts import parts
from fastattn.backends.torch.schedule import Tile
from fastattn.spec import AttentionCall, AttentionGrads, AttentionSpec, GradsNeeded, KVCacheCall
from fastattn.strides import in_order
from fastattn.visibility import distances

Forward = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
Cached = Callable[[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, int], Any]
Backward = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], AttentionGrads | None]


def attention_fwd_plan(spec: AttentionSpec, call: AttentionCall, lse_in_order: bool) -> Forward | None:
    """(query, key, value) -> (out, lse) for calls like this one, as `attention_fwd`; None where it needs more tiles.

    lse_in_order: lse is contiguous.
    """
    tile = _only_tile(spec, call)
    if tile is None:
        return None
    if single_query.can_run(spec):
        return partial(_single_query, call.scale)
    causal, scale, contiguous = tile.structure == "causal", call.scale, call.query.is_contiguous()
    options: dict[str, Any] = {
        "causal": call.causal,
        "window_left": call.window_left,
        "window_right": call.window_right,
    }
    flash = torch_compat.cpu_flash_kernel()

    def run(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = flash(query, key, value, 0.0, causal, scale=scale)
        if not fused.is_regular(lse):
            return attention_fwd(spec, AttentionCall(query, key, value, scale=scale, **options))
        if not (contiguous and out.is_contiguous()):
            out = in_order(out, query)
        return out, lse.contiguous() if lse_in_order else lse

    return run


def _single_query(scale: float, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    out, lse = single_query.single_query(query, key, value, scale)
    return in_order(out, query), lse


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
        or not torch_compat.has_cpu_flash_attention(backward=True)
    ):
        return None

    def run(
        query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, dout: Tensor
    ) -> AttentionGrads | None:
        if not fused.is_finite(lse):
            return None
        grads = torch_compat.cpu_flash_attention_backward(
            dout, query, key, value, out, lse.contiguous(), causal, None, scale
        )
        return AttentionGrads(*(in_order(g, t) for g, t in zip(grads, (query, key, value))))

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
    most_fused = 0
    if count == 1:
        most_fused = single_query.most_fused_keys(num_kv_heads, group_size, dim, value_dim, spec.dtype, scale)
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
        if total <= most_fused and torch.get_num_threads() == 1:
            folded = query if group_size == 1 else query.reshape(folded_shape)
            keys = k_cache.as_strided((batch, num_kv_heads, total, dim), k_strides)
            values = v_cache.as_strided((batch, num_kv_heads, total, value_dim), v_strides)
            out, lse = flash(folded, keys, values, scale=scale)
            if fused.is_regular(lse):
                if group_size > 1:
                    out = out.reshape(shape)
                if not contiguous:  # as out is, of one query
                    out = in_order(out, query)
                return (out, lse.reshape(batch, num_heads, 1)) if return_lse else out
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
