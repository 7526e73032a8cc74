"""Tiles visited for a mask: every visible pair exactly once, invisible tiles never, counts that may not grow."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fastattn.backends.torch import schedule
from fastattn.backends.torch.schedule import Band, Segments, Tile, block_tiles, whole_tiles

BANDS = st.builds(
    Band,
    left=st.none() | st.integers(0, 40),
    right=st.none() | st.integers(0, 40),
    shift=st.integers(-30, 30),
)


def visible_pairs(band: Band, segments: Segments | None, len_q: int, len_k: int) -> NDArray[np.bool_]:
    distance = np.arange(len_q)[:, None] + band.shift - np.arange(len_k)
    seen = np.ones((len_q, len_k), dtype=bool)
    if band.left is not None:
        seen &= distance <= band.left
    if band.right is not None:
        seen &= distance >= -band.right
    if segments is not None:
        seen &= (segments.query[:, None] == segments.key[:len_k]) & (segments.query >= 0)[:, None]
    return seen


def hold(tile_lists: Iterable[list[Tile]], seen: NDArray[np.bool_]) -> None:
    """Each list shares its rows; tiles hold what their structure says; together they cover every visible pair once."""
    visits = np.zeros(seen.shape, dtype=int)
    for tiles in tile_lists:
        assert {tile.rows for tile in tiles} == {tiles[0].rows}
        for tile in tiles:
            assert tile.rows
            assert tile.cols
            index = np.s_[tile.rows.start : tile.rows.stop, tile.cols.start : tile.cols.stop]
            visits[index] += 1
            if tile.structure == "full":
                assert seen[index].all()
            if tile.structure == "causal":
                assert (seen[index] == np.tri(len(tile.rows), len(tile.cols), dtype=bool)).all()
    assert (visits[seen] == 1).all()
    assert visits.max(initial=0) <= 1


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    band=BANDS,
    len_q=st.integers(0, 50),
    len_k=st.integers(0, 50),
    row_block=st.integers(1, 20),
    col_block=st.integers(1, 20),
    dense=st.booleans(),
)
def test_bands(band: Band, len_q: int, len_k: int, row_block: int, col_block: int, dense: bool) -> None:
    seen = visible_pairs(band, None, len_q, len_k)
    hold(whole_tiles(band, None, len_q, len_k, row_block, dense), seen)
    hold(block_tiles(band, None, len_q, len_k, row_block, col_block), seen)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(data=st.data(), band=BANDS, dense=st.booleans(), ordered=st.booleans())
def test_segments(data: st.DataObject, band: Band, dense: bool, ordered: bool) -> None:
    ids = st.lists(st.integers(-2, 4), min_size=1, max_size=60)
    query, key = (np.array(data.draw(ids), dtype=np.int32) for _ in range(2))
    if ordered:
        query.sort()
        key.sort()
    segments = Segments(query, key)
    length = data.draw(st.integers(0, len(key)))
    seen = visible_pairs(band, segments, len(query), length)
    hold(whole_tiles(band, segments, len(query), length, 16, dense), seen)
    hold(block_tiles(band, segments, len(query), length, 16, 8), seen)


@pytest.mark.parametrize(
    ("band", "pairs"),
    [
        (Band(None, None, 0), 1024 * 1024),
        (Band(None, 0, 0), 1024 * 1024 // 2 + 1024 * 128 // 2),
        (Band(63, 0, 0), 1024 * (128 + 63)),
        (Band(0, 0, 0), 1024 * 128),
    ],
    ids=["full", "causal", "window 64", "window 1"],
)
def test_work_of_a_mask(band: Band, pairs: int) -> None:
    """Pairs visited at 1024 x 1024 with blocks of 128: a window costs its width, causality half."""
    tiles = [tile for row in block_tiles(band, None, 1024, 1024, 128, 128) for tile in row]
    assert sum(len(t.rows) * len(t.cols) for t in tiles) <= pairs


def test_packed_documents_are_one_unmasked_tile_each() -> None:
    ids = np.repeat(np.arange(8, dtype=np.int32), 1024)
    for right, structure in ((None, "full"), (0, "causal")):
        rows = list(whole_tiles(Band(None, right, 0), Segments(ids, ids), 8192, 8192, 128, False))
        assert [[tile.structure for tile in tiles] for tiles in rows] == [[structure]] * 8


def test_a_dense_causal_call_is_one_tile() -> None:
    assert list(whole_tiles(Band(None, 0, 0), None, 512, 512, 128, False)) == [
        [Tile(range(512), range(512), "causal")]
    ]


def test_intervals_follow_ids_that_change_in_place() -> None:
    """Those of short sequences are kept by the ids' values; of long ones they are made anew."""
    for length in (64, schedule.MOST_KEPT_IDS):
        ids = np.repeat(np.arange(4, dtype=np.int32), length // 4)
        segments = Segments(ids, ids)
        before = list(segments.intervals(length))
        assert list(segments.intervals(length)) == before
        assert [len(rows) for rows, _, _ in before] == [length // 4] * 4
        assert [len(cols) for _, cols, _ in segments.intervals(length // 2)] == [length // 4] * 2
        ids[: length // 2] = -1
        assert list(segments.intervals(length)) == before[2:]
