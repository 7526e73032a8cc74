"""docs/features.md: drawn from tests/features.py, every claim of fastattn's with a test that exists."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import feature_mutations
import pytest
from features import FEATURES, NO, PAGE, PEERS, Cell, cells, render

ROOT = Path(__file__).resolve().parent.parent
UNCLAIMED = (NO, "not needed", "not tested", "tests only", "torch's own")
CLAIMS = sorted(
    {test for feature in FEATURES for cell in (feature.torch, feature.triton) for test in cell.tests}
)


def pytest_of(tests: list[str], *options: str, **environment: str) -> subprocess.CompletedProcess:
    """Let pytest find tests by name, and do with them what the options say."""
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", *options, *tests]
    return subprocess.run(
        command,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONSAFEPATH": "1", "PYTHONPATH": str(ROOT / "tests"), **environment},
    )


@pytest.mark.slow
@pytest.mark.skipif(find_spec("triton") is None, reason="without Triton its tests are not collected")
def test_every_named_test_exists_and_fails_without_its_feature(tmp_path: Path) -> None:
    outcomes = tmp_path / "outcomes.json"
    done = pytest_of(CLAIMS, "-p", "feature_mutations", **{feature_mutations.VARIABLE: str(outcomes)})
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]  # 4 where a test does not exist
    found = json.loads(outcomes.read_text(encoding="utf-8"))
    for feature in FEATURES:
        if feature.name not in feature_mutations.ABSENT:
            continue
        for cell in (feature.torch, feature.triton):
            became = {test: found[feature.name][test] for test in cell.tests}
            waiting = {
                test for test in became if became[test] == "skipped"
            }  # for a GPU: they run where one is
            assert all(became[test] == "failed" for test in became.keys() - waiting), (feature.name, became)
            assert cell is not feature.torch or not waiting, (feature.name, waiting)


def test_every_row_that_claims_something_has_a_mutation() -> None:
    """AMD GPUs' claim is that kernels compile, whose test holds a recorded table."""
    claiming = {f.name for f in FEATURES if f.torch.tests or f.triton.tests}
    assert claiming - feature_mutations.ABSENT.keys() == {"AMD GPUs"}
    assert feature_mutations.ABSENT.keys() <= claiming


@pytest.mark.parametrize("cell", [c for f in FEATURES for c in (f.torch, f.triton)])
def test_every_claim_names_a_test(cell: Cell) -> None:
    assert bool(cell.tests) != (cell.text in UNCLAIMED)


def test_rows_are_whole_and_different() -> None:
    assert [feature.name for feature in FEATURES if len(cells(feature)) != len(PEERS)] == []
    assert len({feature.name for feature in FEATURES}) == len(FEATURES)


def test_the_page_is_that_of_the_table() -> None:
    assert PAGE.read_text(encoding="utf-8") == render(), "run python tests/features.py"
