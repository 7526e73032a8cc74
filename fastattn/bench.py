"""Finds the benchmark scripts of the checkout and runs each in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from fastattn.console import InputError

PREFIX = "bench_"


def scripts() -> dict[str, Path]:
    """Every bench by name; InputError where fastattn runs without its checkout."""
    folder = Path(__file__).resolve().parent.parent / "benchmarks"
    found = {path.stem.removeprefix(PREFIX).replace("_", "-"): path for path in folder.glob(f"{PREFIX}*.py")}
    if not found:
        raise InputError(
            "the benchmarks are part of the source, not of the installed package: "
            "clone the repository, `pip install -e .` there, and run this again"
        )
    return dict(sorted(found.items()))


def run(name: str, arguments: Sequence[str]) -> int:
    """Run the named bench, or "all" of them, with these arguments; the greatest exit status."""
    known = scripts()
    if name != "all" and name not in known:
        raise InputError(f"no bench is called {name!r}: choose {', '.join([*known, 'all'])}")
    chosen = known.values() if name == "all" else [known[name]]
    return max(
        subprocess.run([sys.executable, str(path), *arguments], check=False).returncode for path in chosen
    )
