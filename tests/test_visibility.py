"""Visibility by position, segment and length is what a loop over pairs says."""

from __future__ import annotations

import itertools

import pytest
import torch

from fastattn import visibility

BOUNDS = (None, -1, 0, 2)


@pytest.mark.parametrize("shift", [-2, 0, 3])
def test_bands_are_those_of_the_sentence(shift: int) -> None:
    rows, cols = (1, 5), (2, 8)
    distance = visibility.distances(rows, cols, shift, torch.device("cpu"))
    for causal, left, right in itertools.product((False, True), BOUNDS, BOUNDS):
        seen = visibility.within_band(distance, causal, left, right)
        if seen is None:
            assert not causal
            assert left in (None, -1)
            assert right in (None, -1)
            continue
        for i, j in itertools.product(range(*rows), range(*cols)):
            pos = i + shift
            assert distance[i - rows[0], j - cols[0]] == pos - j
            expected = left in (None, -1) or j >= pos - left
            expected = expected and (not causal or j <= pos)
            expected = expected and (causal or right in (None, -1) or j <= pos + right)
            assert bool(seen[i - rows[0], j - cols[0]]) == expected


def test_segments_and_lengths() -> None:
    of_query, of_key = torch.tensor([[0, 1, -1], [2, 2, 0]]), torch.tensor([[1, 0, -1, 1], [0, 2, 2, -1]])
    seen = visibility.same_segment(of_query, of_key)
    for b, i, j in itertools.product(range(2), range(3), range(4)):
        assert bool(seen[b, i, j]) == (int(of_query[b, i]) == int(of_key[b, j]) >= 0)
    lengths = torch.tensor([0, 3], dtype=torch.int32)
    assert visibility.within_lengths(lengths, 4).tolist() == [[False] * 4, [True, True, True, False]]
