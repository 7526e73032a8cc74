"""The interpreter's bfloat16 corrections: right themselves, and still needed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
import triton_interpreter

pytestmark = pytest.mark.skipif(not triton_interpreter.INTERPRETING, reason="kernels run on the GPU")


@triton.jit
def matmul_kernel(a, b, out, SIZE: tl.constexpr):
    """out = a @ b for square float32 `out` and any operand type."""
    rows = tl.arange(0, SIZE)[:, None]
    cols = tl.arange(0, SIZE)[None, :]
    product = tl.dot(tl.load(a + rows * SIZE + cols), tl.load(b + rows * SIZE + cols))
    tl.store(out + rows * SIZE + cols, product)


@triton.jit
def convert_kernel(source, target, SIZE: tl.constexpr):
    """target = source in target's type."""
    index = tl.arange(0, SIZE)
    tl.store(target + index, tl.load(source + index).to(target.dtype.element_ty))


@pytest.fixture
def uncorrected(corrected_interpreter: triton_interpreter.Correction) -> Iterator[None]:
    """The interpreter as Triton ships it."""
    corrected_interpreter.remove()
    yield
    corrected_interpreter.install()


def product(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(16, 16, generator=generator).to(dtype) for _ in range(2))
    out = torch.empty(16, 16)
    matmul_kernel[(1,)](a, b, out, SIZE=16)
    return out, a.float() @ b.float()


def converted(values: torch.Tensor) -> torch.Tensor:
    out = torch.empty(len(values), dtype=torch.bfloat16)
    convert_kernel[(1,)](values, out, SIZE=len(values))
    return out


VALUES = torch.cat(
    [torch.randn(60, generator=torch.Generator().manual_seed(1)), torch.tensor([0.0, -1e-40, 3e38, 1e-3])]
)


def test_bfloat16_products() -> None:
    actual, expected = product(torch.bfloat16)
    torch.testing.assert_close(actual, expected)


def test_bfloat16_rounds_to_nearest_even() -> None:
    halfway = torch.tensor([1 + 2.0**-8, 1 + 3 * 2.0**-8, 1 + 2.0**-8 + 2.0**-20, -1 - 2.0**-8])
    special = torch.tensor([float("inf"), float("-inf"), 3.4e38, 0.0])
    values = torch.cat([VALUES, halfway, special, VALUES[:56]])
    assert torch.equal(converted(values), values.to(torch.bfloat16))
    assert converted(torch.full((16,), float("nan"))).isnan().all()


def test_bfloat16_widens_exactly() -> None:
    source = VALUES.to(torch.bfloat16)
    target = torch.empty(len(source))
    convert_kernel[(1,)](source, target, SIZE=len(source))
    assert torch.equal(target, source.float())


def test_uncorrected_products_are_wrong(uncorrected: None) -> None:
    actual, expected = product(torch.bfloat16)
    if torch.allclose(actual, expected, atol=1e-4):
        pytest.skip("this Triton multiplies bfloat16 correctly")
    assert (actual - expected).abs().max() > 1e6


def test_uncorrected_rounding_is_wrong(uncorrected: None) -> None:
    actual = converted(VALUES)
    if torch.equal(actual, VALUES.to(torch.bfloat16)):
        pytest.skip("this Triton rounds bfloat16 correctly")
    error = (actual.float() - VALUES).abs()[:60] / VALUES.abs()[:60]
    assert error.max() > 2.0**-9  # more than half a unit in the last place


@triton.jit
def double_kernel(values):
    """values *= 2, for one int32."""
    value = tl.load(values)
    tl.store(values, value + value)


def doubled() -> int:
    values = torch.tensor([2**30 + 5], dtype=torch.int32)
    double_kernel[(1,)](values)
    return int(values)


def test_integers_wrap_around_as_on_a_gpu() -> None:
    assert doubled() == 2**31 + 10 - 2**32


@pytest.mark.usefixtures("uncorrected")
def test_triton_checks_integers_for_overflow_and_drops_what_it_found() -> None:
    """So that leaving the check out changes nothing outside of debug mode."""
    from triton.runtime import interpreter

    assert interpreter.interpreter_builder.options.sanitize_overflow
    assert doubled() == 2**31 + 10 - 2**32


def test_a_benchmark_in_the_same_process_corrects_nothing_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    from triton.runtime import interpreter

    import checkout

    assert checkout.correct_interpreter()
    correction = triton_interpreter.correction()
    correction.remove()
    try:
        assert interpreter.interpreter_builder.options.sanitize_overflow
    finally:
        correction.install()
    assert not interpreter.interpreter_builder.options.sanitize_overflow
