"""flash-attn's functions, by their names and parameters, on every backend: code written for it runs on a laptop.

Everything is (batch, length, heads, dim), causal masks and windows are aligned to the last key, and gradients are
always deterministic. `FASTATTN_BACKEND` chooses a backend. Differences: a row that sees no key has log-sum-exp -inf
where flash-attn has inf, dropout draws from fastattn's generator, and what cannot be honoured is refused by name.

Source of the interface: github.com/Dao-AILab/flash-attention, version 2.8.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.ops import arguments
from fastattn.ops.attention import attention
from fastattn.ops.kv_cache import attention_kv_cache
from fastattn.ops.varlen import attention_varlen

Result = Tensor | tuple[Tensor, Tensor, Tensor | None]


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    s_aux: Tensor | None = None,
) -> Result:
    """softmax(softmax_scale * q @ k.T, capped, biased and masked) @ v.

    Args:
        q: (B, Sq, H, D).
        k, v: (B, Sk, Hkv, D) and (B, Sk, Hkv, Dv), where Hkv divides H.
        dropout_p: probability of dropping a weight; 0 in evaluation.
        softmax_scale: D**-0.5 by default.
        causal: query i sees keys j <= i + Sk - Sq.
        window_size: (left, right) keys visible around position i + Sk - Sq; -1 is unbounded.
        softcap: above 0, scores become softcap * tanh(scores / softcap).
        alibi_slopes: (H,) or (B, H), adds -slope * |i + Sk - Sq - j|.
        deterministic: gradients are deterministic either way.
        return_attn_probs: also return the log-sum-exp (B, H, Sq) and, under dropout, the softmax (B, H, Sq, Sk) with
            a minus sign on what was dropped (None without dropout), as flash-attn does for its tests.
        s_aux: (H,) logits of attention sinks.

    Returns:
        out (B, Sq, H, Dv), or (out, softmax_lse, S_dmask).

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
    """
    operands = [_heads_first(name, t, 4) for name, t in (("q", q), ("k", k), ("v", v))]
    options = _options(softmax_scale, causal, window_size, softcap, alibi_slopes) | {"sinks": s_aux}
    if not return_attn_probs:
        return cast(Tensor, attention(*operands, dropout_p=dropout_p, **options)).transpose(1, 2)
    if not dropout_p:
        out, lse = attention(*operands, return_lse=True, **options)
        return out.transpose(1, 2), lse, None
    seed = arguments.seed_tensor(None, q)
    out, lse, kept = attention(
        *operands, dropout_p=dropout_p, dropout_seed=seed, return_lse=True, return_weights=True, **options
    )
    _, weights = attention(*operands, return_weights=True, **options)
    return out.transpose(1, 2), lse, torch.where(kept == 0, -weights, weights).detach()


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """`flash_attn_func` of qkv (B, S, 3, H, D)."""
    q, k, v = _unpack("qkv", qkv, 3, 5)
    return flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic,
        return_attn_probs,
    )  # fmt: skip


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """`flash_attn_func` of q (B, Sq, H, D) and kv (B, Sk, 2, Hkv, D)."""
    k, v = _unpack("kv", kv, 2, 5)
    return flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic,
        return_attn_probs,
    )  # fmt: skip


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | Tensor | None,
    max_seqlen_k: int | Tensor | None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
    *,
    s_aux: Tensor | None = None,
) -> Result:
    """`flash_attn_func` of every sequence of a packed batch.

    Args:
        q: (T, H, D), the sequences' tokens one after another; k, v: (Tk, Hkv, D) and (Tk, Hkv, Dv).
        cu_seqlens_q, cu_seqlens_k: (B + 1,) int32, where each sequence starts, and the end of the last.
        max_seqlen_q, max_seqlen_k: the longest lengths, numbers or tensors of one element (which costs a
            synchronisation), or None to have them read from cu_seqlens.
        block_table: refused; paged keys go to `flash_attn_with_kvcache`.
        dropout_p ... s_aux: as in `flash_attn_func`, but there is no softmax to return under dropout.

    Returns:
        out (T, H, Dv), or (out, softmax_lse (H, T), None).
    """
    if block_table is not None:
        raise ValueError("block_table: paged keys are read by flash_attn_with_kvcache only, needs None")
    if return_attn_probs and dropout_p:
        raise ValueError("return_attn_probs: packed sequences have no softmax to return under dropout")
    out, lse = attention_varlen(
        q, k, v, cu_seqlens_q, cu_seqlens_k, _length(max_seqlen_q), _length(max_seqlen_k), dropout_p=dropout_p,
        sinks=s_aux, return_lse=True, **_options(softmax_scale, causal, window_size, softcap, alibi_slopes),
    )  # fmt: skip
    return (out, lse, None) if return_attn_probs else out


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int | Tensor | None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """`flash_attn_varlen_func` of qkv (T, 3, H, D)."""
    q, k, v = _unpack("qkv", qkv, 3, 4)
    return flash_attn_varlen_func(
        q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, dropout_p, softmax_scale, causal, window_size,
        softcap, alibi_slopes, deterministic, return_attn_probs,
    )  # fmt: skip


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | Tensor | None,
    max_seqlen_k: int | Tensor | None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """`flash_attn_varlen_func` of q (T, H, D) and kv (Tk, 2, Hkv, D)."""
    k, v = _unpack("kv", kv, 2, 4)
    return flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal,
        window_size, softcap, alibi_slopes, deterministic, return_attn_probs,
    )  # fmt: skip


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
    *,
    s_aux: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of new queries to a cache, after writing new keys and values into it. No gradients.

    Args:
        q: (B, Sq, H, D).
        k_cache, v_cache: (B, S, Hkv, D), or pages (P, page, Hkv, D) with a block_table; changed in place.
        k, v: (B, Sn, Hkv, D), written at cache_seqlens.
        rotary_cos, rotary_sin: (positions, rotary_dim / 2); turn k and, from position cache_seqlens on, q. They need
            k, as many new keys as queries, and causal or a window where there is more than one query.
        cache_seqlens: (B,) int32 or one number, tokens in the cache before the call; the whole cache by default.
        cache_batch_idx, cache_leftpad: refused.
        block_table: (B, pages) int32.
        num_splits: 0 leaves it to the kernel.
        the rest: as in `flash_attn_func`.

    Returns:
        out (B, Sq, H, Dv), and the log-sum-exp (B, H, Sq) if asked for.
    """
    if cache_batch_idx is not None:
        raise ValueError("cache_batch_idx: not supported, needs None; index the caches, or use block_table")
    if cache_leftpad is not None:
        raise ValueError("cache_leftpad: not supported, needs None; pad at the end")
    query, keys, values = (
        _heads_first(name, t, 4) for name, t in (("q", q), ("k_cache", k_cache), ("v_cache", v_cache))
    )
    new_key = None if k is None else _heads_first("k", k, 4)
    new_value = None if v is None else _heads_first("v", v, 4)
    if cache_seqlens is None:
        if k is not None or block_table is not None:
            raise ValueError("cache_seqlens: got None, needs lengths where k or block_table is given")
        cache_seqlens = k_cache.shape[1]
    if not isinstance(cache_seqlens, Tensor):
        cache_seqlens = torch.full((q.shape[0],), cache_seqlens, dtype=torch.int32, device=q.device)
    if rotary_cos is not None:
        local = tuple(window_size) != (-1, -1)
        if k is None or k.shape[1] != q.shape[1]:
            raise ValueError("rotary_cos: needs k with as many tokens as q")
        if q.shape[1] > 1 and not causal and not local:
            raise ValueError(
                "rotary_cos: several queries of one position cannot be turned, needs causal=True"
            )
    out = attention_kv_cache(
        query, keys, values, cache_seqlens, key=new_key, value=new_value, block_table=block_table,
        rotary_cos=rotary_cos, rotary_sin=rotary_sin, rotary_interleaved=rotary_interleaved,
        num_splits=num_splits or None, return_lse=return_softmax_lse, sinks=s_aux,
        **_options(softmax_scale, causal, window_size, softcap, alibi_slopes),
    )  # fmt: skip
    if isinstance(out, tuple):
        return out[0].transpose(1, 2), out[1]
    return out.transpose(1, 2)


