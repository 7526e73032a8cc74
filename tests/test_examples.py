"""Every script of examples/ runs to its end on a CPU and says something."""

from __future__ import annotations

import re
import runpy
from importlib.util import find_spec
from pathlib import Path

import pytest

SCRIPTS = sorted((Path(__file__).resolve().parent.parent / "examples").glob("*.py"))
NEEDED = ("transformers", "onnxruntime")  # what a script may import beside the dependencies of fastattn


def test_there_are_ten() -> None:
    assert len(SCRIPTS) >= 10


@pytest.mark.parametrize("script", SCRIPTS, ids=[script.stem for script in SCRIPTS])
def test_an_example_runs(script: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In this process, which has torch loaded; .ci/run starts each by itself. A SystemExit fails it too."""
    imported = re.findall(r"^(?:import|from) (\w+)", script.read_text(encoding="utf-8"), re.MULTILINE)
    for name in NEEDED:
        if name in imported and find_spec(name) is None:
            pytest.skip(f"needs {name}")
    runpy.run_path(str(script), run_name="__main__")
    assert capsys.readouterr().out.strip()
