"""One query for each of several sequences, against their keys in blocks of a fixed number.

All sequences run in the same operations, whatever their lengths, and each has the bits that it has alone: a batched
product, and torch's fused kernel on some processors, give a matrix the same bits at any place of the batch, and what
the blocks of a sequence add up to is summed in their order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastattn.backends.torch import single_query
from fastattn.backends.torch.exponential import exp_
from fastattn.backends.torch.fused import is_regular
from fastattn.backends.torch.whole_rows import product
from fastattn.integers import cdiv
from fastattn.spec import accumulation_dtype

KEYS = 64  # of a block
COPIED_ELEMENTS = 2**17  # of keys or values that are copied at a time, for each thread


def whole_blocks(tokens: int) -> int:
    """So many tokens or a few more, which are whole blocks: a cache of them is copied fastest."""
    return cdiv(tokens, KEYS) * KEYS


class KeyBlocks:
    """Which blocks of caches of pages the last key of each of N sequences sees, and where they are.

    Blocks are sorted: the first ones of all sequences, then the second ones ..., and within these the sequences of the
    most blocks come first. Products run in another order, by addresses (`_Stored`).

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
        begin = first * KEYS
        pages = table.numpy()[np.arange(len(ends)), begin // page_size]
        # within those of as many blocks by addresses, so that `_Stored` seldom has to sort
        order = np.lexsort((pages, begin % page_size, -counts))
        # how many sequences have a first block, a second one ...
        self.levels = [int((counts > level).sum()) for level in range(counts.max())]
        # the place of each block's sequence in the order
        places = np.concatenate([np.arange(size) for size in self.levels])
        of = order[places]
        block = first[of] + np.repeat(np.arange(len(self.levels)), self.levels)
        tokens = math.gcd(page_size, KEYS)  # that are next to each other in a page
        # (M, KEYS / tokens); beyond the last key a sequence may have no page
        at = np.minimum(block[:, None] * KEYS + np.arange(0, KEYS, tokens), ends[of, None] - 1)
        pages = table.numpy()[of[:, None], at // page_size]
        self.stored = _Stored(pages, at % page_size // tokens, heads, page_size, tokens)
        keys = block[:, None] * KEYS + np.arange(KEYS)
        hidden = (keys >= ends[of, None]) | (keys < starts[of, None])
        self.hidden = torch.from_numpy(hidden)[:, None]  # (M, 1, KEYS)
        self.heads, self.count, self.places = heads, len(of), torch.from_numpy(places)
        self.of = torch.from_numpy(of[self.stored.order])
        self.back = torch.from_numpy(np.argsort(order))
        self.results_in_order = _is_sorted(order)
        self.queries_in_order = _is_sorted(of[self.stored.order])
        # additive, of `hidden` in the order of `stored`, in the last call's dtype
        self._mask: Tensor | None = None

    def attend(
        self, query: Tensor, keys: Tensor, values: Tensor, scale: float | None, softcap: float | None
    ) -> Tensor:
        """Attention of the queries (N, H, 1, D), each the last of its sequence, (N, H, 1, Dv).

        Args:
            query: any strides.
            keys, values: (P, Hkv, page, D) and (P, Hkv, page, Dv), contiguous.
            scale, softcap: as in `attention`.
        """
        scale = query.shape[3] ** -0.5 if scale is None else scale
        if not softcap and self._runs_kernel(query, values, scale):
            out = self._by_kernel(query[:, :, 0], keys, values, scale)
        else:
            out = self._by_products(query[:, :, 0], keys, values, scale, softcap)
        if not self.results_in_order:
            out = out.index_select(0, self.back)
        return out.to(query.dtype)[:, :, None]

    def _runs_kernel(self, query: Tensor, values: Tensor, scale: float) -> bool:
        group, dim, value_dim = query.shape[1] // self.heads, query.shape[3], values.shape[3]
        several = torch.get_num_threads() > 1
        return single_query.keeps_bits(group, dim, value_dim, query.dtype, scale, several)

    def _of_blocks(self, queries: Tensor, dtype: torch.dtype) -> Tensor:
        """(N, H, D) as (M * Hkv, group, D), the queries of each block in the order of `_Stored`."""
        if not self.queries_in_order:
            queries = queries.index_select(0, self.of)
        return queries.to(dtype).reshape(self.count * self.heads, queries.shape[1] // self.heads, -1)

    def _by_kernel(self, queries: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
        """(N, H, Dv), in the order of `_over_blocks`, by torch's fused kernel, and by products for sequences in which
        that is wrong."""
        rows = self._of_blocks(queries, queries.dtype).unflatten(0, (self.count, self.heads))
        out, lse = self._fused(rows, keys, values, scale, with_rest=True)
        wrong = None
        if not (is_regular(lse) and math.isfinite(out.sum().item())):
            # what a block holds besides its sequence's keys may not be finite
            out, lse = self._fused(rows, keys, values, scale, with_rest=False)
            wrong = self._over_blocks((lse == 0) | ~lse.isfinite(), torch.logical_or)  # (N, H)
        if len(self.levels) > 1:
            largest = self._over_blocks(lse.clone(), torch.maximum)
            shares = exp_(lse.sub_(largest.index_select(0, self.places)))
            out = self._over_blocks(out * shares[..., None], torch.add)
            out.div_(self._over_blocks(shares, torch.add)[..., None])
        if wrong is not None and wrong.any():
            by_products = self._by_products(queries, keys, values, scale, None)
            out = torch.where(wrong.any(1)[:, None, None], by_products, out)
        return out

    def _fused(
        self, rows: Tensor, keys: Tensor, values: Tensor, scale: float, *, with_rest: bool
    ) -> tuple[Tensor, Tensor]:
        """(out, lse) of each block, (M, H, Dv) and (M, H), for rows (M, Hkv, group, D).

        with_rest: read what a block holds besides its sequence's keys, with weights of 0; otherwise zeros are there.
        """
        hidden = self.stored.sorted(self.hidden)[:, None]  # (M, 1, 1, KEYS)
        if self._mask is None or self._mask.dtype != rows.dtype:
            zeros = torch.zeros(hidden.shape, dtype=rows.dtype, device="cpu")
            self._mask = zeros.masked_fill_(hidden, -torch.inf)
        outs, lses = [], []
        of_keys, of_values = (self.stored.batches(pages, converted=False) for pages in (keys, values))
        for (start, key), (_, value) in zip(of_keys, of_values):
            key, value = (t.unflatten(0, (-1, self.heads)) for t in (key, value))
            part = slice(start, start + key.shape[0])
            if not with_rest:
                key, value = (t.masked_fill(hidden[part].mT, 0) for t in (key, value))
            out, lse = single_query.fused_rows(rows[part], key, value, scale, self._mask[part])
            outs.append(out)
            lses.append(lse)
        out, lse = (made[0] if len(made) == 1 else torch.cat(made) for made in (outs, lses))
        out, lse = out.reshape(self.count, -1, out.shape[3]), lse.reshape(self.count, -1)
        return self.stored.unsorted(out), self.stored.unsorted(lse)

    def _by_products(
        self, queries: Tensor, keys: Tensor, values: Tensor, scale: float, softcap: float | None
    ) -> Tensor:
        """(N, H, Dv), in the order of `_over_blocks`."""
        count, num_heads = self.count, queries.shape[1]
        queries = self._of_blocks(queries, accumulation_dtype(queries.dtype))
        scores = self.stored.products(queries, keys, transposed=True).mul_(scale)
        if softcap:
            scores.div_(softcap).tanh_().mul_(softcap)
        scores = self.stored.unsorted(scores.view(count, num_heads, KEYS))
        scores = scores.masked_fill_(self.hidden, -torch.inf)
        largest = self._over_blocks(scores.amax(-1), torch.maximum)  # (N, H)
        if len(self.levels) > 1:
            largest = largest.index_select(0, self.places)
        probs = exp_(scores.sub_(largest[..., None]))
        total = self._over_blocks(probs.sum(-1), torch.add)[..., None]
        probs = self.stored.sorted(probs).view(count * self.heads, num_heads // self.heads, KEYS)
        out = self._weighted(probs, values, total)
        if not math.isfinite(out.sum().item()):  # what no key of this sequence may be in the last block
            out = self._weighted(probs, values, total, self.stored.sorted(self.hidden))
        return out

    def _weighted(self, probs: Tensor, values: Tensor, total: Tensor, hidden: Tensor | None = None) -> Tensor:
        """(N, H, Dv), in the order of `_over_blocks`."""
        out = self.stored.products(probs, values, transposed=False, hidden=hidden)
        out = self.stored.unsorted(out.view(self.count, -1, values.shape[3]))
        return self._over_blocks(out, torch.add).div_(total)

    def _over_blocks(self, of_blocks: Tensor, combine: Callable[..., Tensor]) -> Tensor:
        """(M, ...) -> (N, ...): the blocks of each sequence combined in their order, in the memory of the first ones;
        sequences with most come first."""
        start = self.levels[0]
        result = of_blocks[:start]
        for size in self.levels[1:]:
            combine(result[:size], of_blocks[start : start + size], out=result[:size])
            start += size
        return result


class _Run(NamedTuple):
    """Blocks at the same place of pages that follow each other."""

    start: int  # of the blocks in the order of `_Stored`
    stop: int
    page: int  # of the first one
    inside: int  # blocks before them in their pages


class _Stored:
    """M blocks in the order of their addresses, in which many are one batch of matrices where they lie.

    Blocks that are not whole within a page, and those without a neighbour, are copied.

    Args:
        pages, inside: (M, KEYS / tokens), the page of each part of a block and the parts before it in there.
        heads, page_size: as of `KeyBlocks`.
        tokens: of a part.
    """

    def __init__(
        self,
        pages: NDArray[np.integer],
        inside: NDArray[np.integer],
        heads: int,
        page_size: int,
        tokens: int,
    ) -> None:
        self.heads, self.page_size, self.tokens = heads, page_size, tokens
        self.runs, order = _runs(pages[:, 0], inside[:, 0]) if tokens == KEYS else ([], None)
        if order is not None and _is_sorted(order):
            order = None
        self.order = slice(None) if order is None else order
        self._order = self._unsorted = None
        if order is not None:
            self._order, self._unsorted = torch.from_numpy(order), torch.from_numpy(np.argsort(order))
        self.copied = self.runs[-1].stop if self.runs else 0  # from which block on they are
        rows = (pages[:, None] * heads + np.arange(heads)[:, None]) * (page_size // tokens) + inside[:, None]
        rows = rows[self.order][self.copied :]
        # of caches (P * heads * parts, tokens * D)
        self.rows = torch.from_numpy(rows.reshape(len(rows), heads * pages.shape[1]))

    def sorted(self, blocks: Tensor) -> Tensor:
        """(M, ...) in this order."""
        return blocks if self._order is None else blocks.index_select(0, self._order)

    def unsorted(self, blocks: Tensor) -> Tensor:
        """(M, ...) in the order that they were given in."""
        return blocks if self._unsorted is None else blocks.index_select(0, self._unsorted)

    def products(
        self, rows: Tensor, pages: Tensor, *, transposed: bool, hidden: Tensor | None = None
    ) -> Tensor:
        """The products of (M * heads, group, n) with blocks of caches (P, heads, page, D), or with these transposed.

        hidden: (M, 1, KEYS), keys that count as 0; None = none.
        """
        result = rows.new_empty(*rows.shape[:2], KEYS if transposed else pages.shape[3])
        for start, blocks in self.batches(pages, converted=pages.dtype != rows.dtype):
            part = slice(start * self.heads, start * self.heads + blocks.shape[0])
            matrices = blocks.to(rows.dtype)
            if hidden is not None:
                unseen = hidden[start : start + blocks.shape[0] // self.heads].expand(-1, self.heads, -1)
                matrices = matrices.masked_fill(unseen.reshape(-1, KEYS, 1), 0)
            operands = rows[part], (matrices.mT if transposed else matrices)
            if matrices.shape[0] == 1:
                result[part] = product(*operands)
            else:
                torch.bmm(*operands, out=result[part])
        return result

    def batches(self, pages: Tensor, *, converted: bool) -> Iterator[tuple[int, Tensor]]:
        """(first block, blocks (m * heads, KEYS, D)); few at a time where they are copied, or converted by the caller,
        so that they stay in a core's cache until they are multiplied."""
        dim = pages.shape[3]
        step = max(1, COPIED_ELEMENTS * torch.get_num_threads() // (self.heads * KEYS * dim))
        matrix = self.page_size * dim
        for run in self.runs:
            most = step if converted else run.stop - run.start
            for start in range(run.start, run.stop, most):
                count = min(most, run.stop - start) * self.heads
                first = (run.page + start - run.start) * self.heads * matrix + run.inside * KEYS * dim
                yield (
                    start,
                    pages.as_strided((count, KEYS, dim), (matrix, dim, 1), pages.storage_offset() + first),
                )
        if len(self.rows):
            source = pages.view(-1, self.tokens * dim)
            copied = source.new_empty(min(step, len(self.rows)) * self.rows.shape[1], source.shape[1])
            for start in range(0, len(self.rows), step):
                places = self.rows[start : start + step].flatten()
                blocks = torch.index_select(source, 0, places, out=copied[: len(places)])
                yield self.copied + start, blocks.view(-1, KEYS, dim)


def _is_sorted(order: NDArray[np.integer]) -> bool:
    """Whether an order of 0, 1 ... changes nothing."""
    return np.array_equal(order, np.arange(len(order)))


def _runs(pages: NDArray[np.integer], inside: NDArray[np.integer]) -> tuple[list[_Run], NDArray[np.integer]]:
    """Runs of at least two blocks, and the order in which they come first, one after another."""
    order = np.lexsort((pages, inside))
    pages, inside = pages[order], inside[order]
    follows = (np.diff(pages) == 1) & (np.diff(inside) == 0)
    edges = np.concatenate(([0], np.flatnonzero(~follows) + 1, [len(order)]))
    long = np.diff(edges) > 1
    runs, first, parts = [], 0, []
    for start, stop in zip(edges[:-1][long].tolist(), edges[1:][long].tolist()):
        runs.append(_Run(first, first + stop - start, int(pages[start]), int(inside[start])))
        parts.append(order[start:stop])
        first += stop - start
    return runs, np.concatenate([*parts, order[~np.repeat(long, np.diff(edges))]])
