"""Which tiles of the score matrix a call has to visit, from its band and its segments alone: integers, no tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

MIN_MEAN_RUN = 32  # segments shorter than this on average are not worth a tile each
MOST_KEPT_IDS = 2**14  # of the queries and keys of a sequence whose intervals are kept

Interval = tuple[range, range, bool]


@dataclass(slots=True)
class Band:
    """Query i sees keys pos(i) - left <= j <= pos(i) + right, pos(i) = i + shift; None is unbounded."""

    left: int | None
    right: int | None
    shift: int

    def hull(self, rows: range, cols: range) -> range:
        """The part of `cols` that some row of `rows` may see."""
        start, stop = cols.start, cols.stop
        if self.left is not None:
            start = max(start, rows.start + self.shift - self.left)
        if self.right is not None:
            stop = min(stop, rows.stop - 1 + self.shift + self.right + 1)
        return range(start, max(start, stop))

    def covers(self, rows: range, cols: range) -> bool:
        """Whether every row of `rows` sees every key of `cols`."""
        if self.left is not None and cols.start < rows.stop - 1 + self.shift - self.left:
            return False
        return self.right is None or cols.stop - 1 <= rows.start + self.shift + self.right


@dataclass(slots=True)
class Tile:
    """A rectangle of the score matrix and how much of it is visible."""

    rows: range
    cols: range
    structure: (
        str  # "full" | "causal": row r sees columns c <= r, both counted from the tile's corner | "masked"
    )


@dataclass(frozen=True, slots=True)
class Segments:
    """Segment ids of one sequence: (Sq,) and (Sk,) integers; negative ids attend nothing."""

    query: NDArray[np.int32]
    key: NDArray[np.int32]

    def intervals(self, len_k: int) -> Sequence[Interval]:
        """(rows, hull of the keys they may see, whether every row sees all of it), empty hulls left out."""
        key = self.key[:len_k]
        if len(self.query) + len(key) > MOST_KEPT_IDS:
            return _intervals(self.query, key)
        return _kept_intervals(self.query.tobytes(), key.tobytes())


@lru_cache(maxsize=128)  # the layers of a model, forward and backward, are given the same ids
def _kept_intervals(query: bytes, key: bytes) -> Sequence[Interval]:
    return _intervals(np.frombuffer(query, np.int32), np.frombuffer(key, np.int32))


def _intervals(query: NDArray[np.int32], key: NDArray[np.int32]) -> Sequence[Interval]:
    ids, first, counts = np.unique(key, return_index=True, return_counts=True)
    last = len(key) - 1 - np.unique(key[::-1], return_index=True)[1]
    where = {int(i): (int(f), int(p) + 1, int(n)) for i, f, p, n in zip(ids, first, last, counts) if i >= 0}
    changes = np.flatnonzero(np.diff(query)) + 1
    edges = [0, *(int(change) for change in changes), len(query)]
    if len(edges) - 1 > max(8, len(query) // MIN_MEAN_RUN):
        edges = [*range(0, len(query), MIN_MEAN_RUN), len(query)]
    found = []
    for start, stop in pairwise(edges):
        seen = [where[int(i)] for i in np.unique(query[start:stop]) if int(i) in where]
        if not seen:
            continue
        cols = range(min(f for f, _, _ in seen), max(p for _, p, _ in seen))
        single = bool((query[start:stop] == query[start]).all())
        found.append((range(start, stop), cols, single and seen[0][2] == len(cols)))
    return tuple(found)


def intervals(segments: Segments | None, len_q: int, len_k: int) -> Iterator[tuple[range, range, bool]]:
    """The row intervals a call falls into: one, or one per segment."""
    if segments is not None:
        yield from segments.intervals(len_k)
    elif len_q and len_k:
        yield range(len_q), range(len_k), True


def whole_tiles(
    band: Band, segments: Segments | None, len_q: int, len_k: int, row_block: int, dense: bool
) -> Iterator[list[Tile]]:
    """Tiles for a kernel that is blockwise itself: as large as each can be full, causal or one range of a band.

    Yields the tiles of one row range at a time; their rows agree and their columns do not overlap. With `dense`, a
    mask or bias must be cut along, so rows come in blocks of `row_block`.
    """
    for rows, cols, exact in intervals(segments, len_q, len_k):
        if exact and not dense and band.left is None and band.right in (None, 0):
            yield from _square_tiles(band, rows, cols)
            continue
        for block in _blocks(rows, row_block):
            hull = band.hull(block, cols)
            if hull:
                full = exact and band.covers(block, hull)
                yield [Tile(block, hull, "full" if full else "masked")]


def block_tiles(
    band: Band, segments: Segments | None, len_q: int, len_k: int, row_block: int, col_block: int
) -> Iterator[list[Tile]]:
    """Tiles of at most row_block x col_block, row block by row block, without those that are fully masked."""
    for rows, cols, exact in intervals(segments, len_q, len_k):
        for block in _blocks(rows, row_block):
            tiles = []
            for part in _blocks(band.hull(block, cols), col_block):
                full = exact and band.covers(block, part)
                tiles.append(Tile(block, part, "full" if full else "masked"))
            if tiles:
                yield tiles


def _square_tiles(band: Band, rows: range, cols: range) -> Iterator[list[Tile]]:
    """A full or causal rectangle as at most two tiles: the keys that every row sees, and the diagonal."""
    if band.right is None:
        yield [Tile(rows, cols, "full")]
        return
    rows = range(max(rows.start, cols.start - band.shift), rows.stop)  # earlier rows see nothing
    corner = rows.start + band.shift  # the last key that the first row sees
    if not rows:
        return
    if corner + 1 >= cols.stop:
        yield [Tile(rows, cols, "full")]
        return
    if len(rows) == 1:
        yield [Tile(rows, range(cols.start, corner + 1), "full")]
        return
    tiles = [Tile(rows, range(cols.start, corner), "full")] if corner > cols.start else []
    tiles.append(Tile(rows, range(corner, min(cols.stop, rows.stop + band.shift)), "causal"))
    yield tiles


def _blocks(whole: range, size: int) -> Iterator[range]:
    for start in range(whole.start, whole.stop, size):
        yield range(start, min(start + size, whole.stop))
