"""Scripts that ask Triton's compiler, run in a process that does not interpret."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any


def answers_of(script: str, *arguments: str) -> dict[str, Any]:
    """What a script of this folder prints, as JSON."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    path = Path(__file__).parent / script
    done = subprocess.run(
        [sys.executable, str(path), *arguments], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    answers: dict[str, Any] = json.loads(done.stdout)
    return answers
