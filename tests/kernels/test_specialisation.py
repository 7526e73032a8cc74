"""One compiled variant serves every length: what Triton's launcher specialises on, asked of it without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

KERNELS = (
    *("forward", "delta", "lse_correction", "dkdv", "dkdv_split", "sum_splits"),
    *("dq", "dbias", "weights", "segments"),
)


@pytest.fixture(scope="module")
def signatures() -> dict[str, dict[str, list[str]]]:
    """What the launcher looks compiled kernels up by, per kernel and call, from a process that doesn't interpret."""
    script = Path(__file__).parent / "specialisation_report.py"
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, check=False, env=_environment()
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def _environment() -> dict[str, str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_DEFAULT_FP_FUSION"] = "1"
    return environment


@pytest.mark.parametrize("kernel", KERNELS)
def test_lengths_batches_and_heads_share_one_variant(
    signatures: dict[str, dict[str, list[str]]], kernel: str
) -> None:
    """S = 2, 17, 1000 and 1024, batches of 1 and 16, 1 and 16 heads."""
    assert len(set(signatures["lengths"][kernel])) == 1
    assert len(signatures["lengths"][kernel]) == 6


@pytest.mark.parametrize("kernel", ["forward", "delta", "dkdv", "dkdv_split", "sum_splits", "dq", "sums"])
def test_packed_batches_share_one_variant(signatures: dict[str, dict[str, list[str]]], kernel: str) -> None:
    """From 1 to 300 sequences of 2 to 5000 tokens in all, 1 to 16 heads."""
    assert len(set(signatures["packed"][kernel])) == 1
    assert len(signatures["packed"][kernel]) == 5


@pytest.mark.parametrize("kernel", ["forward", "dkdv", "dq"])
def test_alignment_is_a_flag(signatures: dict[str, dict[str, list[str]]], kernel: str) -> None:
    """Rows at multiples of 16 bytes or not are two variants, however many strides there are."""
    assert len(set(signatures["unaligned"][kernel])) == 1
    assert set(signatures["unaligned"][kernel]) != set(signatures["lengths"][kernel])


def test_no_integer_is_specialised_on(signatures: dict[str, dict[str, list[str]]]) -> None:
    """In any kernel but those whose only integers are constants."""
    assert len(signatures["integers"]) >= 15
    assert {kernel: names for kernel, names in signatures["integers"].items() if names} == {}
