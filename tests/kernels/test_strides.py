"""Any strides and addresses of any tensor of any op, on the Triton backend."""

from __future__ import annotations

from functools import cache

import pytest
import stride_cases
import torch
from attention_cases import DEVICE
from stride_cases import Case
from torch import Tensor


@cache
def cases() -> dict[str, Case]:
    return stride_cases.cases(torch.float16, "triton")


@cache
def expected(case: str) -> list[Tensor]:
    return cases()[case].run()


@pytest.mark.filterwarnings("ignore:FASTATTN_BACKEND")
@pytest.mark.skipif(DEVICE != "cpu", reason="the cases are made on the CPU, for the interpreter")
@pytest.mark.parametrize(("case", "name"), stride_cases.names(cases()))
def test_bits_are_those_of_dense_tensors(case: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTATTN_BACKEND", "triton")  # the losses take no backend
    for layout in cases()[case].layouts(name):
        for actual, dense in zip(cases()[case].run(name, layout), expected(case), strict=True):
            if cases()[case].exact:
                assert torch.equal(actual, dense), layout
            else:
                torch.testing.assert_close(actual, dense, msg=lambda text, layout=layout: f"{layout}: {text}")
