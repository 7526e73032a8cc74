"""Scores that are not finite, and NaN in keys that nobody sees, on the Triton backend."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from attention_cases import DEVICE
from nonfinite import HIDINGS, IRREGULAR, Hiding, Irregular, check_hidden, check_irregular

import fastattn

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


@pytest.mark.parametrize(
    "options", [{}, {"causal": True}, {"window": (1, 0)}, {"key_lengths": torch.tensor([5])}], ids=str
)
@pytest.mark.parametrize("kind", [True, "mean"])
def test_hidden_keys_have_no_weight_in_a_row_that_is_nan(options: dict[str, Any], kind: bool | str) -> None:
    query, key, value = (torch.randn(1, 2, 7, 16, device=DEVICE) for _ in range(3))
    query[0, 0, 3, 0] = torch.nan
    options = {name: t.to(DEVICE) if isinstance(t, torch.Tensor) else t for name, t in options.items()}
    found, wanted = (
        fastattn.attention(query, key, value, **options, return_weights=kind, backend=backend)[1]
        for backend in ("triton", "torch")
    )
    assert torch.equal(found.isnan(), wanted.isnan())
    assert found.isnan().any()
