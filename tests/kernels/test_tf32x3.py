"""Exact float32 products from three of tf32: with their rounding imitated, kernels stay within the error rule."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import triton_interpreter
from attention_cases import Case, check
from attention_launches import launches_of

from fastattn.kernels.tiles import Tile, Tiles
from fastattn.spec import AttentionCall

pytestmark = pytest.mark.skipif(
    not triton_interpreter.INTERPRETING, reason="the rounding of tf32 is imitated in the interpreter"
)

THRICE = Tile(16, 16, 4, 1, tf32x3=True)
TILES = Tiles(THRICE, THRICE, THRICE, THRICE)
SIZES = {
    "seqlen_q": 33,
    "seqlen_k": 49,
    "head_dim": 32,
    "value_dim": 32,
    "dtype": torch.float32,
    "samples": 3,
}
CASES = [
    Case("causal", {"causal": True}, tiles=TILES, **SIZES),
    Case("bias", lambda make: {"bias": make.normal(1, 1, 33, 49)}, tiles=TILES, **SIZES),
    Case("large scores", {"scale": 2.0}, tiles=TILES, **SIZES),
]


def to_tf32(values: np.ndarray) -> np.ndarray:
    """Float32 values rounded to tf32's ten bits of fraction, ties away from zero, as the hardware's conversion does."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    return ((bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)


def split_product(a: np.ndarray, b: np.ndarray, times: int) -> np.ndarray:
    """a @ b from the leading parts of both, and with `times` 3 from their remainders with each other's leading part."""
    head_a, head_b = to_tf32(a), to_tf32(b)
    if times == 1:
        return head_a @ head_b
    rest_a, rest_b = to_tf32(a - head_a), to_tf32(b - head_b)
    return head_a @ rest_b + rest_a @ head_b + head_a @ head_b


@pytest.fixture(autouse=True)
def products(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kinds of float32 products made, each with its rounding imitated."""
    from triton.runtime import interpreter

    made: list[str] = []
    original = interpreter.InterpreterBuilder.create_dot

    def create_dot(builder: Any, a: Any, b: Any, acc: Any, precision: Any, *rest: Any) -> Any:
        name = str(precision).rpartition(".")[2].lower()
        made.append(name)
        if a.dtype.scalar != interpreter.tl.float32 or name == "ieee":
            return original(builder, a, b, acc, precision, *rest)
        result = split_product(a.data, b.data, 3 if name == "tf32x3" else 1) + acc.data
        return interpreter.TensorHandle(result.astype(np.float32), acc.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)
    return made


@pytest.mark.parametrize("case", CASES, ids=str)
def test_three_products_are_within_the_rule(case: Case, products: list[str]) -> None:
    check(case)
    assert set(products) == {"tf32x3"}


def test_one_product_is_not(products: list[str]) -> None:
    torch.set_float32_matmul_precision("high")
    try:
        with pytest.raises(AssertionError, match="error"):
            check(CASES[0])
    finally:
        torch.set_float32_matmul_precision("highest")
    assert set(products) == {"tf32"}


def test_only_such_tiles_and_only_exact_products_are_split() -> None:
    def precision(dtype: torch.dtype, tile: Tile) -> str:
        query = torch.empty(1, 1, 16, 16, dtype=dtype)
        launches = launches_of(AttentionCall(query, query, query), tile)
        (found,) = {
            launches[name].arguments["VARIANT"].dot_precision for name in ("forward", "dkdv", "dq", "weights")
        }
        return found

    assert precision(torch.float32, THRICE) == "tf32x3"
    assert precision(torch.float32, Tile(16, 16, 4, 1)) == "ieee"
    torch.set_float32_matmul_precision("high")
    try:
        assert precision(torch.float32, THRICE) == "tf32"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_the_imitated_rounding() -> None:
    values = np.array([1.0, 1 + 2**-10, 1 + 2**-11, 1 + 2**-12, -1 - 2**-11], dtype=np.float32)
    expected = np.array([1.0, 1 + 2**-10, 1 + 2**-10, 1.0, -1 - 2**-10], dtype=np.float32)
    assert (to_tf32(values) == expected).all()
