"""Any strides and addresses of any tensor of any op, on the torch backend."""

from __future__ import annotations

import pytest
import stride_cases
import torch

CASES = stride_cases.cases(torch.float64, "torch")


@pytest.mark.parametrize(("case", "name"), stride_cases.names(CASES))
def test_results_are_those_of_dense_tensors(case: str, name: str) -> None:
    """By values: torch's own products round by strides. A layout's third call runs its plan, among those of others."""
    for _ in range(3):
        for layout in CASES[case].layouts(name):
            for actual, dense in zip(CASES[case].run(name, layout), CASES[case].expected, strict=True):
                torch.testing.assert_close(actual, dense, msg=lambda text, layout=layout: f"{layout}: {text}")
