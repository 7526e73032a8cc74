"""Progress of training: a live bar in a terminal, one line at intervals elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Protocol, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

LINE_SECONDS = 5.0  # between plain lines


class ProgressDisplay(Protocol):
    """The trainer's progress display."""

    def start(self, progress: float) -> None:
        """Start the display; `progress` is the share of the run that is done, 0 to 1."""

    def step(self, progress: float, values: dict[str, float]) -> None:
        """Show a finished step; `values` has step, loss, tokens_per_second and lr."""

    def note(self, text: str) -> None:
        """Print a line: an evaluation, a checkpoint or a warning."""

    def stop(self) -> None:
        """End the display."""


class BarDisplay:
    """A bar with loss, tokens/s and time left; notes scroll above it."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._bar = Progress(
            TextColumn("step {task.fields[step]}"),
            BarColumn(bar_width=20),
            TextColumn("{task.percentage:>3.0f}%"),
            TextColumn("loss {task.fields[loss]}"),
            TextColumn("{task.fields[speed]}"),
            TextColumn("{task.fields[left]}"),
            console=console,
        )
        self._task: TaskID | None = None
        self._clock = _Remaining(0.0)

    def start(self, progress: float) -> None:
        self._clock = _Remaining(progress)
        self._task = self._bar.add_task("", total=1.0, step="0", loss="-", speed="", left="")
        self._bar.update(self._task, completed=progress)
        self._bar.start()

    def step(self, progress: float, values: dict[str, float]) -> None:
        if self._task is not None:
            self._bar.update(
                self._task,
                completed=progress,
                step=f"{values['step']:.0f}",
                loss=f"{values['loss']:.3f}",
                speed=f"{values['tokens_per_second']:,.0f} tokens/s",
                left=f"{_duration(self._clock.left(progress))} left",
            )

    def note(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False)

    def stop(self) -> None:
        self._bar.stop()


class LineDisplay:
    """Plain lines, at most one every few seconds in addition to notes."""

    def __init__(self, stream: TextIO | None = None, *, seconds: float = LINE_SECONDS) -> None:
        self.stream = stream
        self.seconds = seconds
        self._clock = _Remaining(0.0)
        self._last = time.monotonic()

    def start(self, progress: float) -> None:
        self._clock = _Remaining(progress)
        self._last = time.monotonic()

    def step(self, progress: float, values: dict[str, float]) -> None:
        now = time.monotonic()
        if now - self._last < self.seconds:
            return
        self._last = now
        self.note(
            f"step {int(values['step'])}: loss {values['loss']:.4f}, lr {values['lr']:.2e}, "
            f"{values['tokens_per_second']:,.0f} tokens/s, {_duration(self._clock.left(progress))} left"
        )

    def note(self, text: str) -> None:
        print(text, file=self.stream or sys.stdout, flush=True)

    def stop(self) -> None:
        pass


class NoDisplay:
    """No output: for ranks other than the first, and for callers that read the log."""

    def start(self, progress: float) -> None:
        pass

    def step(self, progress: float, values: dict[str, float]) -> None:
        pass

    def note(self, text: str) -> None:
        pass

    def stop(self) -> None:
        pass


def default_display() -> ProgressDisplay:
    """A bar when standard output is a terminal, else plain lines."""
    console = Console()
    return BarDisplay(console) if console.is_terminal else LineDisplay()


class _Remaining:
    """Estimates the seconds left from the progress since the start."""

    def __init__(self, progress: float) -> None:
        self._begun = progress
        self._time = time.monotonic()

    def left(self, progress: float) -> float | None:
        done = progress - self._begun
        if done <= 0.0:
            return None
        return (time.monotonic() - self._time) * max(1.0 - progress, 0.0) / done


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "--:--"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
