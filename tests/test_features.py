"""docs/features.md: drawn from tests/features.py, every claim of fastattn's with a test that exists."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from features import FEATURES, NO, PAGE, PEERS, Cell, cells, render

ROOT = Path(__file__).resolve().parent.parent
UNCLAIMED = (NO, "not needed", "not tested", "tests only", "torch's own")
CLAIMS = sorted(
    {test for feature in FEATURES for cell in (feature.torch, feature.triton) for test in cell.tests}
)


def collect(tests: list[str]) -> subprocess.CompletedProcess:
    """Let pytest find tests by name, running none."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "--collect-only",
        "-q",
        "-n",
        "0",
        "-p",
        "no:cacheprovider",
        *tests,
    ]
    return subprocess.run(
        command,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONSAFEPATH": "1"},
    )


@pytest.mark.skipif(find_spec("triton") is None, reason="without Triton its tests are not collected")
def test_every_named_test_exists() -> None:
    done = collect(CLAIMS)
    assert done.returncode == 0, "\n".join(
        line for line in done.stdout.splitlines() + done.stderr.splitlines() if "ERROR" in line
    )
    found = {line.partition("[")[0] for line in done.stdout.splitlines() if "::" in line}
    assert {test.partition("[")[0] for test in CLAIMS} <= found


def test_a_test_that_does_not_exist_is_noticed() -> None:
    done = collect(["tests/test_features.py::test_of_nothing"])
    assert done.returncode != 0
    assert "not found" in done.stdout + done.stderr


@pytest.mark.parametrize("cell", [c for f in FEATURES for c in (f.torch, f.triton)])
def test_every_claim_names_a_test(cell: Cell) -> None:
    assert bool(cell.tests) != (cell.text in UNCLAIMED)


def test_rows_are_whole_and_different() -> None:
    assert [feature.name for feature in FEATURES if len(cells(feature)) != len(PEERS)] == []
    assert len({feature.name for feature in FEATURES}) == len(FEATURES)


def test_the_page_is_that_of_the_table() -> None:
    assert PAGE.read_text(encoding="utf-8") == render(), "run python tests/features.py"
