"""The steps of a first run on a GPU, each in a process of its own with a watchdog of seconds, on each backend.

They are where the backward in one pass runs at head dims 64, 128 and 256, and packed sequences of 1, 63, 65 and 129 lie
beside neighbours of NaN; on the CPU the same code is run by tests/benchmarks and tests/cuda_emulation.

The order is that of ORDER: for each backend by the steps' numbers, but forward steps before backward ones, and the
extension's backward after everything else. Step 3 therefore follows steps 4 to 8 here, while first_run.py takes them by
their numbers: a backward that hangs may cost a process its device, and with it all that comes later.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

from evidence import first_run

BACKENDS = ("triton", "torch", "cuda")
ONLY_CUDA = ("8", "8b", "9", "9b")  # the sanitizer runs the extension; only its blocks wait for one another
SOME_LAUNCHES = 20  # of step 9: first_run.py itself makes a thousand, which take minutes


def _steps(backend: str, backward: bool) -> list[tuple[str, str]]:
    return [
        (backend, name)
        for name, step in first_run.STEPS.items()
        if step.backward == backward and (backend == "cuda" or name not in ONLY_CUDA)
    ]


ORDER = [
    *(each for backend in BACKENDS[:-1] for backward in (False, True) for each in _steps(backend, backward)),
    *_steps("cuda", backward=False),
    *_steps("cuda", backward=True),
]


@pytest.mark.gpu
@pytest.mark.timeout(200)
@pytest.mark.parametrize(("backend", "name"), ORDER)
def test_step(backend: str, name: str) -> None:
    found = list(first_run.run_all([name], "cuda", SOME_LAUNCHES, 180.0, backend))
    wrong = [item["detail"] for item in found if item["status"] in ("failed", "not run")]
    assert not wrong, "\n".join(wrong)
    if {item["status"] for item in found} == {"skipped"}:
        pytest.skip(found[0]["detail"])
