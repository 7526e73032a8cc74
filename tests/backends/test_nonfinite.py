"""Scores that are not finite, and NaN in keys that nobody sees, on the torch backend."""

from __future__ import annotations

import math

import pytest
import torch
from nonfinite import HIDINGS, IRREGULAR, Hiding, Irregular, check_hidden, check_irregular

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", IRREGULAR, ids=str)
def test_rows_that_are_not_finite(case: Irregular, dtype: torch.dtype) -> None:
    check_irregular(case, dtype, exact=True, samples=8 if dtype == torch.float32 else 2, backend="torch")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("hiding", HIDINGS, ids=str)
def test_hidden_keys(hiding: Hiding, dtype: torch.dtype) -> None:
    check_hidden(hiding, dtype, math.nan, math.inf, -math.inf, backend="torch")
