"""The spec of a call: how float32 products are asked for, by either of torch's settings."""

from collections.abc import Iterator

import pytest
import torch

import fastattn
from fastattn.spec import AttentionCall, AttentionSpec

SETTING = torch.backends.cuda.matmul


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    yield
    SETTING.fp32_precision = "ieee"
    torch.set_float32_matmul_precision("highest")


def precision(dtype: torch.dtype = torch.float32) -> str:
    query = torch.randn(1, 2, 4, 8).to(dtype)
    assert fastattn.attention(query, query, query).isfinite().all()
    return AttentionSpec.of(AttentionCall(query, query, query)).float32_precision


@pytest.mark.parametrize(("setting", "expected"), [("highest", "ieee"), ("high", "tf32"), ("medium", "tf32")])
def test_the_older_setting(setting: str, expected: str) -> None:
    torch.set_float32_matmul_precision(setting)
    assert precision() == expected
    assert precision(torch.float16) == "ieee"


@pytest.mark.parametrize(("setting", "expected"), [("ieee", "ieee"), ("tf32", "tf32")])
def test_the_newer_setting_which_the_older_getter_refuses_to_read(setting: str, expected: str) -> None:
    SETTING.fp32_precision = setting
    assert precision() == expected
    assert precision(torch.float16) == "ieee"
