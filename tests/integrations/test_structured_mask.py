"""A structured mask moves as a tensor does, and is one wherever it is treated as one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastattn.integrations.structured_mask import StructuredMask


def made(device: str = "cpu") -> StructuredMask:
    return StructuredMask((2, 1, 3, 4), device, causal=True, key_lengths=torch.tensor([4, 2], device=device))


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        (("cpu",), {}),
        (("meta", torch.float16, True), {}),
        ((torch.device("cpu"),), {"dtype": torch.int8}),
        ((torch.bool, False, True), {}),
        ((torch.ones(1, dtype=torch.float64),), {}),
        ((), {"tensor": torch.ones(1, dtype=torch.bool, device="meta")}),
        ((), {"device": "meta", "non_blocking": True}),
        ((), {"dtype": torch.int32, "copy": True}),
        (("cpu",), {"copy": True}),
    ],
)
def test_it_moves_as_a_tensor_does(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    expected = made().dense().to(*args, **kwargs)
    moved = made().to(*args, **kwargs)
    assert isinstance(moved, Tensor) == (expected.dtype != torch.bool)
    result = moved if isinstance(moved, Tensor) else moved.dense()
    assert (result.device, result.dtype, result.shape) == (expected.device, expected.dtype, expected.shape)
    if not result.is_meta:
        assert torch.equal(result, expected)


def test_torch_functions_take_it_in_lists_tuples_and_keywords() -> None:
    mask, dense = made(), made().dense()
    assert torch.equal(torch.cat([mask, dense]), torch.cat([dense, dense]))
    assert torch.equal(torch.where(condition=mask, input=dense, other=~dense), torch.ones_like(dense))
    assert torch.equal(torch.broadcast_tensors(mask, dense)[0], dense)
    assert torch.equal(torch.stack((mask, mask)), torch.stack((dense, dense)))
