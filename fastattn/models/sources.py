"""The keys and values of each layer's cross-attention, computed once from an encoder's output."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from fastattn.nn.cross_attention import Memory
from fastattn.nn.kv_cache import copy_sequences
from fastattn.nn.rows import Rows
from fastattn.ops.kv_cache import attention_kv_cache

ProductOf = Callable[[Tensor, Tensor | None], Rows]  # of a weight and a bias


class Sources:
    """Keys and values of encoded sources for each layer's cross-attention, made once; beams of a prompt have copies."""

    def __init__(
        self, blocks: Iterable[Any], memory: Memory, batch: int, rows_of: ProductOf, *, invariant: bool
    ) -> None:
        tokens, x = memory.tokens, memory.x
        if tokens.real is not None and tokens.places is None:  # drop the rows of padding
            x = x[tokens.real.flatten()]
        lengths = tokens.lengths(x.device)
        self.invariant = invariant
        self.of = torch.arange(batch, device=x.device)  # the sequence whose source each one reads
        self.lengths = torch.zeros(batch, dtype=torch.int32, device=x.device)
        self.lengths[: tokens.batch] = lengths.int()
        rows = torch.arange(tokens.batch, device=x.device).repeat_interleave(lengths)  # (T,)
        places = torch.arange(len(x), device=x.device) - (lengths.cumsum(0) - lengths)[rows]
        self.cache: list[tuple[Tensor, Tensor]] = []  # (B, H, longest, D) twice
        for block in blocks:
            attn = block.cross_attn
            made = rows_of(attn.kv.weight, attn.kv.bias)(x)
            made = made.unflatten(-1, (2, attn.num_heads, attn.head_dim))  # (T, 2, H, D)
            pair = made.new_zeros(2, batch, attn.num_heads, max(tokens.longest, 1), attn.head_dim)
            pair[0][rows, :, places] = made[:, 0]
            pair[1][rows, :, places] = made[:, 1]
            self.cache.append((pair[0], pair[1]))

    def attend(self, layer: int, q: Tensor, seqlen: int, sequences: slice) -> Tensor:
        """(N * S, E) -> (N * S, E), of the sequences with these numbers."""
        keys, values = (buffer[sequences] for buffer in self.cache[layer])
        lengths, dim = self.lengths[sequences], keys.shape[-1]
        q = q.view(-1, seqlen, q.shape[-1] // dim, dim).transpose(1, 2)  # (N, H, S, D)
        # a kernel for several queries need not give the bits of one for each
        parts = q.split(1, dim=2) if self.invariant else (q,)
        outs = [attention_kv_cache(part, keys, values, lengths, causal=False) for part in parts]
        return torch.cat(outs, 2).transpose(1, 2).reshape(q.shape[0] * seqlen, -1)

    def reorder(self, rows: Tensor) -> None:
        """Sequence i gets the source of sequence rows[i]; beams that change places within a prompt copy nothing."""
        wanted = self.of[rows]
        moved = (wanted != self.of).nonzero().squeeze(1)
        if not len(moved):
            return
        source = rows[moved]
        self.of = wanted
        self.lengths[moved] = self.lengths[source]
        buffers = [buffer for pair in self.cache for buffer in pair]
        copy_sequences(buffers, source, moved, buffers[0].shape[2])
