"""Every clause of the contract on the Triton backend, through the public call and with the tiles users get."""

from __future__ import annotations

import pytest
import torch
from attention_cases import DEVICE
from contract import CASES, Case, check


@pytest.mark.parametrize("case", CASES, ids=str)
def test_contract(case: Case) -> None:
    check(case, torch.float16, device=DEVICE, backend="triton")
