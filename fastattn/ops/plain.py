"""The attention ops in torch's own operations, for exported and traced programs, which run without fastattn."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn import torch_compat, visibility
from fastattn.backends.torch.kv_cache import append, rotated
from fastattn.ops.autocast import own_precision
from fastattn.philox import keep_mask, keep_scale
from fastattn.spec import AttentionCall, KVCacheCall, VarlenCall, accumulation_dtype

NOTHING = float("-inf")

chosen: list[bool] = []  # what `fastattn.integrations.export.plain_torch` asks for, the latest last


def wanted() -> bool:
    """Whether calls compute with torch's own operations: under `torch.export` and `torch.jit.trace`, unless
    chosen otherwise."""
    if chosen:
        return chosen[-1]
    return torch_compat.is_exporting() or torch.jit.is_tracing()  # type: ignore[attr-defined]


def quietly(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call `function` without the warnings of a trace that Python reads sizes: its decisions hold for any length."""
    if not torch.jit.is_tracing():  # type: ignore[attr-defined]
        return function(*args, **kwargs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # type: ignore[attr-defined]
        return function(*args, **kwargs)


def attention(
    call: AttentionCall, *, lse: bool = False, weights: bool | str = False, any_seed: bool = True
) -> Tensor | tuple[Tensor, ...]:
    """out, and lse and weights where asked for, as `fastattn.attention` returns them.

    any_seed: dropout draws from torch's generator, whatever the call's seed.
    """
    seqlen_q, seqlen_k = call.query.shape[2], call.key.shape[2]
    seen = _seen(call)
    simple_band = call.window_left < 0 and call.window_right < 0
    first_key = call.causal == "top_left" or (call.causal != "none" and _same_size(seqlen_q, seqlen_k))
    causal = first_key and simple_band and seen is None and call.alibi_slopes is None
    distance = None
    if not causal and (call.causal != "none" or not simple_band or call.alibi_slopes is not None):
        device = call.query.device
        shift = 0 if call.causal == "top_left" else seqlen_k - seqlen_q
        distance = visibility.distances((0, seqlen_q), (0, seqlen_k), shift, device)[None, None]
    slopes = None if call.alibi_slopes is None else call.alibi_slopes[:, :, None, None]
    return _attend(
        call, call.query, call.key, call.value, seen, distance, slopes, call.bias, causal=causal, lse=lse,
        weights=weights, dropout_p=call.dropout_p, seed=None if any_seed else call.dropout_seed,
    )  # fmt: skip


def attention_varlen(call: VarlenCall, *, lse: bool = False, any_seed: bool = True) -> Any:
    """out (T, H, Dv), and lse (H, T) where asked for: one attention of all tokens that stay within their sequences."""
    if call.dropout_p > 0.0 and not any_seed:
        raise ValueError("dropout_seed: packed sequences are not exported with one, needs None")
    batch = call.cu_seqlens_q.shape[0] - 1
    (of_query, local_query, length_q), (of_key, local_key, _) = (
        _places(cu_seqlens, tokens.shape[0])
        for cu_seqlens, tokens in ((call.cu_seqlens_q, call.query), (call.cu_seqlens_k, call.key))
    )
    length_k = F.pad(call.cu_seqlens_k.diff(), (0, 1))[of_query]
    shift = 0 if call.causal == "top_left" else length_k - length_q
    distance = ((local_query + shift)[:, None] - local_key)[None, None]
    seen = ((of_query[:, None] == of_key) & (of_query < batch)[:, None])[None, None]
    slopes = call.alibi_slopes
    if slopes is not None:
        if slopes.shape[0] != 1:
            slopes = F.pad(slopes, (0, 0, 0, 1))[of_query].T[None, :, :, None]  # (1, H, T, 1)
        else:
            slopes = slopes[:, :, None, None]
    query, key, value = (tokens.transpose(0, 1)[None] for tokens in (call.query, call.key, call.value))
    result = _attend(
        call, query, key, value, seen, distance, slopes, None, causal=False, lse=lse, dropout_p=call.dropout_p
    )
    if isinstance(result, tuple):
        of_none = of_query == batch  # such a token has no sink either
        return result[0][0].transpose(0, 1), result[1][0].masked_fill(of_none, NOTHING)
    return result[0].transpose(0, 1)


def attention_kv_cache(call: KVCacheCall, *, lse: bool = False) -> Any:
    """out, and lse where asked for; the new keys and values are in the cache afterwards."""
    query, key, seqlen_q = call.query, call.key, call.query.shape[2]
    lengths = call.cache_lengths.long()[:, None]
    totals = lengths + call.new_keys  # (B, 1)
    device = query.device
    steps = torch.arange(seqlen_q, device=device)
    if call.rotary_cos is not None:
        query = rotated(call, query, totals - seqlen_q + steps)
        if key is not None:
            key = rotated(call, key, lengths + torch.arange(call.new_keys, device=device))
    if key is not None and call.value is not None:
        append(call, key, call.value)
    keys, values = call.k_cache, call.v_cache
    if call.block_table is not None:  # entries after a sequence's last page may be anything
        pages = call.block_table.long().clamp(0, keys.shape[0] - 1)
        keys, values = (t[pages].permute(0, 2, 1, 3, 4).flatten(2, 3) for t in (keys, values))
    j = torch.arange(keys.shape[2], device=device)
    positions = steps if call.causal == "top_left" else totals - seqlen_q + steps  # (B or 1, Sq)
    distance = positions.expand(query.shape[0], seqlen_q)[:, None, :, None] - j
    seen = j < totals[:, None, None]
    slopes = None if call.alibi_slopes is None else call.alibi_slopes[:, :, None, None]
    return _attend(call, query, keys, values, seen, distance, slopes, None, lse=lse, causal=False)


def _attend(
    call: AttentionCall | VarlenCall | KVCacheCall,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    seen: Tensor | None,
    distance: Tensor | None,
    slopes: Tensor | None,
    bias: Tensor | None,
    *,
    causal: bool,
    lse: bool = False,
    weights: bool | str = False,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """softmax(softcap(scale * q.k) + alibi + bias, masked) @ v on (B, H, Sq, D) operands.

    seen, distance, slopes and bias are 4-D and broadcast to (B, H, Sq, Sk). `distance`, pos(i) - j, is given where the
    call's causality, window or slopes need it; `causal` says that keys j <= i are seen and nothing else hides any.
    """
    if seen is not None:  # what no query of a batch entry sees may be NaN, and 0 * NaN is NaN
        used = seen.any(2, keepdim=True).any(1, keepdim=True).transpose(2, 3)
        key, value = torch.where(used, key, 0), torch.where(used, value, 0)
    visible = seen
    if distance is not None:
        band = visibility.within_band(distance, call.causal != "none", call.window_left, call.window_right)
        visible = visible if band is None else _both(visible, band)
    additive = None if bias is None else bias.to(accumulation_dtype(query.dtype))
    if slopes is not None and distance is not None:
        alibi = -slopes * distance.abs()
        additive = alibi if additive is None else additive + alibi
    # a fully masked row, whose softmax is NaN, attends to every key instead; its result is then set to 0
    rows = None if visible is None else visible.any(-1, keepdim=True)
    exact = query.dtype in (torch.float32, torch.float64)
    if (
        not (lse or weights or call.softcap or dropout_p > 0.0 or call.sinks is not None)
        and call.scale > 0.0
        and (additive is None or exact)
    ):
        if visible is None or rows is None:
            mask = additive
        elif additive is None:
            mask = visible | ~rows
        else:
            mask = torch.where(visible, additive, torch.where(rows, NOTHING, 0.0))
        out = _torchs(query, key, value, mask, causal, call.scale)
        return out if rows is None else torch.where(rows, out, 0)
    return _formula(
        call, query, key, value, visible, rows, additive, causal, lse, weights, dropout_p, seed
    )  # fmt: skip


def _torchs(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> Tensor:
    """The aten op, bypassing any replacement in torch.nn.functional."""
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(query.dtype)
    key, value = (_for_every_head(t, query) for t in (key, value))
    result: Tensor = torch.ops.aten.scaled_dot_product_attention.default(
        query, key, value, mask, 0.0, causal, scale=float(scale)
    )
    return result


def _formula(
    call: AttentionCall | VarlenCall | KVCacheCall,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visible: Tensor | None,
    rows: Tensor | None,
    additive: Tensor | None,
    causal: bool,
    lse: bool,
    weights: bool | str,
    dropout_p: float,
    seed: Tensor | None,
) -> Tensor | tuple[Tensor, ...]:
    """The same with scores and weights materialised, in the accumulation dtype."""
    dtype = accumulation_dtype(query.dtype)
    with own_precision(query):
        q, k, v = (t.to(dtype) for t in (query, _for_every_head(key, query), _for_every_head(value, query)))
        scores = (q @ k.mT) * call.scale
        if call.softcap:
            scores = call.softcap * torch.tanh(scores / call.softcap)
        if additive is not None:
            scores = scores + additive
        if causal:
            visible = torch.ones_like(scores[:1, :1], dtype=torch.bool).tril()
        if visible is not None:
            scores = torch.where(visible, scores, NOTHING)
        if call.sinks is not None:
            column = call.sinks.to(dtype)[:, None, None].expand(*scores.shape[:3], 1)
            scores = torch.cat((scores, column), dim=-1)
            rows = None if rows is None else rows | (column != NOTHING)
        if rows is not None:
            scores = torch.where(rows, scores, 0.0)
        row_lse = scores.logsumexp(-1)
        if rows is not None:
            row_lse = torch.where(rows[..., 0], row_lse, NOTHING)
        probs = scores.softmax(-1)
        if call.sinks is not None:
            probs = probs[..., :-1]
        if visible is not None:
            probs = torch.where(visible, probs, 0.0)
        if dropout_p > 0.0:
            probs = F.dropout(probs, dropout_p) if seed is None else probs * _kept(probs, seed, dropout_p)
        results = [(probs @ v).to(query.dtype)]
    if lse:
        results.append(row_lse)
    if weights:
        results.append((probs.mean(dim=1) if weights == "mean" else probs).to(query.dtype))
    return results[0] if len(results) == 1 else tuple(results)


def _kept(probs: Tensor, seed: Tensor, dropout_p: float) -> Tensor:
    """The factors by which dropout with this seed multiplies the weights. A trace is then bound to its sizes."""
    batch, num_heads, seqlen_q, seqlen_k = probs.shape
    heads = torch.arange(batch * num_heads, device=probs.device).view(batch, num_heads)
    keep = keep_mask(seed, heads, range(seqlen_q), range(seqlen_k), dropout_p)
    return keep.to(probs.dtype) * keep_scale(dropout_p)


def _seen(call: AttentionCall) -> Tensor | None:
    """The pairs that mask, bias, segments and lengths leave, broadcastable to (B, H, Sq, Sk); None = all."""
    seen = call.mask
    if call.bias is not None:
        seen = _both(seen, call.bias != NOTHING)
    if call.query_segments is not None and call.key_segments is not None:
        seen = _both(seen, visibility.same_segment(call.query_segments, call.key_segments)[:, None])
    if call.key_lengths is not None:
        within = visibility.within_lengths(call.key_lengths, call.key.shape[2])
        seen = _both(seen, within[:, None, None])
    return seen


def _both(one: Tensor | None, other: Tensor) -> Tensor:
    return other if one is None else one & other


def _places(cu_seqlens: Tensor, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """For every packed token: its sequence (B for none), its place there, and that sequence's length (0)."""
    index = torch.arange(tokens, device=cu_seqlens.device)
    sequence = (index[:, None] >= cu_seqlens[1:]).sum(1)
    return sequence, index - cu_seqlens[sequence], F.pad(cu_seqlens.diff(), (0, 1))[sequence]


def _for_every_head(tensor: Tensor, query: Tensor) -> Tensor:
    """(B, Hkv, S, D) as (B, H, S, D); ONNX knows no grouped heads before opset 23."""
    group_size = query.shape[1] // tensor.shape[1]
    return tensor if group_size == 1 else tensor.repeat_interleave(group_size, dim=1)


def _same_size(one: int, other: int) -> bool:
    """Whether two sizes are equal for all inputs; False for the sizes of a trace, of which nothing is known."""
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return False
    # slow to import, and an export has loaded it
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return bool(statically_known_true(one == other))
