"""Kernels on caches compiled ahead of time: nothing spills, copies are of 16 bytes, one variant serves every size."""

from __future__ import annotations

from typing import Any

import pytest
from compiler_process import answers_of


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    """The compiler's answers, from a process that doesn't interpret."""
    return answers_of("decode_compile.py")


def test_decoding_compiles_without_spills(report: dict[str, Any]) -> None:
    assert len(report["compiled"]) == 5
    for name, made in report["compiled"].items():
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


def test_a_split_is_computed_as_a_whole_is(report: dict[str, Any]) -> None:
    """A sequence of one split may stand in a small cache, whose result is written at once, or in a large one."""
    for bits, (whole, split, full) in report["arithmetic"].items():
        rounding = "cvt.rn.bf16x2.f32"
        rounded = whole.pop(rounding, 0) - split.pop(rounding, 0)
        assert (rounded > 0) == (bits == "16"), bits
        assert whole == split, bits
        assert full == split | {rounding: full[rounding]} if rounded else full == split, bits
        assert any(name.startswith(("mma", "fma")) for name in whole), bits
        assert any(name.startswith("ex2") for name in whole), bits
