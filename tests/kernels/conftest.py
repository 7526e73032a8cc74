"""Kernel tests run on the GPU if there is one, else through Triton's interpreter, corrected for bfloat16."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
sys.path.append(str(Path(__file__).parent))

collect_ignore_glob = [] if find_spec("triton") else ["test_*.py"]


@pytest.fixture(scope="session", autouse=True)
def corrected_interpreter() -> Iterator[object]:
    """Triton's interpreter with the corrections of triton_interpreter.py, where it is in use."""
    import triton_interpreter

    if not triton_interpreter.INTERPRETING:
        yield None
        return
    correction = triton_interpreter.correction()
    correction.install()
    yield correction
    correction.remove()


@pytest.fixture
def recorded_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiles of the Triton that the tables on file were made with, whichever is installed."""
    import compile_record

    from fastattn.kernels import tiles

    version = compile_record.load()["triton"]
    monkeypatch.setattr(tiles, "_triton", lambda: version)
