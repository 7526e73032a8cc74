"""The script that times the host's part of a Triton call."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

import checkout

SCRIPT = checkout.BENCHMARKS / "triton_host.py"


def run(*options: str, **environment: str) -> subprocess.CompletedProcess:
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, str(SCRIPT), *options],
        capture_output=True, text=True, check=False, timeout=200, env={**inherited, **environment},
    )  # fmt: skip


@pytest.mark.newer_triton
def test_it_times_what_it_launches() -> None:
    pytest.importorskip("triton")
    done = run("--only", "softmax", "--rounds", "1")
    assert done.returncode == 0, done.stderr
    measured = r" +1 launches +\d+\.\d us \(\d+\.\d to \d+\.\d\)\n"
    assert re.fullmatch(f"softmax forward{measured}softmax forward, replayed{measured}", done.stdout)


def test_an_interpreter_launches_nothing() -> None:
    done = run(TRITON_INTERPRET="1")
    assert done.returncode == 2
    assert "TRITON_INTERPRET: must not be set" in done.stderr
