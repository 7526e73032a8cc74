"""The loss curve of a run: a picture, or a chart in text where matplotlib is not installed."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fastattn import plot
from fastattn.train.log import Record, read_log

SERIES = {
    "train": ("training", "#2e6fc0", ""),
    "eval": ("validation", "#d66026", "o"),
}  # name, colour, marker


def plot_loss(
    log: Sequence[Record] | str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    title: str = "Loss",
    unit: str | None = "nats per token",
    say: Callable[[str], object] = print,
) -> bool:
    """Write a picture of training and validation loss over steps, or without matplotlib a chart in text.

    Args:
        log: records, as `FitResult.log` holds them, or the path of a log.jsonl.
        path: the picture, .png or .svg; its directory is created if it does not exist.
        title: written above the plot, with the last validation loss.
        unit: of the loss, beside the plot; in nats per token the perplexity is written, too. None for no unit.
        say: called with the chart in text, and how to install matplotlib, where that is missing.

    Returns:
        Whether the picture was written.

    Raises:
        ValueError: the log has no finite loss, or the path does not end with .png or .svg.
    """
    records = read_log(Path(log)) if isinstance(log, (str, os.PathLike)) else log
    curves = {event: _curve(records, event) for event in SERIES}
    if not any(curves.values()):
        raise ValueError("log: has no finite loss, needs a train or eval record")
    heading = title + _last_validation(curves["eval"], perplexity=unit == "nats per token")
    if not plot.is_available():
        chart = plot.text_chart(
            {SERIES[event][0]: curve for event, curve in curves.items()}, "loss over steps"
        )
        say(f"{heading}\n{chart}\nFor a picture of it: {plot.INSTALL}")
        return False
    with plot.style():
        figure = plot.new_figure(8.0, 4.5)
        axes = figure.subplots()
        for event, curve in curves.items():
            if curve:
                name, color, marker = SERIES[event]
                axes.plot(
                    *zip(*curve), label=name, color=color, marker=marker or ("" if len(curve) > 1 else ".")
                )
        axes.set_title(heading, loc="left", parse_math=False)
        axes.set_xlabel("step")
        axes.set_ylabel("loss" if unit is None else f"loss ({unit})")
        axes.set_xlim(left=0)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(color="0.9")
        axes.legend(frameon=False)
        plot.save(figure, Path(path), dpi=120)
    return True


def _curve(records: Sequence[Record], event: str) -> list[plot.Point]:
    return [
        (float(r["step"]), r["loss"]) for r in records if r["event"] == event and _is_finite(r.get("loss"))
    ]


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _last_validation(curve: Sequence[plot.Point], *, perplexity: bool) -> str:
    if not curve:
        return ""
    loss = curve[-1][1]
    text = f": validation {loss:.3f} at step {curve[-1][0]:.0f}"
    return f"{text} (perplexity {math.exp(min(loss, 700)):.1f})" if perplexity else text
