"""The contract's clauses on the Triton backend, through the public call and with the tiles users get."""

from __future__ import annotations

import pytest
import torch
from attention_cases import DEVICE
from contract import CASES, SAMPLES, Case, check

INTERPRETED = (  # the others wait for a GPU: test_attention.py and its neighbours interpret the same clauses
    "causal",
    "causal, one query",
    "head dim 59",
    "batch, length, heads, dim in memory",
    "mask of one bool",
    "bias of one number",
    "bias with -inf",
    "short segments",
    "lengths and causal",
    "sinks alone",
    "no queries",
    "no keys but sinks",
    "no batch",
    "everything",
)


def marked(case: Case) -> object:
    return pytest.param(case, id=str(case), marks=[] if case.name in INTERPRETED else [pytest.mark.gpu])


@pytest.mark.parametrize("case", [marked(case) for case in CASES])
def test_contract(case: Case) -> None:
    check(case, torch.float16, device=DEVICE, backend="triton")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_contract_in_other_dtypes(case: Case, dtype: torch.dtype) -> None:
    samples = SAMPLES if dtype == torch.float32 else 2
    check(case, dtype, device=DEVICE, backend="triton", samples=samples)


def test_the_names_are_of_cases() -> None:
    assert set(INTERPRETED) <= {case.name for case in CASES}
