"""Large results are in memory for which Linux was asked for pages of 2 MiB."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import fastattn
from fastattn.backends import large_pages

THRESHOLD = 2**20  # with which small tensors are large enough

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not Path("/sys/kernel/mm/transparent_hugepage/enabled").exists(),
    reason="only Linux takes advice about pages",
)


def advised(tensor: Tensor) -> bool:
    """Whether the mapping that holds a tensor's memory carries the advice ("hg" of its flags)."""
    address, holds = tensor.data_ptr() + tensor.nbytes // 2, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, *rest = line.split()
        if "-" in first and not first.endswith(":"):
            start, end = (int(part, 16) for part in first.split("-"))
            holds = start <= address < end
        elif holds and first == "VmFlags:":
            return "hg" in rest
    raise AssertionError("no mapping holds the tensor")


def softmax_gradient(x: Tensor) -> Tensor:
    fastattn.softmax(x).backward(torch.ones_like(x))
    assert x.grad is not None
    return x.grad


def loss_gradient(x: Tensor) -> Tensor:
    fastattn.cross_entropy(x, torch.zeros(x.shape[0], dtype=torch.long)).backward()
    assert x.grad is not None
    return x.grad


def loss_gradient_per_token(x: Tensor) -> Tensor:
    losses = fastattn.cross_entropy(x, torch.zeros(x.shape[0], dtype=torch.long), reduction="none")
    losses.backward(torch.ones_like(losses))
    assert x.grad is not None
    return x.grad


def weight_gradient(weight: Tensor) -> Tensor:
    hidden = torch.ones(4, weight.shape[1])
    fastattn.linear_cross_entropy(hidden, weight, torch.zeros(4, dtype=torch.long)).backward()
    assert weight.grad is not None
    return weight.grad


@pytest.mark.parametrize(
    "result", [fastattn.softmax, softmax_gradient, loss_gradient, loss_gradient_per_token, weight_gradient]
)
def test_large_results_and_gradients_are_advised(
    result: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(large_pages, "LEAST_BYTES", THRESHOLD)
    assert advised(result(torch.randn(THRESHOLD // 128, 64, requires_grad=True)))


def test_values_stay_and_smaller_tensors_are_left_alone() -> None:
    asked = []
    large, small = torch.zeros(large_pages.LEAST_BYTES // 4), torch.zeros(large_pages.LEAST_BYTES // 4 - 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(large_pages, "_advise", lambda *args: asked.append(args))
        assert large_pages.in_large_pages(small) is small
        assert not asked
        assert large_pages.in_large_pages(large) is large
    ((start, length, _),) = asked
    assert start % 4096 == 0
    assert large.data_ptr() <= start < large.data_ptr() + 4096
    assert start + length == large.data_ptr() + large.nbytes
    assert torch.count_nonzero(large_pages.in_large_pages(large)) == 0


def test_without_advice_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(large_pages, "_advise", None)
    tensor = torch.ones(large_pages.LEAST_BYTES // 4)
    assert large_pages.in_large_pages(tensor) is tensor
