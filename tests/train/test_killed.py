"""Kills at random moments lose nothing: the run that is started again ends with the bits of one never stopped."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

WORKER = Path(__file__).with_name("killed_worker.py")


@pytest.mark.exhaustive
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_twenty_kills_at_random_moments_lose_nothing(tmp_path: Path) -> None:
    """Of masked-lm from the command line, with a loader worker, accumulation and averages."""
    done = subprocess.run(
        [sys.executable, str(WORKER), str(tmp_path), "20", "0"],
        env={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    print(found)
    assert found["equal"], found
    assert len(found["seconds"]) == 20
