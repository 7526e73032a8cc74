"""Products of a few rows: the error rule, the documented error of 8 bits, bits that do not depend on other rows."""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn import torch_compat
from fastattn.nn import rows as module
from fastattn.nn import rows_table
from fastattn.nn.blocks import ACTIVATIONS, FUSED
from fastattn.nn.linear import linear
from fastattn.nn.rows import INT8_LEVELS, Elementwise, InBlocks, Int8Rows, Rows, by_row, in_parts, rows_of
from numerics import assert_within_rule, plain_in_any_order

SHAPES = [(1, 1), (7, 5), (96, 64), (130, 33), (4200, 130)]  # (O, I), the last one packed in float32
PACKED = {"float32": ((None, "packed"),), "bfloat16": ((None, "packed"),)}
COUNTS = (0, 1, 2, 7, 8, 9, 17)


def operands(out: int, width: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return torch.randn(out, width).to(dtype), torch.randn(out).to(dtype)


@pytest.fixture(params=[True, False], ids=["fbgemm", "float64"])
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if not request.param:
        monkeypatch.setattr(torch_compat, "has_int8_linear", lambda: False)
    elif not torch_compat.has_int8_linear():
        pytest.skip("this torch has no FBGEMM")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("in_blocks", [False, True])
def test_products_keep_the_error_rule(dtype: torch.dtype, shape: tuple[int, int], in_blocks: bool) -> None:
    weight, bias = operands(*shape, dtype)
    product = rows_of(weight, bias)
    product = InBlocks(product) if in_blocks else product
    for count in COUNTS:
        x = torch.randn(count, shape[1]).to(dtype)
        golden = F.linear(x.double(), weight.double(), bias.double())
        actual = product(x)
        assert actual.dtype == dtype
        plain = F.linear(x, weight, bias)
        if dtype == torch.float32:
            plain = plain_in_any_order(lambda x=x: F.linear(x, weight, bias), golden)
        assert_within_rule(actual, plain, golden, f"{count} rows")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("in_blocks", [False, True])
def test_an_activation_in_the_kernel_of_a_product_keeps_the_error_rule(
    name: str, dtype: torch.dtype, in_blocks: bool
) -> None:
    activation = ACTIVATIONS[name]
    weight, bias = operands(4200, 130, dtype)
    product = rows_of(weight, bias, then=Elementwise(activation, FUSED.get(activation)))
    product = InBlocks(product) if in_blocks else product
    for count in COUNTS:
        x = torch.randn(count, 130).to(dtype)
        golden = activation(F.linear(x.double(), weight.double(), bias.double()))
        actual = product(x)
        assert actual.dtype == dtype
        plain = activation(F.linear(x, weight, bias))
        if dtype == torch.float32:
            plain = plain_in_any_order(lambda x=x: activation(F.linear(x, weight, bias)), golden)
        assert_within_rule(actual, plain, golden, f"{count} rows")
    x[2, 3] = torch.nan
    assert product(x)[2].isnan().all()
    assert product(x)[:2].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_a_block_with_an_activation_gives_a_row_the_same_bits_at_every_place(
    name: str, dtype: torch.dtype
) -> None:
    activation = ACTIVATIONS[name]
    weight, bias = operands(4200, 130, dtype)
    product = InBlocks(rows_of(weight, bias, then=Elementwise(by_row(activation), FUSED.get(activation))))
    x = torch.randn(19, 130).to(dtype)
    together = product(x)
    for row in range(19):
        assert torch.equal(product(x[row : row + 1])[0], together[row]), row
    order = torch.randperm(19)
    assert torch.equal(product(x[order]), together[order])


def test_an_activation_follows_a_product_of_8_bits() -> None:
    weight, bias = operands(64, 32)
    x = torch.randn(5, 32)
    product = rows_of(weight, bias, "int8", then=Elementwise(F.gelu, FUSED[F.gelu]))
    assert torch.equal(product(x), F.gelu(Int8Rows(weight, bias)(x)))


@pytest.mark.parametrize("count", [0, 1, 4, 5, 13])
def test_a_function_in_parts_has_small_temporaries_and_the_rows_of_the_whole(
    count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PART_ELEMENTS", 4 * 7)
    counts = []

    def wide(rows: Tensor) -> Tensor:
        counts.append(len(rows))
        return rows.repeat(1, 7).cumsum(1)[:, -2:]

    x = torch.randn(count, 1)
    assert torch.equal(in_parts(wide, x, 7), x.repeat(1, 7).cumsum(1)[:, -2:])
    assert sum(counts) == count
    assert max(counts) <= 4


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize("levels", [127, 63])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_error_of_8_bits_is_the_documented_one(
    shape: tuple[int, int], levels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each x is off by half a step of its row, each weight by half a step of its output, besides rounding."""
    if levels == 127 and torch_compat.has_int8_linear() and not torch_compat.has_int8_dot_products():
        pytest.skip("sums of products with 8-bit activations may not fit this CPU's 16 bits")
    monkeypatch.setattr(torch_compat, "has_int8_dot_products", lambda: levels == 127)
    weight, bias = operands(*shape)
    x = torch.randn(9, shape[1]) * torch.logspace(-20, 20, 9)[:, None]
    product = Int8Rows(weight, bias)
    assert product.levels == levels
    exact = F.linear(x.double(), weight.double(), bias.double())
    of_x = x.double().abs().amax(1, keepdim=True) / (2 * levels)  # (N, 1)
    of_weight = weight.double().abs().amax(1, keepdim=True) / (2 * INT8_LEVELS)  # (O, 1)
    bound = of_x * weight.double().abs().sum(1) + (x.double().abs() + of_x).sum(1, keepdim=True) * of_weight.T
    eps = torch.finfo(torch.float32).eps
    slack = 4 * eps * (exact.abs() + bound + bias.double().abs())  # three products and a sum in float32
    steps = (
        1 + 2 * levels * eps
    )  # an x / scale that lies between two levels may be rounded to the further one
    assert bool(((product(x) - exact).abs() <= steps * bound + slack).all())


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize("sign", [1, -1])
def test_sums_of_the_largest_8_bit_numbers_do_not_saturate(sign: int) -> None:
    weight = torch.full((40, 64), 0.5 * sign)
    for value in (3.0, -3.0):
        expected = torch.full((3, 40), 64 * 0.5 * sign * value)
        torch.testing.assert_close(Int8Rows(weight, None)(torch.full((3, 64), value)), expected)


@pytest.mark.usefixtures("engine")
def test_rows_of_8_bits_have_the_bits_that_each_has_alone() -> None:
    weight, bias = operands(96, 65)
    product, x = Int8Rows(weight, bias), torch.randn(17, 65)
    x[3] = 0
    together = product(x)
    assert torch.equal(together[3], bias)
    for count in (1, 2, 5, 16):
        for start in range(17 - count):
            assert torch.equal(product(x[start : start + count]), together[start : start + count])
    x[5, 7] = torch.nan
    broken = product(x)
    assert not broken[5].isfinite().any()
    assert torch.equal(broken[[*range(5), *range(6, 17)]], together[[*range(5), *range(6, 17)]])


def test_both_engines_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch_compat.has_int8_linear():
        pytest.skip("this torch has no FBGEMM")
    weight, bias = operands(96, 65)
    x = torch.randn(9, 65)
    fast = Int8Rows(weight, bias)(x)
    monkeypatch.setattr(torch_compat, "has_int8_linear", lambda: False)
    assert torch.equal(Int8Rows(weight.clone(), bias)(x), fast)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(97, 33), (768, 192), (192, 768), (4200, 130)], ids=str)
def test_a_block_gives_a_row_the_same_bits_at_every_place_and_beside_any_other(
    dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    """What benchmarks/rows.py measures for the sizes of models, at small ones."""
    weight, bias = operands(*shape, dtype)
    product = InBlocks(rows_of(weight, bias))
    x = torch.randn(19, shape[1]).to(dtype)
    together = product(x)
    for row in range(19):
        assert torch.equal(product(x[row : row + 1])[0], together[row]), row
    order = torch.randperm(19)
    assert torch.equal(product(x[order]), together[order])
    assert torch.equal(product(x[::2]), together[::2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("width", [96, 128, 100, 3072, 20480, 40960])
def test_by_row_has_the_bits_of_each_row_alone(width: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x = (4 * torch.randn(37, width, generator=generator)).to(dtype)
    for function in (F.gelu, F.silu, lambda rows: F.gelu(rows.chunk(2, -1)[0], approximate="tanh")):
        apply = by_row(function)
        together = apply(x)
        assert torch.equal(together, torch.cat([apply(row) for row in x.split(1)]))
        assert torch.equal(together[:5], apply(x[:5]))
        assert torch.equal(together[3], function(x[3:4].clone())[0])
        torch.testing.assert_close(together, function(x))
    assert by_row(F.gelu)(x[:0]).shape == (0, width)


@pytest.mark.parametrize("name", ["int8", "bfloat16", "float32"])
def test_a_packed_weight_follows_its_weight_and_goes_with_it(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    dtype = torch.bfloat16 if name == "bfloat16" else torch.float32
    kind = "int8" if name == "int8" else None
    monkeypatch.setattr(module, "FASTEST", {torch_compat.instructions(): PACKED})
    weight, _ = operands(4200, 130, dtype)
    x = torch.randn(3, 130).to(dtype)
    before = len(module._packs)
    first = rows_of(weight, None, kind)(x)
    kept = len(module._packs)
    assert kept == before + 1 or (kind is None and not torch_compat.has_packed_linear(dtype))
    assert torch.equal(rows_of(weight, None, kind)(x), first)
    weight.mul_(2)
    assert torch.equal(rows_of(weight, None, kind)(x), 2 * first)
    weight.data = torch.zeros_like(weight)
    assert torch.equal(rows_of(weight, None, kind)(x), torch.zeros_like(first))
    del weight
    gc.collect()
    assert len(module._packs) == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_table_is_what_chooses(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each number of rows goes to the product that the line of this CPU and dtype names for it."""
    used: list[str] = []

    def named(name: str) -> Callable[..., Rows]:
        return lambda weight, bias: lambda x: used.append(name) or F.linear(x, weight, bias)

    monkeypatch.setattr(module, "PRODUCTS", {name: named(name) for name in module.PRODUCTS})
    line = ((1, "one by one"), (4, "packed"), (None, "linear"))
    table = {torch_compat.instructions(): {str(dtype).removeprefix("torch."): line}}
    monkeypatch.setattr(module, "FASTEST", table)
    product = rows_of(*operands(7, 5, dtype))
    for count in (0, 1, 2, 4, 5, 17):
        product(torch.randn(count, 5).to(dtype))
    assert used == ["one by one"] * 2 + ["packed"] * 2 + ["linear"] * 2
    monkeypatch.setattr(module, "FASTEST", {})
    used.clear()
    rows_of(*operands(7, 5, dtype))(torch.randn(3, 5).to(dtype))
    assert used == ["packed" if dtype == torch.bfloat16 else "linear"]


def test_a_weight_is_packed_once_a_number_of_rows_uses_that(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[str] = []

    def packed(weight: Tensor, bias: Tensor | None) -> Rows:
        used.append("packed")
        return lambda x: F.linear(x, weight, bias)

    line = ((1, "one by one"), (None, "packed"))
    monkeypatch.setattr(module, "FASTEST", {torch_compat.instructions(): {"float32": line}})
    monkeypatch.setitem(module.PRODUCTS, "packed", packed)
    product = rows_of(*operands(7, 5))
    product(torch.randn(1, 5))
    assert used == []
    for _ in range(2):
        product(torch.randn(2, 5))
    assert used == ["packed"]


def test_a_cpu_of_another_maker_goes_by_its_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    of_both, of_one = ((None, "linear"),), ((None, "one by one"),)
    monkeypatch.setattr(module, "FASTEST", {"AVX9": {"float32": of_both}, "AVX9, A": {"float32": of_one}})
    assert module.choice_for("AVX9", torch.float32) == of_both
    assert module.choice_for("AVX9, A", torch.float32) == of_one
    assert module.choice_for("AVX9, B", torch.float32) == of_both
    assert module.choice_for("AVX8, A", torch.float32) == ((None, "linear"),)


def test_a_product_that_is_made_once_packs_no_float32_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FASTEST", {torch_compat.instructions(): PACKED})
    weight, bias = operands(4200, 130)
    before = len(module._packs)
    x = torch.randn(3, 130)
    once = rows_of(weight, bias, once=True)(x)
    assert len(module._packs) == before
    assert torch.equal(once, linear(x, weight, bias, repeated=True))
    rows_of(weight, bias)(x)
    assert len(module._packs) == before + int(torch_compat.has_packed_linear(torch.float32))


def test_every_line_of_the_table_covers_any_number_of_rows() -> None:
    for of_dtypes in rows_table.FASTEST.values():
        assert set(of_dtypes) == {"float32", "bfloat16", "float16"}
        for line in of_dtypes.values():
            most = [count for count, _ in line]
            assert most[-1] is None
            assert most[:-1] == sorted({count for count in most[:-1] if count is not None})
            assert {name for _, name in line} <= set(module.PRODUCTS)


@pytest.mark.parametrize("name", sorted(module.PRODUCTS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_product_of_the_table_keeps_the_error_rule(name: str, dtype: torch.dtype) -> None:
    """Also where the table names it for no dtype here: on another CPU it may."""
    weight, bias = operands(4200, 130, dtype)
    for count in (0, 1, 3, 9):
        x = torch.randn(count, 130).to(dtype)
        golden = F.linear(x.double(), weight.double(), bias.double())
        plain = F.linear(x, weight, bias)
        if dtype == torch.float32:
            plain = plain_in_any_order(lambda x=x: F.linear(x, weight, bias), golden)
        assert_within_rule(module.PRODUCTS[name](weight, bias)(x), plain, golden, f"{name}, {count} rows")
