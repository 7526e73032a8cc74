"""Scores that are not finite, and NaN in keys that nobody sees, on the Triton backend."""

from __future__ import annotations

import math

import pytest
import torch
from nonfinite import HIDINGS, IRREGULAR, Hiding, Irregular, check_hidden, check_irregular

pytestmark = pytest.mark.filterwarnings("ignore:All-NaN slice", "ignore:invalid value", "ignore:overflow")


@pytest.mark.parametrize("case", [case for case in IRREGULAR if case.keys <= 300], ids=str)
def test_rows_that_are_not_finite(case: Irregular) -> None:
    dtype = (
        torch.float32 if "scores" in case.name or "block" in case.name else torch.float16
    )  # what overflows
    check_irregular(case, dtype, exact=False, backend="triton")


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("hiding", HIDINGS, ids=str)
def test_hidden_keys(hiding: Hiding, poison: float) -> None:
    check_hidden(hiding, torch.float16, poison, backend="triton")
