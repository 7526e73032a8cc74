"""How prompts attend, and a token behind each of several sequences that has to have the bits that it has alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property

import torch
from torch import Tensor

from fastattn.nn.attention import MultiHeadAttention
from fastattn.nn.positions import RotaryTable, apply_rotary
from fastattn.ops.attention import attention
from fastattn.ops.key_blocks import KeyBlocks, has_fast_masks, whole_blocks

# bytes of keys and values that are read in the time that a call of one sequence takes to start
CALL_BYTES = 2**19

# (layer's attention, number of the layer, q, k, v) -> the heads' outputs, all (N, heads, S, D)
Attend = Callable[[MultiHeadAttention, int, Tensor, Tensor, Tensor], Tensor]


def one_by_one(appending: Sequence[Attend]) -> Attend:
    """As if each of several tokens came by a step of its own, whose bits a kernel for several queries need not give."""

    def attend(attn: MultiHeadAttention, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = ([x[:, :, i : i + 1] for x in (q, k, v)] for i in range(len(appending)))
        return torch.cat([append(attn, layer, *part) for append, part in zip(appending, parts)], 2)

    return attend


def suits(attn: MultiHeadAttention) -> bool:
    """Whether a layer's scores are changed by a window and a soft cap alone, and its backend is torch's."""
    return attn.alibi_slopes is None and attn.sinks is None and attn.backend in ("auto", "torch")


def attend_prompts(attn: MultiHeadAttention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of prompts that no cache precedes, (B, H, S, D), with the layer's options."""
    return attention(
        q, k, v, causal=True, window=attn.window, softcap=attn.softcap, alibi_slopes=attn.alibi_slopes,
        sinks=attn.sinks, scale=attn.scale, backend=attn.backend,
    )  # fmt: skip


class _Appending:
    """Appends a token to each of N sequences in caches on a CPU, all sequences in the same operations.

    Args:
        caches: keys and values of each layer, (P, Hkv, page, D), contiguous.
        lengths: (N,) int32, tokens that each sequence holds.
        table: (N, pages) integers, with the page that each new token goes to, which no other sequence has.
        rotary: of each kind of layer, cos and sin (positions, rotary_dim / 2).
        kinds: of the layers.
    """

    def __init__(
        self,
        caches: Sequence[tuple[Tensor, Tensor]],
        lengths: Tensor,
        table: Tensor,
        rotary: Mapping[str, RotaryTable],
        kinds: Sequence[str],
    ) -> None:
        self.caches, self.table, self.rotary, self.kinds = caches, table, rotary, kinds
        self.lengths = lengths.tolist()
        self.places = lengths.long()[:, None]  # (N, 1), of the new tokens
        _, heads, self.page_size, _ = caches[0][0].shape
        pages = table.long().gather(1, self.places // self.page_size)
        firsts = (pages * heads + torch.arange(heads, device="cpu")) * self.page_size
        self.rows = (firsts + self.places % self.page_size).flatten()  # of caches (P * Hkv * page, D)
        self._angles: dict[str, RotaryTable] = {}  # by kind, (N, 1, rotary_dim / 2)

    def append(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """The queries (N, H, 1, D), rotated, and the layer's caches, which hold the new keys and values then."""
        kind = self.kinds[layer]
        if (table := self.rotary.get(kind)) is not None:
            if kind not in self._angles:
                cos, sin = (angles[self.places] for angles in table)
                self._angles[kind] = cos, sin
            q, k = (apply_rotary(x, self._angles[kind]) for x in (q, k))
        for cache, new in zip(self.caches[layer], (k, v)):
            width = cache.shape[3]
            cache.view(-1, width).index_copy_(0, self.rows, new.reshape(-1, width))
        return q, self.caches[layer]


class InBlocksOfKeys(_Appending):
    """Attends in blocks of keys: each sequence has the bits that it has alone."""

    @cached_property
    def _blocks(self) -> dict[int | None, KeyBlocks]:  # by window
        return {}

    def __call__(self, attn: MultiHeadAttention, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(N, H, 1, D) of queries (N, H, 1, D) and the new keys and values (N, Hkv, 1, D)."""
        q, (keys, values) = self.append(layer, q, k, v)
        left = None if attn.window is None else attn.window[0]
        if left not in self._blocks:
            self._blocks[left] = KeyBlocks(
                [n + 1 for n in self.lengths], self.table, keys.shape[1], self.page_size, left
            )
        return self._blocks[left].attend(q, keys, values, attn.scale, attn.softcap)


class UnderAMask(_Appending):
    """Attends to the longest sequence's keys, with a mask for the others, where a page is a whole sequence."""

    @cached_property
    def _masks(self) -> dict[int | None, Tensor]:  # by window, (N, 1, 1, keys)
        return {}

    def __call__(self, attn: MultiHeadAttention, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(N, H, 1, D) of queries (N, H, 1, D) and the new keys and values (N, Hkv, 1, D)."""
        q, caches = self.append(layer, q, k, v)
        count = keys_under_a_mask(self.lengths, self.page_size)
        left = None if attn.window is None else attn.window[0]
        if left not in self._masks:
            after = torch.arange(count, device="cpu") - self.places  # (N, keys)
            seen = after <= 0 if left is None else (after <= 0) & (after >= -left)
            self._masks[left] = seen[:, None, None]
        keys, values = (cache[:, :, :count] for cache in caches)
        return attention(q, keys, values, mask=self._masks[left], scale=attn.scale, backend=attn.backend)


def keys_under_a_mask(lengths: Sequence[int], capacity: int) -> int:
    """How many keys `UnderAMask` reads of each sequence: a few more than the longest one's, as calls of one shape are
    planned once."""
    return min(whole_blocks(max(lengths) + 1), capacity)


def mask_pays(lengths: Sequence[int], cache: Tensor) -> bool:
    """Whether sequences of unequal lengths with caches (N, Hkv, C, D) are faster `UnderAMask` than in a call for each:
    the keys that it reads in vain take less time than the calls."""
    count, heads, capacity, dim = cache.shape
    if count < 2 or min(lengths) == max(lengths) or not has_fast_masks(dim, cache.dtype):
        return False
    in_vain = count * keys_under_a_mask(lengths, capacity) - sum(lengths)
    return 2 * heads * dim * cache.element_size() * in_vain <= count * CALL_BYTES


def of_whole_caches(
    caches: Sequence[tuple[Tensor, Tensor]],
    lengths: Tensor,
    rotary: Mapping[str, RotaryTable],
    kinds: Sequence[str],
    *,
    invariant: bool,
) -> Attend | None:
    """Appends a token to each of N sequences with caches (N, Hkv, C, D); None where a call of `attention_kv_cache` is
    faster. Other arguments are those of `InBlocksOfKeys`.

    invariant: each sequence has the bits that it has alone.
    """
    if not invariant and not mask_pays(lengths.tolist(), caches[0][0]):
        return None
    table = torch.arange(len(lengths), device="cpu")[:, None]  # a page for each sequence
    return (InBlocksOfKeys if invariant else UnderAMask)(caches, lengths, table, rotary, kinds)
