"""One query for each of several sequences, against their keys in blocks of a fixed number.

All sequences run in the same operations, whatever their lengths, and each has the bits that it has alone: a batched
product gives a matrix the same bits at any place of the batch, and what the blocks of a sequence add up to is summed in
their order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from fastattn.backends.torch.exponential import exp_
from fastattn.backends.torch.whole_rows import product
from fastattn.integers import cdiv
from fastattn.spec import accumulation_dtype

KEYS = 64  # of a block
COPIED_ELEMENTS = 2**17  # of keys or values that are copied out of their pages at a time, for each thread


def whole_blocks(tokens: int) -> int:
    """So many tokens or a few more, which are whole blocks: a cache of them is copied fastest."""
    return cdiv(tokens, KEYS) * KEYS


class KeyBlocks:
    """Which blocks of caches of pages the last key of each of N sequences sees, and where they are.

    Blocks are sorted: the first ones of all sequences, then the second ones ..., and within these the sequences of the
    most blocks come first.

    Args:
        lengths: keys of each sequence, at least one.
        table: (N, pages) integers, the pages of each sequence.
        heads: of keys.
        page_size: tokens of a page.
        window_left: keys before the last one that it sees; None or negative = all.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        table: Tensor,
        heads: int,
        page_size: int,
        window_left: int | None = None,
    ) -> None:
        ends = np.asarray(lengths)
        starts = np.zeros_like(ends)
        if window_left is not None and window_left >= 0:
            starts = np.maximum(ends - 1 - window_left, 0)
        first = starts // KEYS
        counts = (ends - 1) // KEYS + 1 - first
        order = np.argsort(-counts, kind="stable")
        # how many sequences have a first block, a second one ...
        self.levels = [int((counts > level).sum()) for level in range(counts.max())]
        # the place of each block's sequence in the order
        places = np.concatenate([np.arange(size) for size in self.levels])
        of = order[places]
        block = first[of] + np.repeat(np.arange(len(self.levels)), self.levels)
        self.tokens = math.gcd(page_size, KEYS)  # that are next to each other in a page
        # (M, KEYS / tokens); beyond the last key a sequence may have no page
        at = np.minimum(block[:, None] * KEYS + np.arange(0, KEYS, self.tokens), ends[of, None] - 1)
        pages = table.numpy()[of[:, None], at // page_size]
        rows = (pages[:, None] * heads + np.arange(heads)[:, None]) * (page_size // self.tokens)
        rows = rows + (at % page_size // self.tokens)[:, None]  # (M, heads, KEYS / tokens)
        self.rows = torch.from_numpy(rows.reshape(len(of), -1))
        keys = block[:, None] * KEYS + np.arange(KEYS)
        hidden = (keys >= ends[of, None]) | (keys < starts[of, None])
        self.hidden = torch.from_numpy(hidden)[:, None]  # (M, 1, KEYS)
        self.heads, self.of, self.places = heads, torch.from_numpy(of), torch.from_numpy(places)
        self.back = torch.from_numpy(np.argsort(order))

    def attend(
        self, query: Tensor, keys: Tensor, values: Tensor, scale: float | None, softcap: float | None
    ) -> Tensor:
        """Attention of the queries (N, H, 1, D), each the last of its sequence, (N, H, 1, Dv).

        Args:
            query: any strides.
            keys, values: (P, Hkv, page, D) and (P, Hkv, page, Dv), contiguous.
            scale, softcap: as in `attention`.
        """
        count, num_heads = len(self.of), query.shape[1]
        dtype = accumulation_dtype(query.dtype)
        scale = query.shape[3] ** -0.5 if scale is None else scale
        queries = query[:, :, 0].index_select(0, self.of).to(dtype)
        queries = queries.reshape(count * self.heads, num_heads // self.heads, -1)
        scores = self._products(queries, keys, transposed=True).mul_(scale)
        if softcap:
            scores.div_(softcap).tanh_().mul_(softcap)
        scores = scores.view(count, num_heads, KEYS).masked_fill_(self.hidden, -torch.inf)
        largest = self._over_blocks(scores.amax(-1), torch.maximum)  # (N, H)
        probs = exp_(scores.sub_(largest.index_select(0, self.places)[..., None]))
        total = self._over_blocks(probs.sum(-1), torch.add)[..., None]
        probs = probs.view(count * self.heads, num_heads // self.heads, KEYS)
        out = self._weighted(probs, values, total, masked=False)
        if not math.isfinite(out.sum().item()):  # what no key of this sequence may be in the last block
            out = self._weighted(probs, values, total, masked=True)
        return out.index_select(0, self.back).to(query.dtype)[:, :, None]

    def _products(self, rows: Tensor, pages: Tensor, *, transposed: bool, masked: bool = False) -> Tensor:
        """The products of (M * heads, group, n) with the blocks of caches (P, heads, page, D), or these transposed.

        Blocks are copied out of their pages a few at a time, which stay in a core's cache until they are multiplied.
        """
        dim, count = pages.shape[3], len(self.of)
        source = pages.view(-1, self.tokens * dim)
        result = rows.new_empty(*rows.shape[:2], KEYS if transposed else dim)
        copied_elements = COPIED_ELEMENTS * torch.get_num_threads()
        step = max(1, copied_elements // (self.heads * KEYS * dim))
        copied = source.new_empty(min(step, count) * self.rows.shape[1], source.shape[1])
        for first in range(0, count, step):
            places = self.rows[first : first + step].flatten()
            blocks = torch.index_select(source, 0, places, out=copied[: len(places)])
            matrices = blocks.view(-1, KEYS, dim).to(rows.dtype)
            if masked:
                unseen = self.hidden[first : first + step].expand(-1, self.heads, -1).reshape(-1, KEYS, 1)
                matrices = matrices.masked_fill(unseen, 0)
            part = slice(first * self.heads, first * self.heads + matrices.shape[0])
            operands = rows[part], (matrices.mT if transposed else matrices)
            if matrices.shape[0] == 1:
                result[part] = product(*operands)
            else:
                torch.bmm(*operands, out=result[part])
        return result

    def _weighted(self, probs: Tensor, values: Tensor, total: Tensor, *, masked: bool) -> Tensor:
        """(N, H, Dv), in the order of `_over_blocks`."""
        out = self._products(probs, values, transposed=False, masked=masked)
        return self._over_blocks(out.view(len(self.of), -1, values.shape[3]), torch.add).div_(total)

    def _over_blocks(self, of_blocks: Tensor, combine: Callable[..., Tensor]) -> Tensor:
        """(M, ...) -> (N, ...): the blocks of each sequence combined in their order; sequences with most come first."""
        start = self.levels[0]
        result = of_blocks[:start].clone()
        for size in self.levels[1:]:
            combine(result[:size], of_blocks[start : start + size], out=result[:size])
            start += size
        return result
