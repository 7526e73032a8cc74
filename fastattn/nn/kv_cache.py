"""Keys and values of earlier tokens, kept for decoding."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fastattn import torch_compat
from fastattn.ops.attention import attention
from fastattn.ops.kv_cache import attention_kv_cache


class KVCache:
    """Keys and values of the tokens seen so far, written in place into (B, Hkv, capacity, D) buffers.

    It carries no gradient. Capacity is fixed, and running past it is an error.

    Args:
        batch, num_kv_heads, capacity, head_dim: B, Hkv, the most tokens of a sequence, and D.
        dtype, device: of the buffers; torch's defaults by default.

    Attributes:
        keys: a buffer (B, Hkv, capacity, D).
        values: a buffer (B, Hkv, capacity, D).
        length: the tokens held, the same number for every sequence.
    """

    def __init__(
        self,
        batch: int,
        num_kv_heads: int,
        capacity: int,
        head_dim: int,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        shape = (batch, num_kv_heads, capacity, head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.length = 0

    @property
    def capacity(self) -> int:
        """The most tokens it can hold."""
        return self.keys.shape[2]

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Write (B, Hkv, S, D) keys and values after those held; returns views of all of them, (B, Hkv, length, D).

        Raises:
            ValueError: their shape does not fit, the capacity does not hold them, or one of them requires grad in grad
                mode. Nothing is written then.
        """
        start = self.length
        end = self._end_of(key, value)
        self.keys[:, :, start:end] = key
        self.values[:, :, start:end] = value
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        causal: bool | str,
        mask: Tensor | None,
        bias: Tensor | None,
        segment_ids: Tensor | tuple[Tensor, Tensor] | None,
        key_lengths: Tensor | None,
        dropout_p: float,
        return_weights: Any,
        **options: Any,
    ) -> Tensor | tuple[Tensor, ...]:
        """`fastattn.attention` of a query to all tokens held, once `key` and `value` are appended.

        With cached tokens, `attention_kv_cache` is used where it gives the same result: without gradients, dropout,
        weights and a bias, and without a mask, unless it hides only the last keys of sequences from a single query.

        Args:
            query: (B, H, Sq, D).
            key, value: (B, Hkv, S, D), appended as `append` does.
            causal, mask, bias, segment_ids, key_lengths, dropout_p, return_weights, options: those of
                `fastattn.attention`, over all tokens held.

        Returns:
            out (B, H, Sq, D), and the weights if asked for.

        Raises:
            ValueError, TypeError: as `append` and `fastattn.attention`, and for a query of another dtype than the
                buffers' without autocast. The length is then what it was.
        """
        more = (bias, segment_ids, key_lengths)
        is_step = (
            self.length > 0
            and all(x is None for x in more)
            and not (dropout_p or return_weights or torch.is_grad_enabled())
            and query.dtype == key.dtype == value.dtype == self.keys.dtype
            and not torch.is_autocast_enabled(query.device.type)
        )
        lengths = None
        if is_step and mask is not None:
            # a window and slopes count from the last key here, in `attention_kv_cache` from each sequence's own
            positional = options.get("window") is not None or options.get("alibi_slopes") is not None
            lengths = None if positional or causal == "top_left" else _visible_keys(mask, query)
        if is_step and mask is None:
            end = self._end_of(key, value)
            held = torch.full(query.shape[:1], self.length, dtype=torch.int32, device=query.device)
            out = attention_kv_cache(
                query, self.keys, self.values, held, key=key, value=value, causal=causal, **options
            )
            self.length = end
            return out
        if query.dtype != self.keys.dtype and not torch.is_autocast_enabled(query.device.type):
            raise TypeError(f"cache: got {self.keys.dtype}, needs the query's {query.dtype}")
        before = self.length
        keys, values = self.append(key, value)
        try:
            if lengths is not None:
                return attention_kv_cache(query, self.keys, self.values, lengths, causal=False, **options)
            options |= {
                "segment_ids": segment_ids, "key_lengths": key_lengths, "return_weights": return_weights,
            }  # fmt: skip
            return attention(
                query, keys, values, causal=causal, mask=mask, bias=bias, dropout_p=dropout_p, **options
            )
        except BaseException:
            self.length = before
            raise

    def _end_of(self, key: Tensor, value: Tensor) -> int:
        """The number of tokens held after the append; ValueError if they do not fit."""
        if torch.is_grad_enabled() and (key.requires_grad or value.requires_grad):
            raise ValueError("cache: carries no gradient, call under torch.no_grad()")
        needs = (*self.keys.shape[:2], key.shape[2], self.keys.shape[3])
        if tuple(key.shape) != needs or value.shape != key.shape:
            got = f"keys {tuple(key.shape)} and values {tuple(value.shape)}"
            raise ValueError(f"cache: got {got}, needs {needs}")
        end = self.length + key.shape[2]
        if end > self.capacity:
            raise ValueError(f"cache: got token {end}, needs {self.capacity} (its capacity) at most")
        return end

    def reorder(self, rows: Tensor) -> None:
        """Sequence i becomes a copy of sequence rows[i], (B,) integers, as beams need."""
        to = torch.arange(len(rows), device=rows.device)
        copy_sequences((self.keys, self.values), rows, to, self.length)


@contextmanager
def lengths_kept_on_error(caches: Sequence[KVCache]) -> Iterator[None]:
    """Where the block raises, the caches hold as many tokens as before: a layer may refuse what earlier ones took."""
    lengths = [cache.length for cache in caches]
    try:
        yield
    except BaseException:
        for cache, length in zip(caches, lengths):
            cache.length = length
        raise


def copy_sequences(buffers: Iterable[Tensor], source: Tensor, target: Tensor, tokens: int) -> None:
    """Sequences `target` become copies of sequences `source` as these are now, up to so many tokens.

    Args:
        buffers: (B, heads, C, D) of one shape each, contiguous.
        source, target: (N,) integers; target has none twice.
        tokens: at most C.
    """
    for buffer in buffers:
        _, num_heads, capacity, dim = buffer.shape
        heads = torch.arange(num_heads, device=source.device)
        rows, to = ((part[:, None] * num_heads + heads).flatten() for part in (source, target))
        # a head's tokens are one row, which is copied faster than the buffer is indexed
        held = buffer.view(-1, capacity * dim)[:, : tokens * dim]
        held.index_copy_(0, to, held.index_select(0, rows))


def _visible_keys(mask: Tensor, query: Tensor) -> Tensor | None:
    """(B,) int32, the number of visible keys of each sequence, if `mask` (B, 1, 1, Sk) hides only the last keys of
    sequences; None for any other mask, and where reading it would synchronise a GPU."""
    batch, _, seqlen_q, _ = query.shape
    if (
        torch.compiler.is_compiling()
        or not mask.is_cpu
        or torch_compat.is_fake(mask)
        or seqlen_q != 1
        or mask.shape[:3] != (batch, 1, 1)
    ):
        return None
    seen = mask.view(batch, -1)
    if bool((seen[:, 1:] > seen[:, :-1]).any()):
        return None
    return seen.sum(1, dtype=torch.int32)
