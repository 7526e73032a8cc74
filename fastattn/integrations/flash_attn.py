"""flash-attn's functions, by their names and parameters, on every backend, the CPU included.

Everything is (batch, length, heads, dim), causal masks and windows are aligned to the last key, and gradients are
always deterministic. `FASTATTN_BACKEND` selects a backend. Differences: a row that sees no key has log-sum-exp -inf
where flash-attn has inf, dropout draws from fastattn's generator, and what cannot be honoured is refused by name.

Source of the interface: github.com/Dao-AILab/flash-attention, version 2.8.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.integrations import flash_attn_cache, flash_attn_packed
from fastattn.integrations.flash_attn_arguments import (
    Window,
    batch_integers,
    check_int32,
    heads_first,
    length,
    options,
    raising_as_flash_attn,
    unpack,
)
from fastattn.ops import arguments
from fastattn.ops.attention import attention
from fastattn.ops.errors import ArgumentError, ArgumentTypeError
from fastattn.ops.kv_cache import attention_kv_cache
from fastattn.ops.varlen import attention_varlen

Result = Tensor | tuple[Tensor, Tensor, Tensor | None]


@raising_as_flash_attn
def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
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
        window_size: (left, right) keys visible around position i + Sk - Sq; -1 is unbounded. A pair of integers, of
            0-d tensors, a tensor or a numpy array; one on a GPU is read, which synchronises.
        softcap: above 0, scores become softcap * tanh(scores / softcap).
        alibi_slopes: (H,) or (B, H), adds -slope * |i + Sk - Sq - j|.
        deterministic: gradients are deterministic either way.
        return_attn_probs: also return the log-sum-exp (B, H, Sq) and, under dropout, the softmax (B, H, Sq, Sk) with
            a minus sign on what was dropped (None without dropout), as flash-attn does for its tests.
        s_aux: (H,) logits of attention sinks.

    Returns:
        out (B, Sq, H, Dv), or (out, softmax_lse, S_dmask).

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it. It is a RuntimeError, too, as in
            flash-attn.
    """
    operands = [heads_first(name, t) for name, t in (("q", q), ("k", k), ("v", v))]
    chosen = options(softmax_scale, causal, window_size, softcap, alibi_slopes) | {"sinks": s_aux}
    if not return_attn_probs:
        return cast(Tensor, attention(*operands, dropout_p=dropout_p, **chosen)).transpose(1, 2)
    if not dropout_p:
        out, lse = attention(*operands, return_lse=True, **chosen)
        return out.transpose(1, 2), lse, None
    seed = arguments.seed_tensor(None, q)
    out, lse, kept = attention(
        *operands, dropout_p=dropout_p, dropout_seed=seed, return_lse=True, return_weights=True, **chosen
    )
    _, weights = attention(*operands, return_weights=True, **chosen)
    return out.transpose(1, 2), lse, torch.where(kept == 0, -weights, weights).detach()


@raising_as_flash_attn
def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """`flash_attn_func` of qkv (B, S, 3, H, D)."""
    q, k, v = unpack("qkv", qkv, 3, 5)
    return flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic,
        return_attn_probs,
    )  # fmt: skip


@raising_as_flash_attn
def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """`flash_attn_func` of q (B, Sq, H, D) and kv (B, Sk, 2, Hkv, D)."""
    k, v = unpack("kv", kv, 2, 5)
    return flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic,
        return_attn_probs,
    )  # fmt: skip


@raising_as_flash_attn
def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int | Tensor | None,
    max_seqlen_k: int | Tensor | None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
    *,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    s_aux: Tensor | None = None,
) -> Result:
    """`flash_attn_func` of every sequence of a packed batch.

    Args:
        q: (T, H, D), the sequences' tokens one after another; k, v: (Tk, Hkv, D) and (Tk, Hkv, Dv).
        cu_seqlens_q, cu_seqlens_k: (B + 1,) int32, where each sequence starts, and the end of the last. With
            block_table and seqused_k, cu_seqlens_k may be None.
        max_seqlen_q, max_seqlen_k: the longest lengths, numbers or tensors of one element (which costs a
            synchronisation), or None to have them read from cu_seqlens.
        block_table: (B, pages) int32; k and v are then pages (P, page, Hkv, D) of any length, page i of sequence b is
            k[block_table[b, i]], and cu_seqlens_k says how many tokens of them each sequence has. They are gathered,
            O(Tk) memory and a synchronisation, and get no gradient.
        seqused_q, seqused_k: (B,) int32, as in FlashAttention-3: only so many first tokens of each sequence count. The
            output of other queries is 0.
        dropout_p ... s_aux: as in `flash_attn_func`. The softmax under dropout is (B, H, longest Sq, longest Sk).

    Returns:
        out (T, H, Dv), or (out, softmax_lse (H, T), S_dmask).

    Raises:
        ValueError, TypeError: as in `flash_attn_func`.
        RuntimeError: pages require grad.
    """
    chosen = options(softmax_scale, causal, window_size, softcap, alibi_slopes)
    longest_q, longest_k = length("max_seqlen_q", max_seqlen_q), length("max_seqlen_k", max_seqlen_k)
    arguments.check_tensor("q", q)
    cu_seqlens_q = flash_attn_packed.checked_cu_seqlens("cu_seqlens_q", cu_seqlens_q, q)
    if block_table is not None:
        lengths = None if cu_seqlens_k is None else cu_seqlens_k.diff()
        if seqused_k is not None:
            lengths, seqused_k = batch_integers("seqused_k", seqused_k, q, cu_seqlens_q.shape[0] - 1), None
        if lengths is None:
            raise ArgumentTypeError(
                "cu_seqlens_k: got None, needs a torch.Tensor or seqused_k besides block_table"
            )
        k, v, cu_seqlens_k = flash_attn_packed.gathered(q, k, v, block_table, cu_seqlens_q, lengths)
    cu_seqlens_k = flash_attn_packed.checked_cu_seqlens("cu_seqlens_k", cu_seqlens_k, q)
    every = 1
    if seqused_q is not None or seqused_k is not None:
        used_q, used_k = (
            None if used is None else flash_attn_packed.used_lengths(name, used, cu_seqlens, q)
            for name, used, cu_seqlens in (
                ("seqused_q", seqused_q, cu_seqlens_q), ("seqused_k", seqused_k, cu_seqlens_k)
            )
        )  # fmt: skip
        every = 3
        cu_seqlens_q, cu_seqlens_k = flash_attn_packed.cu_seqlens_with_gaps(
            cu_seqlens_q, cu_seqlens_k, used_q, used_k
        )
        if isinstance(alibi_slopes, Tensor) and alibi_slopes.dim() == 2:
            chosen["alibi_slopes"] = alibi_slopes.repeat_interleave(every, 0)
    chosen["sinks"] = s_aux
    seed = arguments.seed_tensor(None, q) if dropout_p else None
    out, lse = attention_varlen(
        q, k, v, cu_seqlens_q, cu_seqlens_k, longest_q, longest_k, dropout_p=dropout_p, dropout_seed=seed,
        return_lse=True, **chosen,
    )  # fmt: skip
    if not return_attn_probs:
        return out
    signed = None
    if seed is not None:
        signed = flash_attn_packed.signed_softmax(
            q, k, v, cu_seqlens_q, cu_seqlens_k, seed, dropout_p, every, longest_q, longest_k, **chosen
        )
    return out, lse, signed


