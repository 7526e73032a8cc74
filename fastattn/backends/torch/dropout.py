"""What dropout multiplies weights by: the stream of `philox`, drawn by NumPy or by all threads of torch.

Every one of a hundred operations is on as many counters as stay in a core's cache. NumPy starts an operation in a
fraction of torch's time, but on one thread.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastattn.backends.torch.memory import shared
from fastattn.integers import cdiv
from fastattn.philox import (
    KEYS_PER_CALL,
    LOW32,
    MULTIPLIER,
    ROUNDS,
    TOP_BITS,
    WEYL,
    keep_mask,
    keep_threshold,
)

BLOCK = 2**14  # counters that NumPy draws at a time; six buffers of 8 bytes for each
THREADED_MIN = 2**15 + 1  # counters, from which on torch divides an operation among threads
THREADED_BLOCK = 2**15  # counters of a thread of torch at a time
MOST_THREADS = 8  # that draw; the memory of one operation's counters is kept
PAGE_WORDS = 2**9  # of 8 bytes, in a page of memory
RECENT_BYTES = 2**24  # of masks that are kept for a backward pass
Words = NDArray[np.uint64]
_LOW, _SHIFT = np.uint64(LOW32), np.uint64(32)
_BY = np.uint64(MULTIPLIER[0]), np.uint64(MULTIPLIER[1])


class _RecentMasks:
    """The masks that were drawn last, a bit for each weight: a backward pass needs what its forward drew.

    Drawing one takes far longer than packing and unpacking it.
    """

    def __init__(self, most_bytes: int) -> None:
        self.most_bytes, self.bytes = most_bytes, 0
        self._packed: OrderedDict[Hashable, NDArray[np.uint8]] = (
            OrderedDict()
        )  # the one used longest ago first
        self._lock = threading.Lock()

    def get(self, key: Hashable) -> NDArray[np.uint8] | None:
        """The packed mask of this key, if it is still here."""
        with self._lock:
            packed = self._packed.get(key)
            if packed is not None:
                self._packed.move_to_end(key)
            return packed

    def put(self, key: Hashable, packed: NDArray[np.uint8]) -> None:
        """Keep a mask, in place of those used longest ago where there is no room for all."""
        if packed.nbytes > self.most_bytes:
            return
        with self._lock:
            known = self._packed.pop(key, None)
            self.bytes += packed.nbytes - (0 if known is None else known.nbytes)
            self._packed[key] = packed
            while self.bytes > self.most_bytes:
                self.bytes -= self._packed.popitem(last=False)[1].nbytes


_recent = _RecentMasks(RECENT_BYTES)


@dataclass(frozen=True)
class Grid:
    """Weights that are drawn together.

    Args:
        heads, rows, cols: as of `keep_mask`; a real tensor.
    """

    heads: Tensor
    rows: range
    cols: range

    @property
    def calls(self) -> range:
        """Of Philox, for a row of a head."""
        first = self.cols.start // KEYS_PER_CALL
        return range(first, max(cdiv(self.cols.stop, KEYS_PER_CALL), first))

    @property
    def shape(self) -> tuple[int, int, int]:
        """(heads, rows, keys of its calls)."""
        return self.heads.numel(), len(self.rows), len(self.calls) * KEYS_PER_CALL


def kept_weights(seed: Tensor, heads: Tensor, rows: range, cols: range, dropout_p: float) -> Tensor:
    """0 for a weight that is dropped, 1 for one that is kept: (*heads.shape, len(rows), len(cols)), bytes or booleans.

    Args:
        seed, heads, rows, cols, dropout_p: as of `keep_mask`; real tensors.
    """
    return kept_weights_of(seed, [Grid(heads, rows, cols)], dropout_p)[0]


def kept_weights_of(seed: Tensor, grids: Sequence[Grid], dropout_p: float) -> list[Tensor]:
    """`kept_weights` of several grids on one device."""
    if not all(grid.heads.is_cpu for grid in grids):
        return [keep_mask(seed, grid.heads, grid.rows, grid.cols, dropout_p) for grid in grids]
    threshold = keep_threshold(dropout_p)
    keys = [
        (int(seed), grid.heads.numpy().tobytes(), grid.rows, grid.calls.start, grid.calls.stop, threshold)
        for grid in grids
    ]
    packed = [_recent.get(key) for key in keys]
    drawn = iter(_drawn(int(seed), [grid for grid, mask in zip(grids, packed) if mask is None], threshold))
    found = []
    for grid, key, mask in zip(grids, keys, packed):
        if mask is None:
            new = next(drawn)
            _recent.put(key, np.packbits(new))
            kept = new.view(np.uint8)
        else:
            kept = np.unpackbits(mask, count=math.prod(grid.shape)).reshape(grid.shape)
        start = grid.cols.start - grid.calls.start * KEYS_PER_CALL
        weights = torch.from_numpy(kept[:, :, start : start + len(grid.cols)])
        found.append(weights.unflatten(0, grid.heads.shape))
    return found


def _drawn(seed: int, grids: Sequence[Grid], threshold: int) -> list[NDArray[np.bool_]]:
    """Whether weights are kept, of the shapes of the grids."""
    keeps: list[NDArray[np.bool_]] = [np.empty(grid.shape, np.bool_) for grid in grids]
    key = seed & LOW32, (seed >> 32) & LOW32
    threads = torch.get_num_threads()
    if threads > 1 and sum(keep.size for keep in keeps) >= THREADED_MIN * KEYS_PER_CALL:
        _draw_by_threads(key, grids, threshold, keeps, THREADED_BLOCK * min(threads, MOST_THREADS))
        return keeps
    for grid, keep in zip(grids, keeps):
        calls = np.arange(grid.calls.start, grid.calls.stop, dtype=np.uint64)
        rows = np.arange(grid.rows.start, grid.rows.stop, dtype=np.uint64)[:, None]
        heads = grid.heads.flatten().numpy().astype(np.uint64)[:, None, None]
        for of_heads, of_rows in _pieces(grid.shape, BLOCK):
            halves = _halves(calls, rows[of_rows], heads[of_heads], key)
            np.greater_equal(halves, np.uint16(threshold), out=keep[of_heads, of_rows])
    return keeps


def _pieces(shape: tuple[int, int, int], most: int) -> Iterator[tuple[slice, slice]]:
    """The heads and rows of the pieces of a grid with about `most` counters, a row at least."""
    num_heads, num_rows, cols = shape
    if not (num_heads and num_rows and cols):
        return
    calls = cols // KEYS_PER_CALL
    most_rows = min(num_rows, max(most // calls, 1))
    most_rows = cdiv(num_rows, cdiv(num_rows, most_rows))  # equal parts
    most_heads = max(most // (calls * most_rows), 1) if most_rows == num_rows else 1
    for head in range(0, num_heads, most_heads):
        for row in range(0, num_rows, most_rows):
            yield slice(head, head + most_heads), slice(row, row + most_rows)


def _draw_by_threads(
    key: tuple[int, int], grids: Sequence[Grid], threshold: int, keeps: Sequence[NDArray[np.bool_]], most: int
) -> None:
    """Write which weights are kept, by operations on about `most` counters, of several grids where they are small."""
    pieces = [
        (grid, torch.from_numpy(keep)[part], part)
        for grid, keep in zip(grids, keeps)
        for part in _pieces(grid.shape, most)
    ]
    while pieces:
        count = 0
        some: list[tuple[Grid, Tensor, tuple[slice, slice]]] = []
        while pieces and (not some or count + pieces[0][1].numel() // KEYS_PER_CALL <= most):
            some.append(pieces.pop(0))
            count += some[-1][1].numel() // KEYS_PER_CALL
        words = shared("words", (6, _apart(count)), torch.int64)[:, :count]
        words[3] = 0
        start = 0
        for grid, keep, (of_heads, of_rows) in some:
            stop = start + keep.numel() // KEYS_PER_CALL
            c0, c1, c2 = words[:3, start:stop].view(3, *keep.shape[:2], len(grid.calls))
            c0.copy_(torch.arange(grid.calls.start, grid.calls.stop, device="cpu"))
            c1.copy_(torch.arange(grid.rows.start, grid.rows.stop, device="cpu")[of_rows, None])
            c2.copy_(grid.heads.flatten()[of_heads, None, None])
            start = stop
        halves = _halves_by_threads(words, key)
        start = 0
        for _, keep, _ in some:
            stop = start + keep.numel() // KEYS_PER_CALL
            torch.ge(halves[start:stop].view(keep.shape), threshold - 0x8000, out=keep)
            start = stop


def _halves_by_threads(words: Tensor, key: tuple[int, int]) -> Tensor:
    """The 16-bit halves (n, 8) of Philox4x32-10, less 0x8000, of words (6, n), of which four are the counters; all are
    overwritten."""
    c0, c1, c2, c3, product0, product1 = words
    for number in range(ROUNDS):
        k0, k1 = ((k + number * w) & LOW32 for k, w in zip(key, WEYL))
        torch.mul(c0, MULTIPLIER[0], out=product0)
        torch.mul(c2, MULTIPLIER[1], out=product1)
        # of c1 and c3 only the low word counts, so that nothing has to clear the high one
        for word, product, other, k in ((c0, product1, c1, k0), (c2, product0, c3, k1)):
            torch.bitwise_right_shift(product, 32, out=word)
            word.bitwise_xor_(other).bitwise_xor_(k).bitwise_and_(LOW32)
        c1, product1 = product1, c1
        c3, product0 = product0, c3
    pairs = shared("pairs", (words.shape[1], 2), torch.int64)
    for place, low, high in ((0, c0, c1), (1, c2, c3)):
        high.bitwise_left_shift_(32).bitwise_or_(low)
        torch.bitwise_xor(high, TOP_BITS, out=pairs[:, place])
    return pairs.view(torch.int16)


def _buffers(count: int, shape: tuple[int, ...]) -> list[Words]:
    """Uninitialised arrays whose addresses differ modulo the size of a page."""
    size = math.prod(shape)
    memory = np.empty((count, _apart(size)), np.uint64)
    return [buffer[:size].reshape(shape) for buffer in memory]


def _apart(size: int) -> int:
    """A distance of buffers of `size` words, at which their addresses differ modulo the size of a page.

    Those of separate arrays are often equal modulo it, and then a load from one waits for a store to another (4K
    aliasing).
    """
    return cdiv(size, PAGE_WORDS) * PAGE_WORDS + PAGE_WORDS // 8


def _halves(calls: Words, rows: Words, heads: Words, key: tuple[int, int]) -> NDArray[np.uint16]:
    """The 16-bit halves of Philox4x32-10 in the order of their keys, (heads, rows, 8 * calls).

    What depends on some of the three coordinates only is worked out for these, which is so of three rounds.
    """
    shape = (len(heads), len(rows), len(calls))
    keys = [[np.uint64((k + number * w) & LOW32) for k, w in zip(key, WEYL)] for number in range(ROUNDS)]
    of_calls, of_heads = calls * _BY[0], heads * _BY[1]
    of_rows = (of_heads >> _SHIFT ^ rows ^ keys[0][0]) * _BY[0]  # and of heads
    others = (of_calls >> _SHIFT ^ keys[0][1]) * _BY[1]
    of_both = (others >> _SHIFT ^ of_heads & _LOW ^ keys[1][0]) * _BY[0]  # of calls and heads
    c0, c1, c2, c3, product0, product1 = _buffers(6, shape)
    np.bitwise_xor(of_rows >> _SHIFT ^ keys[1][1], of_calls & _LOW, out=c2)
    np.multiply(c2, _BY[1], out=c1)
    np.right_shift(c1, _SHIFT, out=c0)
    np.bitwise_xor(c0, others & _LOW ^ keys[2][0], out=c0)
    np.bitwise_xor(of_both >> _SHIFT, of_rows & _LOW ^ keys[2][1], out=c2)
    np.copyto(c3, of_both)
    c0, c1, c2, c3, product0, product1 = (each.reshape(-1) for each in (c0, c1, c2, c3, product0, product1))
    for k0, k1 in keys[3:]:
        np.multiply(c0, _BY[0], out=product0)
        np.multiply(c2, _BY[1], out=product1)
        # A product's high word goes on at once, its low one in the next round; high words of c0 and c2 are 0.
        for word, product, other, k in ((c0, product1, c1, k0), (c2, product0, c3, k1)):
            np.bitwise_xor(_high(product), _low(other), out=_low(word))
            np.bitwise_xor(word, k, out=word)
        c1, product1 = product1, c1
        c3, product0 = product0, c3
    words = np.empty((c0.size, 4), np.uint32)
    for place, word in enumerate((c0, c1, c2, c3)):
        words[:, place] = _low(word)
    return words.view(np.uint16).reshape(*shape[:2], -1)


def _low(words: Words) -> NDArray[np.uint32]:
    """The low 32 bits of each, a view."""
    return words.view(np.uint32)[::2]


def _high(words: Words) -> NDArray[np.uint32]:
    """The high 32 bits of each, a view."""
    return words.view(np.uint32)[1::2]
