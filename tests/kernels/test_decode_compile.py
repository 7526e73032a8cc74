"""Kernels on caches compiled ahead of time: nothing spills, copies are of 16 bytes, one variant serves every size."""

from __future__ import annotations

from typing import Any

import pytest
from compiler_process import answers_of


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    """The compiler's answers, from a process that doesn't interpret."""
    return answers_of("decode_compile.py")


@pytest.fixture(scope="module")
def compiled() -> dict[str, Any]:
    """What takes the compiler longer."""
    return answers_of("decode_compile.py", "--compile")


@pytest.mark.exhaustive  # the compile table has these rows, and is that of the kernels
def test_decoding_compiles_without_spills(compiled: dict[str, Any]) -> None:
    assert len(compiled["compiled"]) == 5
    for name, made in compiled["compiled"].items():
        assert made["error"] == "", name
        assert made["registers"] > 0, name
        assert made["local_ops"] == 0, name
        assert made["shared"] <= 232448 // 3, name  # three programs to a multiprocessor of Hopper
        assert made["wide_copies"] or "decode" not in name, name


def test_caches_batches_heads_and_splits_share_one_variant(report: dict[str, Any]) -> None:
    """Capacities of 2, 17, 1000, 1024 and 4096, batches of 1, 2, 3 and 16, as many heads, 2 to 64 splits."""
    assert len(report["signatures"]) == 9
    for name, found in report["signatures"].items():
        assert len(found) == 6, name
        assert len(set(found)) == 1, name


@pytest.mark.parametrize(
    ("bits", "answers"), [("16", "report"), pytest.param("32", "compiled", marks=pytest.mark.exhaustive)]
)
def test_a_split_is_computed_as_a_whole_is(request: pytest.FixtureRequest, bits: str, answers: str) -> None:
    """A sequence of one split may stand in a small cache, whose result is written at once, or in a large one."""
    whole, split, full = request.getfixturevalue(answers)["arithmetic"][bits]
    rounding = "cvt.rn.bf16x2.f32"
    rounded = whole.pop(rounding, 0) - split.pop(rounding, 0)
    assert (rounded > 0) == (bits == "16")
    assert whole == split
    assert full == split | {rounding: full[rounding]} if rounded else full == split
    assert any(name.startswith(("mma", "fma")) for name in whole)
    assert any(name.startswith("ex2") for name in whole)
