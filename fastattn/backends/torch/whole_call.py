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
Cached = Callable[
    [Tensor, Tensor, Tensor, Tensor | None, Tensor | None, list[int]], tuple[Tensor, Tensor] | None
]
Backward = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], AttentionGrads | None]


def attention_fwd_plan(spec: AttentionSpec, call: AttentionCall, lse_in_order: bool) -> Forward | None:
    """(query, key, value) -> (out, lse) for calls like this one, as `attention_fwd`; None where it needs more tiles.

    lse_in_order: lse is contiguous.
    """
    tile = _only_tile(spec, call)
    if tile is None:
        return None
    if single_query.can_run(spec):
        return partial(_single_query, call.scale, True)
    causal, scale, contiguous = tile.structure == "causal", call.scale, call.query.is_contiguous()
    options: dict[str, Any] = {
        "causal": call.causal,
        "window_left": call.window_left,
        "window_right": call.window_right,
    }
    flash = torch_compat.cpu_flash_kernel()

    def run(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = flash(query, key, value, 0.0, causal, attn_mask=None, scale=scale)
        if not fused.is_regular(lse):
            return attention_fwd(spec, AttentionCall(query, key, value, scale=scale, **options))
        if not (contiguous and out.is_contiguous()):
            out = in_order(out, query)
        return out, lse.contiguous() if lse_in_order else lse

    return run


def _single_query(
    scale: float, exact_scores: bool, query: Tensor, key: Tensor, value: Tensor
) -> tuple[Tensor, Tensor]:
    out, lse = single_query.single_query(query, key, value, scale, exact_scores)
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
            if not lse.min().item() > -torch.inf:  # NaN too
                return None
            return dense_bwd(AttentionCall(query, key, value, scale=scale), mask, dout)

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
        if not lse.min().item() > -torch.inf:
            return None
        grads = torch_compat.cpu_flash_attention_backward(
            dout, query, key, value, out, lse.contiguous(), causal, None, scale
        )
        return AttentionGrads(*(in_order(g, t) for g, t in zip(grads, (query, key, value))))

    return run


def kv_cache_fwd_plan(spec: AttentionSpec, call: KVCacheCall) -> Cached | None:
    """(query, k_cache, v_cache, key, value, lengths) -> (out, lse) for calls like this one, as `kv_cache_fwd`.

    None where one query does not see all that is in a dense cache; the result is None where lengths differ.
    """
    more = call.block_table is not None or call.rotary_cos is not None or call.alibi_slopes is not None
    banded = call.window_left >= 0 or (call.causal == "none" and call.window_right >= 0)
    unit = call.k_cache.stride(-1) == call.v_cache.stride(-1) == 1
    if more or banded or not unit or not spec.single_query or call.causal == "top_left" or not call.capacity:
        return None
    one = (call.query, call.k_cache[:, :, :1], call.v_cache[:, :, :1])  # any other number is one tile too
    if _only_tile(spec, call.attending(*one, None)) is None or not single_query.can_run(spec):
        return None
    attend = partial(_single_query, call.scale, False)  # no gradient is computed from lse
    new_keys = call.new_keys

    def run(
        query: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        key: Tensor | None,
        value: Tensor | None,
        lengths: list[int],
    ) -> tuple[Tensor, Tensor] | None:
        first = lengths[0]
        total = first + new_keys
        if not total or lengths.count(first) != len(lengths):
            return None
        if key is not None and value is not None:
            k_cache.narrow(2, first, new_keys).copy_(key)
            v_cache.narrow(2, first, new_keys).copy_(value)
        return attend(query, k_cache.narrow(2, 0, total), v_cache.narrow(2, 0, total))

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
