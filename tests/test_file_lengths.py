"""Source files have at most 400 lines, but for those that CONTRIBUTING.md names with a reason."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("benchmarks", "csrc", "docs", "examples", "fastattn", "kernels", "tests")
SUFFIXES = {".cpp", ".cu", ".cuh", ".h", ".py"}
LIMIT = 400


def lengths() -> dict[str, int]:
    """Lines of every source file, by its path."""
    found = {}
    for path in (path for folder in FOLDERS for path in (ROOT / folder).rglob("*")):
        name = path.relative_to(ROOT).as_posix()
        if path.suffix in SUFFIXES and not name.startswith("fastattn/kernels/"):  # a link to kernels/
            found[name] = path.read_text(encoding="utf-8").count("\n")
    return found


def test_long_files_are_those_that_contributing_names_with_a_reason() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    listed = dict(re.findall(r"^  - `([\w/.]+)`: (.+)$", text, re.M))
    long = {name: lines for name, lines in lengths().items() if lines > LIMIT}
    assert len(lengths()) > 300
    assert sorted(long) == sorted(listed), f"over {LIMIT} lines: {long}"
