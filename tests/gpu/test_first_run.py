"""The steps of a first run on a GPU, each in a process of its own with a watchdog of seconds, on each backend.

They are where the backward in one pass runs at head dims 64, 128 and 256, and packed sequences of 1, 63, 65 and 129 lie
beside neighbours of NaN; on the CPU the same code is run by tests/benchmarks and tests/cuda_emulation.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

from evidence import first_run

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(200)]

QUICK = [name for name, step in first_run.STEPS.items() if step.limit <= 60]
SOME_LAUNCHES = 20  # first_run.py itself makes a thousand


def _run(name: str, backend: str) -> None:
    found = list(first_run.run_all([name], "cuda", SOME_LAUNCHES, 180.0, backend))
    wrong = [item["detail"] for item in found if item["status"] in ("failed", "not run")]
    assert not wrong, "\n".join(wrong)
    if {item["status"] for item in found} == {"skipped"}:
        pytest.skip(found[0]["detail"])


@pytest.mark.parametrize("backend", ["triton", "torch", "cuda"])
@pytest.mark.parametrize("name", [name for name in QUICK if not first_run.STEPS[name].backward])
def test_forward_step(name: str, backend: str) -> None:
    _run(name, backend)


@pytest.mark.parametrize("backend", ["triton", "torch", "cuda"])
@pytest.mark.parametrize("name", [name for name in QUICK if first_run.STEPS[name].backward])
def test_backward_step(name: str, backend: str) -> None:
    _run(name, backend)


@pytest.mark.parametrize("name", ["9", "9b"])
@pytest.mark.parametrize("backend", ["cuda"])
def test_blocks_that_wait_for_one_another_all_end(name: str, backend: str) -> None:
    _run(name, backend)
