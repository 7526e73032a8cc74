"""Printed output of commands: with colours and boxes in a terminal, plain text when piped."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TextIO

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fastattn.console import Output


class TerminalOutput:
    """Output in a terminal: colours, rules and box tables of the terminal's width."""

    shows_progress = True

    def __init__(self, console: Console) -> None:
        self.console = console

    def heading(self, text: str) -> None:
        self.console.print()
        self.console.rule(Text(text, style="bold"), align="left", style="dim")

    def line(self, text: str = "", *, good: bool | None = None) -> None:
        style = "" if good is None else "green" if good else "bold red"
        self.console.print(Text(text, style=style))

    def waiting(self, text: str) -> AbstractContextManager[object]:
        return self.console.status(Text(text, style="dim"))

    def table(
        self, columns: Sequence[str], rows: Sequence[Sequence[str]], *, verdict: int | None = None
    ) -> None:
        table = Table(box=None, pad_edge=False, header_style="bold")
        for index, name in enumerate(columns):
            table.add_column(name, justify="right" if _numeric(rows, index) else "left", overflow="fold")
        for row in rows:
            cells = [Text(cell) for cell in row]
            if verdict is not None:
                cells[verdict].stylize("green" if row[verdict] == "ok" else "bold red")
            table.add_row(*cells)
        self.console.print(table)


class PlainOutput:
    """Output for files and pipes: aligned text, no control characters, never wrapped."""

    shows_progress = True

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def heading(self, text: str) -> None:
        self._print(f"\n{text}\n{'-' * len(text)}")

    def line(self, text: str = "", *, good: bool | None = None) -> None:
        self._print(text)

    def waiting(self, text: str) -> AbstractContextManager[object]:
        self._print(text)
        return nullcontext()

    def table(
        self, columns: Sequence[str], rows: Sequence[Sequence[str]], *, verdict: int | None = None
    ) -> None:
        widths = [max(len(row[i]) for row in (columns, *rows)) for i in range(len(columns))]
        right = [_numeric(rows, i) for i in range(len(columns))]
        for row in (columns, *rows):
            cells = (c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right))
            self._print("  ".join(cells).rstrip())

    def _print(self, text: str) -> None:
        print(text, file=self.stream, flush=True)


def standard_output() -> Output:
    """The Output of standard output: TerminalOutput in a terminal, PlainOutput otherwise."""
    console = Console(highlight=False)
    return TerminalOutput(console) if console.is_terminal else PlainOutput(sys.stdout)


def _numeric(rows: Sequence[Sequence[str]], index: int) -> bool:
    return bool(rows) and all(row[index][:1] in "0123456789-" for row in rows)