@raising_as_flash_attn
def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int | Tensor | None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """`flash_attn_varlen_func` of qkv (T, 3, H, D)."""
    q, k, v = unpack("qkv", qkv, 3, 4)
    return flash_attn_varlen_func(
        q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, dropout_p, softmax_scale, causal, window_size,
        softcap, alibi_slopes, deterministic, return_attn_probs,
    )  # fmt: skip


@raising_as_flash_attn
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
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """`flash_attn_varlen_func` of q (T, H, D) and kv (Tk, 2, Hkv, D)."""
    k, v = unpack("kv", kv, 2, 4)
    return flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal,
        window_size, softcap, alibi_slopes, deterministic, return_attn_probs,
    )  # fmt: skip


@raising_as_flash_attn
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
    window_size: Window = (-1, -1),
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
        k_cache, v_cache: (B, S, Hkv, D), or pages (P, page, Hkv, D) of any length with a block_table; changed in place.
        k, v: (B, Sn, Hkv, D), written at cache_seqlens.
        rotary_cos, rotary_sin: (positions, rotary_dim / 2); turn k to the positions from cache_seqlens on, and q, too,
            with causal or a window; otherwise every query to position cache_seqlens. They need k.
        cache_seqlens: (B,) int32 or one number, tokens in the cache before the call; the whole cache by default.
        cache_batch_idx: (B,) int32, the row of the caches that each sequence has, without block_table; distinct where k
            is given.
        cache_leftpad: (B,) int32, where each sequence begins in its row or pages; what lies before is never read. A
            cache whose rows are not evenly spaced in memory is copied for this.
        block_table: (B, pages) int32.
        num_splits: 0 leaves it to the kernel.
        the rest: as in `flash_attn_func`.

    Returns:
        out (B, Sq, H, Dv), and the log-sum-exp (B, H, Sq) if asked for.

    Raises:
        ValueError, TypeError: as in `flash_attn_func`; nothing is written then.
        RuntimeError: a tensor requires grad.
    """
    query, *_ = (heads_first(name, t) for name, t in (("q", q), ("k_cache", k_cache), ("v_cache", v_cache)))
    new_key = None if k is None else heads_first("k", k)
    new_value = None if v is None else heads_first("v", v)
    chosen = options(softmax_scale, causal, window_size, softcap, alibi_slopes)
    check_int32("num_splits", num_splits)
    if cache_seqlens is None and k is not None:
        raise ArgumentError("cache_seqlens: got None, needs lengths where k is given")
    lengths = flash_attn_cache.lengths_of(cache_seqlens, q, k_cache, block_table)
    new_keys = 0 if new_key is None else new_key.shape[2]
    cache = flash_attn_cache.address(
        q, k_cache, v_cache, lengths, new_keys, cache_batch_idx, cache_leftpad, block_table
    )
    if rotary_cos is not None:
        if new_key is None:
            raise ArgumentError("rotary_cos: got a tensor, needs k besides")
        advances = q.shape[1] == 1 or causal or any(side not in (None, -1) for side in chosen["window"])
        if cache_leftpad is not None or new_keys != q.shape[1] or not advances:
            query, new_key = flash_attn_cache.rotated(
                query, new_key, lengths, rotary_cos, rotary_sin, rotary_interleaved, advances
            )
            rotary_cos = rotary_sin = None
    out, lse = attention_kv_cache(
        query, cache.keys, cache.values, cache.lengths, key=new_key, value=new_value, block_table=cache.block_table,
        rotary_cos=rotary_cos, rotary_sin=rotary_sin, rotary_interleaved=rotary_interleaved,
        num_splits=num_splits if num_splits > 0 else None, return_lse=True, sinks=s_aux, **chosen,
    )  # fmt: skip
    if cache.copied and new_keys:
        k_cache.copy_(cache.keys.view(k_cache.shape))
        v_cache.copy_(cache.values.view(v_cache.shape))
    return (out.transpose(1, 2), lse) if return_softmax_lse else out.transpose(1, 2)


@raising_as_flash_attn
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
