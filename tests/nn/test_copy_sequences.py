"""Sequences of a cache that become copies of others: what is copied is what was there before."""

from __future__ import annotations

import pytest
import torch

from fastattn.nn.kv_cache import copy_sequences


@pytest.mark.parametrize("tokens", [0, 1, 4, 7])
@pytest.mark.parametrize(
    ("source", "target"),
    [
        ([1, 0, 3], [0, 1, 2]),
        ([2, 2, 2, 2], [0, 1, 2, 3]),
        ([3], [0]),
        ([], []),
        ([1, 2, 3, 0], [0, 1, 2, 3]),
    ],
)
def test_copies_what_was_there_before(source: list[int], target: list[int], tokens: int) -> None:
    buffers = [torch.randn(4, heads, 7, 5) for heads in (2, 1)]
    expected = [buffer.clone() for buffer in buffers]
    for buffer, before in zip(expected, buffers):
        for of, to in zip(source, target):
            buffer[to, :, :tokens] = before[of, :, :tokens]
    copy_sequences(
        buffers, torch.tensor(source, dtype=torch.int64), torch.tensor(target, dtype=torch.int64), tokens
    )
    for buffer, wanted in zip(buffers, expected):
        assert torch.equal(buffer, wanted)


def test_a_buffer_that_is_not_contiguous_is_refused() -> None:
    buffer = torch.randn(4, 7, 2, 5).transpose(1, 2)
    with pytest.raises(RuntimeError, match="view size is not compatible"):
        copy_sequences([buffer], torch.tensor([0]), torch.tensor([1]), 3)
