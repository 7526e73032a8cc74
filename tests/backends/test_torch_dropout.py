"""The dropout stream drawn by NumPy is the one that every backend shares."""

from __future__ import annotations

import random

import pytest
import torch

from fastattn.backends.torch import dropout
from fastattn.philox import keep_mask, keep_scale


@pytest.mark.parametrize("block", [dropout.BLOCK, 7])
def test_equals_the_stream_of_torch_operations(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dropout, "BLOCK", block)
    drawn = random.Random(0)
    for _ in range(40):
        seed = torch.tensor([drawn.randrange(-(2**63), 2**63)])
        heads = torch.tensor([drawn.randrange(2**24) for _ in range(drawn.choice((1, 2, 6)))])[:, None]
        row, col = drawn.randrange(300), drawn.randrange(300)
        rows = range(row, row + drawn.choice((0, 1, 5, 64)))
        cols = range(col, col + drawn.choice((0, 1, 7, 8, 9, 130)))
        for p in (1e-9, 0.1, 0.5, 0.99999):
            expected = keep_mask(seed, heads, rows, cols, p).double() * keep_scale(p)
            assert torch.equal(dropout.scaled_keep_mask(seed, heads, rows, cols, p, torch.float64), expected)
