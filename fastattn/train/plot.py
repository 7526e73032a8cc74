"""The loss curve of a run as a PNG picture, drawn without a plotting library."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastattn.cache import write_atomically
from fastattn.train.canvas import Canvas, Color, Point
from fastattn.train.log import Record, read_log

WIDTH, HEIGHT = 960, 560
LEFT, RIGHT, TOP, BOTTOM = 92, 30, 64, 72  # margins around the plot, in pixels
TEXT_SIZE, TITLE_SIZE = 11.0, 14.0
INK, FAINT = (40, 44, 52), (222, 226, 230)
SERIES: tuple[tuple[str, str, Color], ...] = (
    ("train", "training", (46, 111, 192)),
    ("eval", "validation", (214, 96, 38)),
)
TICKS = 6  # about so many on each axis


def plot_loss(
    log: Sequence[Record] | str | os.PathLike[str], path: str | os.PathLike[str], *, title: str = "Loss"
) -> None:
    """Write a PNG of training and validation loss over steps.

    Args:
        log: records, as `FitResult.log` holds them, or the path of a log.jsonl.
        path: the picture; its directory is made if need be.
        title: written above the plot, with the last validation loss.

    Raises:
        ValueError: the log has no finite loss.
    """
    records = read_log(Path(log)) if isinstance(log, (str, os.PathLike)) else log
    curves = {event: _curve(records, event) for event, _, _ in SERIES}
    points = [point for curve in curves.values() for point in curve]
    if not points:
        raise ValueError("log: holds no finite loss, need a train or eval record")
    canvas = Canvas(WIDTH, HEIGHT)
    axes = _Axes(points)
    axes.draw(canvas, title + _last_validation(curves["eval"]))
    for event, _, color in SERIES:
        line = [axes.place(point) for point in curves[event]]
        if line:
            canvas.stroke(line, width=2.2, color=color)
        for point in line if event == "eval" else ():
            canvas.stroke([point], width=8.0, color=color)
    _legend(canvas, [(name, color) for event, name, color in SERIES if curves[event]])
    write_atomically(Path(path), canvas.png())


def ticks(low: float, high: float, number: int = TICKS) -> list[float]:
    """About `number` round values (1, 2, 2.5 or 5 times a power of ten apart) that enclose [low, high]."""
    size = max(abs(low), abs(high))
    span = high - low
    if span <= 1e-6 * size or span < 1e-9:  # as good as one value
        span = size if size > 1e-9 else 1.0
    rough = span / max(number - 1, 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1.0, 2.0, 2.5, 5.0, 10.0) if factor * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [step * i for i in range(first, max(last, first + 1) + 1)]


class _Axes:
    """The frame, and where a (step, loss) point lies in it."""

    def __init__(self, points: Sequence[Point]) -> None:
        steps, losses = zip(*points)
        self.last_step = max(*steps, 1.0)
        self.x_ticks = [tick for tick in ticks(0.0, self.last_step) if tick <= self.last_step]
        self.y_ticks = ticks(min(losses), max(losses))

    def place(self, point: Point) -> Point:
        low, high = self.y_ticks[0], self.y_ticks[-1]
        return (
            LEFT + (WIDTH - LEFT - RIGHT) * point[0] / self.last_step,
            HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (point[1] - low) / (high - low),
        )

    def draw(self, canvas: Canvas, title: str) -> None:
        left, right, top, bottom = LEFT, WIDTH - RIGHT, TOP, HEIGHT - BOTTOM
        for value, label in zip(self.x_ticks, _labels(self.x_ticks)):
            x = self.place((value, self.y_ticks[0]))[0]
            canvas.stroke([(x, top), (x, bottom)], width=1.0, color=FAINT)
            canvas.text(x, bottom + 22, label, size=TEXT_SIZE, color=INK, anchor="middle")
        for value, label in zip(self.y_ticks, _labels(self.y_ticks)):
            y = self.place((0.0, value))[1]
            canvas.stroke([(left, y), (right, y)], width=1.0, color=FAINT)
            canvas.text(left - 12, y + TEXT_SIZE / 2, label, size=TEXT_SIZE, color=INK, anchor="end")
        canvas.stroke([(left, top), (left, bottom), (right, bottom)], width=1.6, color=INK)
        canvas.text((left + right) / 2, HEIGHT - 18, "step", size=TEXT_SIZE, color=INK, anchor="middle")
        middle = (top + bottom) / 2
        canvas.text(
            28, middle, "loss (nats per token)", size=TEXT_SIZE, color=INK, anchor="middle", upwards=True
        )
        canvas.text(left, 36, title, size=TITLE_SIZE, color=INK)


def _legend(canvas: Canvas, entries: Sequence[tuple[str, Color]]) -> None:
    for row, (name, color) in enumerate(entries):
        y = TOP + 24 + 26 * row
        canvas.stroke([(WIDTH - RIGHT - 150, y), (WIDTH - RIGHT - 120, y)], width=3.0, color=color)
        canvas.text(WIDTH - RIGHT - 108, y + TEXT_SIZE / 2, name, size=TEXT_SIZE, color=INK)


def _curve(records: Sequence[Record], event: str) -> list[Point]:
    return [
        (float(r["step"]), r["loss"]) for r in records if r["event"] == event and _is_finite(r.get("loss"))
    ]


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _last_validation(curve: Sequence[Point]) -> str:
    if not curve:
        return ""
    loss = curve[-1][1]
    return f": validation {loss:.3f} at step {curve[-1][0]:.0f} (perplexity {math.exp(min(loss, 700)):.1f})"


def _labels(values: Sequence[float]) -> list[str]:
    """The values with as many decimals as tell neighbours apart."""
    step = values[1] - values[0]
    decimals = next((d for d in range(12) if abs(round(step, d) - step) < step * 1e-6), 12)
    return [f"{value:.{decimals}f}" for value in values]
