"""A disk that fills up at any write: the error names the file, and the run then goes on to the same end."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.exhaustive
@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
def test_every_write_of_a_run_may_fail(tmp_path: Path, sharding: str) -> None:
    """Two steps with evaluations, averages, a tokenizer and two checkpoints; one write fails, or all from it on."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None or not sys.platform.startswith("linux"):
        pytest.skip("needs a C compiler on Linux: calls of the C library are replaced")
    library = tmp_path / "full_disk.so"
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-O1", "-o", library, HERE / "full_disk.c", "-ldl"], check=True
    )
    done = subprocess.run(
        [sys.executable, HERE / "full_disk_worker.py", tmp_path, library, sharding, "1"],
        env={**os.environ, "LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout)
    assert found["writes"] > 200
    assert found["problems"] == []
