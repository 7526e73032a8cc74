"""Scores that are not finite, and NaN in keys that nobody sees, on the Triton backend."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from attention_cases import DEVICE
from nonfinite import HIDINGS, IRREGULAR, Hiding, Irregular, check_hidden, check_irregular

import fastattn
from fastattn.kernels.launches import delta_launch
from fastattn.spec import AttentionCall, AttentionSpec

pytestmark = pytest.mark.filterwarnings("ignore:All-NaN slice", "ignore:invalid value", "ignore:overflow")


@pytest.mark.parametrize("case", [case for case in IRREGULAR if case.keys <= 300], ids=str)
def test_rows_that_are_not_finite(case: Irregular) -> None:
    dtype = (
        torch.float32 if "scores" in case.name or "block" in case.name else torch.float16
    )  # what overflows
    check_irregular(case, dtype, exact=False, backend="triton")


@pytest.mark.parametrize("hiding", HIDINGS, ids=str)
def test_hidden_keys(hiding: Hiding) -> None:
    check_hidden(hiding, torch.float16, math.nan, math.inf, backend="triton")


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


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("with_output", [True, False])
def test_the_preparation_of_backward_makes_lse_a_reference(dtype: torch.dtype, with_output: bool) -> None:
    """In base 2 where the scale is folded in, +inf, and no delta, for a row without keys; NaN stays NaN."""
    query = torch.randn(1, 2, 70, 16, device=DEVICE, dtype=dtype)
    call = AttentionCall(query, query, query)
    lse = torch.randn(1, 2, 70, device=DEVICE)
    lse[0, :, 3], lse[0, :, 66], lse[0, 1, 5] = -torch.inf, torch.inf, torch.nan
    reference, delta = torch.empty_like(lse), torch.empty_like(lse)
    results = {"out": query, "dout": query, "delta": delta} if with_output else {}
    delta_launch(AttentionSpec.of(call), call, lse, reference, **results).run()
    wanted = torch.where(
        lse == -torch.inf, torch.inf, lse * (math.log2(math.e) if dtype == torch.float16 else 1.0)
    )
    eps = torch.finfo(torch.float32).eps
    assert torch.allclose(
        reference, wanted, rtol=2 * eps, atol=0.0, equal_nan=True
    )  # one product, one constant
    if with_output:
        sums = torch.where(lse == -torch.inf, 0.0, query.float().square().sum(-1))
        assert torch.allclose(delta, sums, rtol=16 * eps, atol=0.0)  # of sums of 16 squares
