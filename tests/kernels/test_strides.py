"""Any strides and addresses of any tensor of any op, on the Triton backend."""

from __future__ import annotations

import pytest
import stride_cases
import torch
from attention_cases import DEVICE

CASES = stride_cases.cases(torch.float16, "triton")


# What each tensor is read by differs little between cases, and the interpreter is slow.
FEW = ("columns_apart", "expanded")
MORE = (*FEW, "rows_apart", "misplaced")
READ_BY_ROWS = ("query", "key", "value", "dout", "k_cache", "v_cache", "x", "logits")
ONCE = ("attention, masked", "weights", "varlen")  # these are read there as in `attention`
ELSEWHERE = {
    "attention, masked": ("query", "key", "dout", "dlse"),
    "weights": ("value", "bias", "dout", "dlse"),
}


def chosen() -> list[tuple[str, str]]:
    """(case, tensor), without what another case has."""
    return [(case, name) for case, name in stride_cases.names(CASES) if name not in ELSEWHERE.get(case, ())]


@pytest.mark.filterwarnings("ignore:FASTATTN_BACKEND")
@pytest.mark.skipif(DEVICE != "cpu", reason="the cases are made on the CPU, for the interpreter")
@pytest.mark.parametrize(("case", "name"), chosen())
def test_bits_are_those_of_dense_tensors(case: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTATTN_BACKEND", "triton")  # the losses take no backend
    more = name in READ_BY_ROWS and case not in ONCE
    for layout in CASES[case].layouts(name):
        if layout not in (MORE if more else FEW):
            continue
        for actual, dense in zip(CASES[case].run(name, layout), CASES[case].expected, strict=True):
            if CASES[case].exact:
                assert torch.equal(actual, dense), layout
            else:
                torch.testing.assert_close(actual, dense, msg=lambda text, layout=layout: f"{layout}: {text}")
