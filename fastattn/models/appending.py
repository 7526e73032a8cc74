"""How prompts attend, and a token behind each of several sequences that has to have the bits that it has alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from fastattn.nn.attention import MultiHeadAttention
from fastattn.nn.positions import RotaryTable, apply_rotary
from fastattn.ops.attention import attention
from fastattn.ops.key_blocks import KeyBlocks

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


class InBlocksOfKeys:
    """Appends a token to each of N sequences in caches of pages on a CPU, all sequences in the same operations.

    Args:
        caches: keys and values of each layer, (P, Hkv, page, D).
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
        self.page_size = caches[0][0].shape[2]
        self.pages = table.long().gather(1, self.places // self.page_size)[:, 0]
        self.inside = self.places[:, 0] % self.page_size
        self._blocks: dict[int | None, KeyBlocks] = {}  # by window

    def __call__(self, attn: MultiHeadAttention, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(N, H, 1, D) of queries (N, H, 1, D) and the new keys and values (N, Hkv, 1, D)."""
        if (table := self.rotary.get(self.kinds[layer])) is not None:
            cos, sin = (angles[self.places] for angles in table)  # (N, 1, rotary_dim / 2)
            q, k = (apply_rotary(x, (cos, sin)) for x in (q, k))
        keys, values = self.caches[layer]
        keys[self.pages, :, self.inside] = k[:, :, 0]
        values[self.pages, :, self.inside] = v[:, :, 0]
        left = None if attn.window is None else attn.window[0]
        if left not in self._blocks:
            self._blocks[left] = KeyBlocks(
                [n + 1 for n in self.lengths], self.table, keys.shape[1], self.page_size, left
            )
        return self._blocks[left].attend(q, keys, values, attn.scale, attn.softcap)
