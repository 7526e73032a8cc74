"""Counts of operations, on which speed depends, are as recorded, and count what is executed."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch

from fastattn import torch_compat
from measure import counts

HAS_GPU = torch.cuda.is_available()


@pytest.mark.skipif(HAS_GPU, reason="counted where Triton is interpreted")
def test_counts_are_as_recorded() -> None:
    """Fewer fails too: a record that is too high would let a later increase pass."""
    lines = counts.differences(counts.recorded(), counts.measure(), torch.__version__)
    assert lines == [], f"if that is meant: {counts.RECORD}"


def test_operators_and_bytes_of_a_call() -> None:
    x = torch.ones(1000)

    def call() -> torch.Tensor:
        doubled = x + x
        return doubled + x

    found = counts.operators(call)
    assert found == {"operators": 2, "allocated": 8000, "peak": 8000}


def test_bytes_freed_on_the_way_are_no_peak() -> None:
    x = torch.ones(1000)
    assert counts.operators(lambda: x + (x + (x + x))) == {"operators": 3, "allocated": 12000, "peak": 8000}


def test_python_calls_are_those_of_the_package() -> None:
    import fastattn
    from fastattn.backends import switches

    assert counts.python_calls(lambda: torch.ones(3).add_(1)) == 0
    assert counts.python_calls(lambda: [switches.environment() for _ in range(3)]) == 3
    x = torch.ones(4, 8)
    planned = counts.python_calls(lambda: fastattn.softmax(x))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTATTN_DISABLE", "plan")
        assert counts.python_calls(lambda: fastattn.softmax(x)) > planned


@pytest.mark.skipif(HAS_GPU, reason="counted where Triton is interpreted")
def test_launches_are_named_and_not_executed() -> None:
    import fastattn

    x = torch.full((4, 100), float("nan"))
    with pytest.warns(RuntimeWarning, match="FASTATTN_BACKEND"):
        found = counts.launches(lambda: fastattn.softmax(x))
    assert [line.split(" x ")[0] for line in found["launches"]] == ["softmax_fwd_kernel"]
    assert found["allocated"] == 1600


@pytest.mark.skipif(HAS_GPU, reason="counted where Triton is interpreted")
def test_a_mask_saves_products() -> None:
    masks = counts._masks(counts.SMALL_LENGTH)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a backend is forced
        full, window = (counts._products_executed(masks[name]) for name in ("full", "window"))
    assert window["forward"] < full["forward"]
    assert window["with gradients"] < full["with gradients"]


STORED: dict[str, Any] = {
    "torch": "2.13",
    "counts": {
        "torch backend": {"a call": {"operators": 3, "allocated": 10}},
        "tiles visited": {"causal": {"tiles": 4}},
        "triton launches": {"a call": {"launches": ["kernel x 8"], "allocated": 10}},
    },
}


def test_every_difference_is_a_line() -> None:
    now = copy.deepcopy(STORED["counts"])
    assert counts.differences(STORED, now, "2.13.1+cpu") == []
    now["torch backend"]["a call"]["operators"] = 2
    now["triton launches"]["a call"]["launches"].append("another x 1")
    now["tiles visited"] = {"full": {"tiles": 1}}
    assert counts.differences(STORED, now, "2.13.1+cpu") == [
        "torch backend: a call: operators: was 3, is 2",
        "tiles visited: causal: tiles: was 4, is None",
        "tiles visited: full: tiles: was None, is 1",
        "triton launches: a call: launches: was ['kernel x 8'], is ['kernel x 8', 'another x 1']",
    ]


def test_another_torch_decides_its_own_operators_but_not_our_launches() -> None:
    now = copy.deepcopy(STORED["counts"])
    now["torch backend"]["a call"]["operators"] = 2
    now["triton launches"]["a call"]["allocated"] = 99
    assert counts.differences(STORED, now, "2.14.0") == []
    now["triton launches"]["a call"]["launches"] = []
    assert len(counts.differences(STORED, now, "2.14.0")) == 1


def test_a_record_of_another_version_is_refused(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "counts.json"
    file.write_text('{"format": "fastattn-counts", "version": 0}')
    monkeypatch.setattr(counts, "FILE", file)
    with pytest.raises(ValueError, match="--record"):
        counts.recorded()


@pytest.mark.parametrize("intel", [False, True])
def test_the_processor_changes_no_choice(intel: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("has_mkl_on_intel", "has_matrix_instructions", "prefers_mkl")
    for name in names:
        monkeypatch.setattr(torch_compat, name, lambda: intel)
    monkeypatch.setattr(torch_compat, "instructions", lambda: "AVX2, Intel" if intel else "AVX2")
    with counts._on_one_processor():
        found = [getattr(torch_compat, name)() for name in (*names, "instructions")]
        assert found == [False, False, True, "AVX512"]
    assert [getattr(torch_compat, name)() for name in names] == [intel] * 3
