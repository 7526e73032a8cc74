"""What dropout multiplies weights by: the stream of `philox`, drawn by NumPy on a CPU.

NumPy starts an operation in a fraction of torch's time, and every one of a hundred operations is on a few thousand
counters, which stay in a core's cache.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Hashable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastattn.integers import cdiv
from fastattn.philox import (
    KEYS_PER_CALL,
    LOW32,
    MULTIPLIER,
    ROUNDS,
    WEYL,
    keep_mask,
    keep_threshold,
)

BLOCK = 2**14  # counters that are drawn at a time; six buffers of 8 bytes for each
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


def kept_weights(seed: Tensor, heads: Tensor, rows: range, cols: range, dropout_p: float) -> Tensor:
    """0 for a weight that is dropped, 1 for one that is kept: (*heads.shape, len(rows), len(cols)), bytes or booleans.

    Args:
        seed, heads, rows, cols, dropout_p: as of `keep_mask`; real tensors.
    """
    if not heads.is_cpu:
        return keep_mask(seed, heads, rows, cols, dropout_p)
    threshold = keep_threshold(dropout_p)
    first, last = cols.start // KEYS_PER_CALL, cdiv(cols.stop, KEYS_PER_CALL)
    numbers = heads.flatten().numpy()
    shape = (len(numbers), len(rows), max(last - first, 0) * KEYS_PER_CALL)
    key = (int(seed), numbers.tobytes(), rows, first, last, threshold)
    packed = _recent.get(key)
    if packed is None:
        drawn = _kept(int(seed), numbers, rows, range(first, last), threshold)
        _recent.put(key, np.packbits(drawn))
        kept = drawn.view(np.uint8)
    else:
        kept = np.unpackbits(packed).reshape(shape)
    start = cols.start - first * KEYS_PER_CALL
    return torch.from_numpy(kept[:, :, start : start + len(cols)]).unflatten(0, heads.shape)


def _kept(
    seed: int, heads: NDArray[np.int64], rows: range, calls: range, threshold: int
) -> NDArray[np.bool_]:
    """(heads, rows, 8 * calls)."""
    keep = np.empty((len(heads), len(rows), len(calls) * KEYS_PER_CALL), np.bool_)
    if keep.size:
        most_rows = min(len(rows), max(BLOCK // len(calls), 1))
        most_rows = cdiv(len(rows), cdiv(len(rows), most_rows))  # equal parts
        most_heads = max(BLOCK // (len(calls) * most_rows), 1) if most_rows == len(rows) else 1
        places = np.arange(calls.start, calls.stop, dtype=np.uint64)
        for head in range(0, len(heads), most_heads):
            of_heads = heads[head : head + most_heads].astype(np.uint64)[:, None, None]
            for row in range(0, len(rows), most_rows):
                of_rows = np.arange(rows.start, rows.stop, dtype=np.uint64)[row : row + most_rows, None]
                halves = _halves(places, of_rows, of_heads, (seed & LOW32, (seed >> 32) & LOW32))
                part = keep[head : head + most_heads, row : row + most_rows]
                np.greater_equal(halves, np.uint16(threshold), out=part)
    return keep


def _buffers(count: int, shape: tuple[int, ...]) -> list[Words]:
    """Uninitialised arrays whose addresses differ modulo the size of a page.

    Those of separate arrays are often equal modulo it, and then a load from one waits for a store to another (4K
    aliasing).
    """
    size = math.prod(shape)
    step = cdiv(size, PAGE_WORDS) * PAGE_WORDS + PAGE_WORDS // 8
    memory = np.empty(count * step, np.uint64)
    return [memory[i * step : i * step + size].reshape(shape) for i in range(count)]


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
