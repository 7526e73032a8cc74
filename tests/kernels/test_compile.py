"""Kernels compiled ahead of time for Ampere and Hopper: nothing spills, shared memory fits, Hopper gets its wgmma."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from compile_matrix import DOCUMENT, STORED, Entry, Report, entries, problem

HERE = Path(__file__).parent


def compile_matrix(*arguments: str) -> subprocess.CompletedProcess:
    """Run the matrix in a process that doesn't interpret."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, str(HERE / "compile_matrix.py"), *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=environment | {"TRITON_DEFAULT_FP_FUSION": "1"},
    )


def test_causal_rows() -> None:
    """Forward and both passes of backward at head dims 64 and 128; the full matrix runs on demand."""
    kernels = ("--kernel", "forward", "--kernel", "dkdv", "--kernel", "dq")
    dims = ("--head-dim", "64", "--head-dim", "128")
    done = compile_matrix(
        "--arch", "80", "--arch", "90", "--bits", "16", "--features", "causal", *kernels, *dims
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "12 compiled, 0 with problems" in done.stdout


def entry(**changes: object) -> Entry:
    defaults = {
        "arch": "90",
        "bits": 16,
        "head_dim": 128,
        "kernel": "forward",
        "features": "causal",
        "tile": "",
    }
    return Entry(**(defaults | changes))


def test_problems_are_seen() -> None:
    good = Report(registers=200, shared=100_000, wgmma=8, wide_copies=8)
    assert problem(entry(), good) is None
    assert "shared memory" in problem(entry(), Report(shared=300_000, wgmma=8))
    assert "shared memory" in problem(entry(arch="89"), Report(shared=102_000))
    assert "local memory" in problem(entry(), Report(local_ops=3, wgmma=8))
    assert "wgmma" in problem(entry(), Report(shared=100_000))
    assert "16 bytes" in problem(entry(), Report(wgmma=8))
    assert problem(entry(arch="80"), Report(wide_copies=8)) is None
    assert problem(entry(head_dim=256), Report(local_ops=3)) is None
    assert problem(entry(features="all"), Report(local_ops=3)) is None
    assert problem(entry(features="all"), Report(local_ops=3), allowance=3) is None
    assert "on record" in problem(entry(features="all"), Report(local_ops=4), allowance=3)
    assert "boom" in problem(entry(), Report(error="boom"))


def test_the_stored_table_is_that_of_the_tiles_in_use() -> None:
    stored = {row["name"]: row["values"] for row in json.loads(STORED.read_text())["rows"]}
    current = {entry.name: entry for entry in entries(["80", "90"])}
    assert set(current) <= set(stored), "run compile_matrix.py --all --write"
    for name, one in current.items():
        report = Report(**{field: stored[name][field] for field in Report.__dataclass_fields__})
        assert problem(one, report) is None, name
    assert DOCUMENT.exists()