def unpad_input(
    hidden_states: Tensor, attention_mask: Tensor, unused_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """The tokens of a padded batch, packed.

    Args:
        hidden_states: (B, S, ...).
        attention_mask: (B, S), bool or 0 and 1; nonzero = a token.
        unused_mask: (B, S), more tokens to keep, which the last result does not count.

    Returns:
        the tokens (T, ...), their indices (T,) in the flattened batch, cu_seqlens (B + 1,) int32, the longest length,
        and the lengths (B,) int32 by attention_mask.
    """
    arguments.check_tensor("hidden_states", hidden_states)
    shape = arguments.shape_of(hidden_states)[:2]
    for name, mask in (("attention_mask", attention_mask), ("unused_mask", unused_mask)):
        if mask is None:
            continue
        arguments.check_tensor(name, mask)
        if arguments.shape_of(mask) != shape:
            raise ValueError(f"{name}: got shape {arguments.shape_of(mask)}, needs {shape}")
    used = attention_mask != 0
    kept = used if unused_mask is None else used | (unused_mask != 0)
    lengths = kept.sum(-1, dtype=torch.int32)
    indices = kept.flatten().nonzero().flatten()
    cu_seqlens = F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    longest = int(lengths.max()) if lengths.numel() else 0
    tokens = index_first_axis(hidden_states.flatten(0, 1), indices)
    return tokens, indices, cu_seqlens, longest, used.sum(-1, dtype=torch.int32)


def pad_input(hidden_states: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """The inverse of `unpad_input`: (T, ...) tokens at their indices of a zero (batch, seqlen, ...)."""
    return index_put_first_axis(hidden_states, indices, batch * seqlen).unflatten(0, (batch, seqlen))


def index_first_axis(input: Tensor, indices: Tensor) -> Tensor:
    """input[indices]."""
    return input.index_select(0, indices)


def index_put_first_axis(values: Tensor, indices: Tensor, first_axis_dim: int) -> Tensor:
    """A zero (first_axis_dim, ...) with result[indices] = values."""
    return values.new_zeros((first_axis_dim, *values.shape[1:])).index_copy(0, indices, values)


def _length(length: int | Tensor | None) -> int | None:
    return int(length) if isinstance(length, Tensor) and length.numel() == 1 else cast("int | None", length)


def _heads_first(name: str, tensor: Tensor, rank: int) -> Tensor:
    """A (B, H, S, D) view of (B, S, H, D)."""
    arguments.check_tensor(name, tensor)
    if tensor.dim() != rank:
        got = arguments.shape_of(tensor)
        raise ValueError(f"{name}: got shape {got}, needs {rank} dimensions (batch, length, heads, dim)")
    return tensor.transpose(1, 2)


def _unpack(name: str, tensor: Tensor, parts: int, rank: int) -> tuple[Tensor, ...]:
    """The parts that are stacked before the heads."""
    arguments.check_tensor(name, tensor)
    if tensor.dim() != rank or tensor.shape[rank - 3] != parts:
        got, leading = arguments.shape_of(tensor), "batch, length" if rank == 5 else "tokens"
        raise ValueError(f"{name}: got shape {got}, needs ({leading}, {parts}, heads, dim)")
    return tensor.unbind(rank - 3)


def _options(
    softmax_scale: float | None,
    causal: bool,
    window_size: tuple[int, int],
    softcap: float,
    alibi_slopes: Tensor | None,
) -> dict[str, Any]:
    """The options all of `attention`, `attention_varlen` and `attention_kv_cache` take."""
    if not isinstance(causal, bool):
        raise TypeError(f"causal: got {type(causal).__name__}, needs a bool")
    return {
        "scale": softmax_scale,
        "causal": causal,
        "window": window_size,
        "softcap": None if softcap == 0.0 else softcap,
        "alibi_slopes": alibi_slopes,
    }
