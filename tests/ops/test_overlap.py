"""Which tensors share elements: against their addresses, one by one."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from fastattn.ops.overlap import MAX_CANDIDATES, overlap, overlaps_itself

STEPS = (0, 1, 2, 3, 4, 5, 6, 7, 8, 12, 13, 16, 24, 30, 48)


def any_view(memory: Tensor, draw: random.Random) -> Tensor:
    rank = draw.randint(1, 4)
    shape = [draw.randint(0 if draw.random() < 0.03 else 1, 4) for _ in range(rank)]
    return memory.as_strided(shape, [draw.choice(STEPS) for _ in range(rank)], draw.randint(0, 40))


def test_as_addresses_say() -> None:
    memory, draw = torch.arange(1000), random.Random(0)
    found = {False: 0, True: 0}
    for _ in range(3000):
        one, other = any_view(memory, draw), any_view(memory, draw)
        places, others = one.flatten().tolist(), other.flatten().tolist()
        assert overlaps_itself(one) == (len(set(places)) < len(places)), (one.shape, one.stride())
        shared = bool(set(places) & set(others))
        assert overlap(one, other) == overlap(other, one) == shared, (one.stride(), other.stride())
        found[shared] += 1
    assert min(found.values()) > 300


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (2, 0, 3, 1), (3, 2, 1, 0)])
def test_views_of_dense_tensors_never_overlap_themselves(order: tuple[int, ...]) -> None:
    dense = torch.empty(4, 6, 5, 8)
    assert not overlaps_itself(dense.permute(order))
    assert not overlaps_itself(dense[::2, 1:4, :, ::3].permute(order))


def test_separate_memory() -> None:
    assert not overlap(torch.zeros(4, 4), torch.zeros(4, 4))
    assert not overlap(torch.zeros(0, 4), torch.zeros(0, 4))


def test_one_array_under_two_storages() -> None:
    array = torch.zeros(100).numpy()
    one, other, beyond = (
        torch.from_numpy(array[part]) for part in (slice(0, 50), slice(49, 99), slice(50, 99))
    )
    assert one.untyped_storage().data_ptr() != other.untyped_storage().data_ptr()
    assert overlap(one, other)
    assert overlap(other, one)
    assert not overlap(one, beyond)


def test_elements_that_are_not_aligned_to_each_other() -> None:
    memory = torch.zeros(64, dtype=torch.uint8)
    one, other = memory[:32].view(torch.float32), memory[:32].clone()
    assert not overlap(one, other.view(torch.float32))
    half = torch.frombuffer(bytearray(40), dtype=torch.uint8)
    assert overlap(half[:16].view(torch.int16), torch.from_numpy(half.numpy()[1:17].view("int16")))
    assert not overlap(half[:16].view(torch.int16), torch.from_numpy(half.numpy()[17:33].view("int16")))


@pytest.mark.parametrize("step", [101, 20011])
def test_strides_that_are_not_nested(step: int) -> None:
    """Coprime strides meet where the dimensions are long enough; beyond so many candidates they count as meeting."""
    shape, strides = (step - 12, step - 1), (step, step - 11)
    longer = (step - 10, step + 1)
    assert overlaps_itself(torch.empty_strided(longer, strides, device="meta"))
    assert overlaps_itself(torch.empty_strided(shape, strides, device="meta")) == (step > MAX_CANDIDATES)
