"""The exponential of scores: torch's, and 0 for what underflows."""

from __future__ import annotations

import math

import pytest
import torch

from fastattn.backends.torch.exponential import exp_


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_equals_torch_where_results_are_normal(dtype: torch.dtype) -> None:
    lowest = math.log(4 * torch.finfo(dtype).tiny)
    scores = torch.linspace(lowest + 1e-3, 80, 100_003, dtype=dtype)
    assert torch.equal(exp_(scores.clone()), scores.exp())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_rest(dtype: torch.dtype) -> None:
    lowest = math.log(torch.finfo(dtype).tiny)
    low = torch.tensor([-math.inf, -1e30, 2 * lowest, lowest - 10, lowest - 1, lowest], dtype=dtype).repeat(9)
    assert not exp_(low).any()
    others = exp_(torch.tensor([math.nan, math.inf, 0.0], dtype=dtype))
    assert others[0].isnan()
    assert others[1:].tolist() == [math.inf, 1.0]
