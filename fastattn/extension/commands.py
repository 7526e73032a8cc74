"""Runs compilers, names their results by content, and locks a result while a process builds it."""

from __future__ import annotations

import contextlib
import hashlib
import os
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path


class BuildError(RuntimeError):
    """The extension cannot be built; the message gives the reason and a remedy."""


def cxx() -> str:
    return os.environ.get("CXX", "g++")


def versions(*compilers: str) -> list[str]:
    return [run([compiler, "--version"], f"asking {compiler} for its version") for compiler in compilers]


def run(command: Sequence[str], what: str) -> str:
    """The output of a command; BuildError with the output if it fails."""
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
        )
    except OSError as error:
        raise BuildError(f"{what} failed: {error}") from None
    if done.returncode:
        raise BuildError(f"{what} failed:\n{' '.join(command)}\n{done.stdout}")
    return done.stdout


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """A lock that one process holds at a time, and that is released even if the process dies."""
    import fcntl

    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
