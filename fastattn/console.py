"""The interface for progress reports and input errors; `fastattn.cli` prints both."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Protocol


class InputError(ValueError):
    """Bad input to a command, reported in one line with exit code 2."""


def check_folder(folder: Path) -> None:
    """Raise InputError for a path that is not a folder."""
    try:
        found = folder.is_dir()
    except OSError:  # a name too long
        found = False
    if not found:
        raise InputError(f"{str(folder)[:200]}: no such folder, needs one with config.json and weights")


def is_unicode(text: str) -> bool:
    """Whether a text is valid Unicode, without lone surrogates."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


class Output(Protocol):
    """The output of a command; `shows_progress` says whether long steps may report their progress."""

    shows_progress: bool

    def heading(self, text: str) -> None:
        """Start a section."""

    def line(self, text: str = "", *, good: bool | None = None) -> None:
        """One line of text; `good` colours it as a verdict."""

    def waiting(self, text: str) -> AbstractContextManager[object]:
        """Show a text while the context is active."""

    def table(
        self, columns: Sequence[str], rows: Sequence[Sequence[str]], *, verdict: int | None = None
    ) -> None:
        """Rows under column names; the column `verdict` reads "ok" or what is wrong."""


class NoOutput:
    """Output of a command with --json: nothing."""

    shows_progress = False

    def heading(self, text: str) -> None:
        pass

    def line(self, text: str = "", *, good: bool | None = None) -> None:
        pass

    def waiting(self, text: str) -> AbstractContextManager[object]:
        return nullcontext()

    def table(
        self, columns: Sequence[str], rows: Sequence[Sequence[str]], *, verdict: int | None = None
    ) -> None:
        pass
