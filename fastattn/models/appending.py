"""How a token behind each of several sequences attends, where a sequence has to have the bits that it has alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fastattn.backends.torch.key_blocks import KEYS as KEYS
from fastattn.backends.torch.key_blocks import KeyBlocks
from fastattn.nn.attention import MultiHeadAttention
from fastattn.nn.positions import RotaryTable
from fastattn.rotary import rotated_at

GATHERED = 1 << 14  # most tokens whose keys and values are copied out of their pages at the same time


def suits(attn: MultiHeadAttention) -> bool:
    """Whether a layer's scores are changed by a window and a soft cap alone, and its backend is torch's."""
    return attn.alibi_slopes is None and attn.sinks is None and attn.backend in ("auto", "torch")


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
        self._blocks: dict[tuple[int, int | None], list[tuple[slice, KeyBlocks]]] = {}

    def __call__(self, attn: MultiHeadAttention, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(N, H, 1, D) of queries (N, H, 1, D) and the new keys and values (N, Hkv, 1, D)."""
        if (table := self.rotary.get(self.kinds[layer])) is not None:
            q, k = (rotated_at(x, table, self.places, interleaved=False) for x in (q, k))
        keys, values = self.caches[layer]
        keys[self.pages, :, self.inside] = k[:, :, 0]
        values[self.pages, :, self.inside] = v[:, :, 0]
        left = None if attn.window is None else attn.window[0]
        kind = (keys.shape[1], left)
        if kind not in self._blocks:
            self._blocks[kind] = self._new_blocks(*kind)
        outs = [
            blocks.attend(q[rows], keys, values, attn.scale, attn.softcap)
            for rows, blocks in self._blocks[kind]
        ]
        return outs[0] if len(outs) == 1 else torch.cat(outs)

    def _new_blocks(self, heads: int, window_left: int | None) -> list[tuple[slice, KeyBlocks]]:
        """Of neighbouring sequences that hold at most GATHERED tokens together, one sequence at least."""
        made, start, held = [], 0, 0
        for stop, length in enumerate([*self.lengths, GATHERED], 1):
            held += length
            if held > GATHERED and stop - 1 > start:
                rows = slice(start, stop - 1)
                lengths, table = [n + 1 for n in self.lengths[rows]], self.table[rows]
                made.append((rows, KeyBlocks(lengths, table, heads, self.page_size, window_left)))
                start, held = rows.stop, length
        return made
