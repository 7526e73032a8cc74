"""The reference: attention's definition in plain torch, for any float dtype, differentiable any number of times."""

from __future__ import annotations

import functools
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from fastattn import visibility
from fastattn.philox import draw_seed, keep_mask, keep_scale


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    causal: bool | str = False,
    window: tuple[int | None, int | None] | None = None,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    segment_ids: Tensor | tuple[Tensor, Tensor] | None = None,
    key_lengths: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    return_weights: bool | str = False,
    first_sequence: int = 0,
) -> Tensor | tuple[Tensor, ...]:
    """softmax(softcap(scale * q.k) + alibi + bias, masked) @ v, every intermediate in the dtype of the query.

    The definition of `fastattn.attention`, differentiable any number of times; the scores are materialised,
    O(B * H * Sq * Sk).

    Args:
        query: (B, H, Sq, D), any float dtype.
        key: (B, Hkv, Sk, D), in the query's dtype; Hkv divides H.
        value: (B, Hkv, Sk, Dv), in the query's dtype.
        causal, window, mask, bias, segment_ids, key_lengths, alibi_slopes: those of `fastattn.attention`.
        softcap, sinks, dropout_p, dropout_seed, scale, return_lse, return_weights: those of `fastattn.attention`.
        first_sequence: number of the batch's first sequence in the dropout stream.

    Returns:
        out (B, H, Sq, Dv); then lse (B, H, Sq) and weights, (B, H, Sq, Sk) or (B, Sq, Sk) for "mean", as asked for. out
        and weights have the query's dtype, lse is float32, or float64 for a float64 query.

    Raises:
        ValueError: causal is none of its values. Nothing else is checked: what does not fit raises torch's errors.
    """
    if causal not in (False, True, "top_left", "bottom_right"):
        raise ValueError(f"causal: got {causal!r}, needs False, True (bottom right) or 'top_left'")
    query, key, value = without_padding(query, key, value, mask, bias, segment_ids, key_lengths)
    scores = masked_scores(
        query, key, causal, window, mask, bias, segment_ids, key_lengths, alibi_slopes, softcap, scale
    )
    batch, num_heads, seqlen_q, seqlen_k = scores.shape
    logits = scores
    if sinks is not None:
        column = sinks.to(query.dtype)[:, None, None].expand(batch, num_heads, seqlen_q, 1)
        logits = torch.cat([scores, column], dim=-1)
    has_key = (logits != float("-inf")).any(-1)
    logits = torch.where(has_key[..., None], logits, 0)  # a row of -inf alone has no finite gradient
    lse = torch.where(has_key, logits.logsumexp(-1), float("-inf"))
    overflown = (scores == float("inf")).any(
        -1
    )  # NaN in the weights, and so in lse; a factor keeps the gradient
    lse = lse * torch.where(overflown, float("nan"), 1.0)
    weights = torch.where(scores != float("-inf"), logits.softmax(-1)[..., :seqlen_k], 0)
    weights = dropped(weights, dropout_p, dropout_seed, first_sequence)
    results = [weights @ value.repeat_interleave(num_heads // value.shape[1], dim=1)]
    if return_lse:
        results.append(lse)
    if return_weights:
        results.append(weights.mean(dim=1) if return_weights == "mean" else weights)
    return results[0] if len(results) == 1 else tuple(results)


def masked_scores(
    query: Tensor,
    key: Tensor,
    causal: bool | str = False,
    window: tuple[int | None, int | None] | None = None,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    segment_ids: Tensor | tuple[Tensor, Tensor] | None = None,
    key_lengths: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float | None = None,
    scale: float | None = None,
) -> Tensor:
    """softcap(scale * q.k) + alibi + bias, -inf where a query does not see a key: (B, H, Sq, Sk)."""
    batch, num_heads, seqlen_q, head_dim = query.shape
    seqlen_k = key.shape[2]
    key = key.repeat_interleave(num_heads // key.shape[1], dim=1)
    scores = (query @ key.mT) * (head_dim**-0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    shift = 0 if causal == "top_left" else seqlen_k - seqlen_q
    distance = visibility.distances((0, seqlen_q), (0, seqlen_k), shift, query.device)
    if alibi_slopes is not None:
        slopes = alibi_slopes.to(query.dtype).expand(batch, num_heads)[..., None, None]
        scores = scores - slopes * distance.abs().to(query.dtype)
    if bias is not None:
        scores = scores + bias.to(query.dtype)

    left, right = (None, None) if window is None else window
    visible = visibility.within_band(distance, bool(causal), left, right)
    if visible is None:
        visible = torch.ones_like(distance, dtype=torch.bool)
    if mask is not None:
        visible = visible & mask
    if bias is not None:
        visible = visible & (bias != float("-inf"))
    if segment_ids is not None:
        ids = segment_ids if isinstance(segment_ids, tuple) else (segment_ids, segment_ids)
        visible = visible & visibility.same_segment(ids[0], ids[1])[:, None]
    if key_lengths is not None:
        visible = visible & visibility.within_lengths(key_lengths, seqlen_k)[:, None, None]
    return torch.where(visible, scores, float("-inf"))


def without_padding(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    segment_ids: Tensor | tuple[Tensor, Tensor] | None = None,
    key_lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The operands with 0 in keys that no query of their batch entry may see, and in queries of a negative segment:
    what lies there may be NaN, and 0 * NaN is NaN."""
    hidden = hidden_keys(key, mask, bias, segment_ids, key_lengths)
    if hidden is not None:
        key, value = (torch.where(hidden[:, None, :, None], 0, t) for t in (key, value))
    if segment_ids is not None:
        ids = segment_ids[0] if isinstance(segment_ids, tuple) else segment_ids
        query = torch.where((ids < 0)[:, None, :, None], 0, query)
    return query, key, value


def hidden_keys(
    key: Tensor,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    segment_ids: Tensor | tuple[Tensor, Tensor] | None = None,
    key_lengths: Tensor | None = None,
) -> Tensor | None:
    """Which keys a length, a negative segment id, a mask column that is False for all heads and queries or a bias
    column that is -inf for all hides from every query: (1 or B, 1 or Sk) bool, None where nothing is given."""
    hidden: list[Tensor] = []
    if mask is not None:
        hidden.append(~_over_heads_and_queries(mask))
    if bias is not None:
        hidden.append(~_over_heads_and_queries(bias != float("-inf")))
    if segment_ids is not None:
        hidden.append((segment_ids[1] if isinstance(segment_ids, tuple) else segment_ids) < 0)
    if key_lengths is not None:
        hidden.append(~visibility.within_lengths(key_lengths, key.shape[2]))
    return functools.reduce(torch.logical_or, hidden) if hidden else None


def _over_heads_and_queries(dense: Tensor) -> Tensor:
    """Which key columns of a tensor that broadcasts to (B, H, Sq, Sk) contain a True: (1 or B, 1 or Sk)."""
    return dense[(None,) * (4 - dense.dim())].any(2).any(1)


def weights_from_lse(
    scores: Tensor, lse: Tensor, dropout_p: float, dropout_seed: int | Tensor | None, first_sequence: int = 0
) -> Tensor:
    """keep * exp(score - lse) / (1 - p), the factors of the values; 0 where a row sees no key."""
    weights = torch.exp(scores - torch.where(lse == float("-inf"), 0, lse)[..., None])
    weights = torch.where(scores != float("-inf"), weights, 0)  # also where lse is NaN
    return dropped(weights, dropout_p, dropout_seed, first_sequence)


def dropped(
    weights: Tensor, dropout_p: float, dropout_seed: int | Tensor | None, first_sequence: int
) -> Tensor:
    """keep * weights / (1 - p)."""
    if dropout_p <= 0.0:
        return weights
    batch, num_heads, seqlen_q, seqlen_k = weights.shape
    device = weights.device
    if dropout_seed is None:
        dropout_seed = draw_seed(device)
    elif not isinstance(dropout_seed, Tensor):
        dropout_seed = torch.tensor(
            dropout_seed if dropout_seed < 2**63 else dropout_seed - 2**64, device=device
        )
    sequences = torch.arange(first_sequence, first_sequence + batch, device=device)
    heads = sequences[:, None] * num_heads + torch.arange(num_heads, device=device)
    keep = keep_mask(dropout_seed, heads, range(seqlen_q), range(seqlen_k), dropout_p)
    return weights * keep * keep_scale(dropout_p)


def attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    alibi_slopes: Tensor | None = None,
    dropout_seed: int | Tensor | None = None,
    return_lse: bool = False,
    **options: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """`attention` of each packed sequence by itself: the definition of `fastattn.attention_varlen`.

    Args:
        query: (T, H, D), any float dtype.
        key, value: (Tk, Hkv, D) and (Tk, Hkv, Dv), in the query's dtype; Hkv divides H.
        cu_seqlens_q, cu_seqlens_k: (B + 1,) integers, ascending from 0: sequence b owns tokens cu_seqlens[b] up to
            cu_seqlens[b + 1]. They are read, which synchronises a GPU.
        alibi_slopes: (H,) or (B, H).
        dropout_seed, return_lse: those of `fastattn.attention_varlen`.
        options: causal, window, softcap, sinks, dropout_p and scale of `fastattn.attention_varlen`.

    Returns:
        out (T, H, Dv) in the query's dtype, and lse (H, T), float32 or float64 as in `attention`, if asked for. Tokens
        of no sequence give out 0 and lse -inf.

    Raises:
        ValueError: causal is none of its values. Nothing else is checked: what does not fit raises torch's errors.
    """
    if dropout_seed is None:
        dropout_seed = draw_seed(query.device)
    out = query.new_zeros(*query.shape[:2], value.shape[2])
    lse = query.new_full((query.shape[1], query.shape[0]), float("-inf"))
    outs, lses = list(out.split(1)), list(lse.split(1, dim=1))  # the results of tokens outside every sequence
    # one by one: under torch 2.9's transforms tolist() cannot read a tensor
    bounds_q, bounds_k = ([int(offset) for offset in each.unbind()] for each in (cu_seqlens_q, cu_seqlens_k))
    for b, (start, stop) in enumerate(pairwise(bounds_q)):
        if start == stop:
            continue
        keys = slice(bounds_k[b], bounds_k[b + 1])
        slopes = alibi_slopes
        if slopes is not None and slopes.dim() == 2 and slopes.shape[0] > 1:
            slopes = slopes[b : b + 1]
        sequence_out, sequence_lse = attention(
            query[start:stop].transpose(0, 1)[None], key[keys].transpose(0, 1)[None], value[keys].transpose(0, 1)[None],
            **options, alibi_slopes=slopes, dropout_seed=dropout_seed, return_lse=True, first_sequence=b,
        )  # fmt: skip
        outs[start:stop] = sequence_out[0].transpose(0, 1).split(1)
        lses[start:stop] = sequence_lse[0].split(1, dim=1)
    out = torch.cat(outs) if outs else out
    return (out, torch.cat(lses, dim=1) if lses else lse) if return_lse else out
