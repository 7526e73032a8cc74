"""Any strides and addresses of any tensor of any op, on the torch backend."""

from __future__ import annotations

from functools import cache

import pytest
import stride_cases
import torch
from stride_cases import Case
from torch import Tensor


@cache
def cases() -> dict[str, Case]:
    return stride_cases.cases(torch.float64, "torch")


@cache
def expected(case: str) -> list[Tensor]:
    return cases()[case].run()


@pytest.mark.parametrize(("case", "name"), stride_cases.names(cases()))
def test_results_are_those_of_dense_tensors(case: str, name: str) -> None:
    """By values: torch's own products round by strides. A layout's third call runs its plan, among those of others."""
    for _ in range(3):
        for layout in cases()[case].layouts(name):
            for actual, dense in zip(cases()[case].run(name, layout), expected(case), strict=True):
                torch.testing.assert_close(actual, dense, msg=lambda text, layout=layout: f"{layout}: {text}")
