"""The reliability plot and the confusion table of a classifier as figures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastattn import plot
from fastattn.evaluation.report import Report

MAX_NAMED = 40  # most labels for which the axes have names and the cells have counts


def plot_reliability(report: Report, path: str | Path) -> Path:
    """Draw each bin's accuracy over its mean confidence, beside the diagonal of a calibrated model; returns the path.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: the report has no reliability table, or the path ends with neither .png nor .svg.
    """
    rows, target = _table(report, "reliability"), _target(path, "plot_reliability")
    with plot.style():
        figure = plot.new_figure(3.6, 3.6)
        axes = figure.subplots()
        axes.plot((0, 1), (0, 1), color="0.6", linewidth=0.8, linestyle="--", label="calibrated")
        width = max((row["high"] - row["low"] for row in rows), default=1.0)
        axes.bar(
            [(row["low"] + row["high"]) / 2 for row in rows], [row["accuracy"] for row in rows],
            width=0.92 * width, color="#90caf9", label="accuracy of a bin",
        )  # fmt: skip
        axes.plot(
            [row["confidence"] for row in rows], [row["accuracy"] for row in rows], "o", color="#0d47a1",
            markersize=3, label="at its mean confidence",
        )  # fmt: skip
        axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="confidence", ylabel="accuracy", aspect="equal")
        axes.set_title(f"ECE {report.metrics['ece']:.3f}, {report.count} examples")
        axes.legend(frameon=False, fontsize=7, loc="upper left")
        plot.save(figure, target)
    return target


def plot_confusion(report: Report, path: str | Path) -> Path:
    """Draw the confusion table, references down and predictions across, shaded by the share of each reference.

    Returns the path.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: the report has no confusion table, or the path ends with neither .png nor .svg.
    """
    table, target = _table(report, "confusion"), _target(path, "plot_confusion")
    names: Sequence[str] = table["labels"]
    counts: list[list[int]] = table["counts"]
    shares = [[count / max(1, sum(row)) for count in row] for row in counts]
    side = min(8.0, 1.5 + 0.35 * len(names))
    with plot.style():
        figure = plot.new_figure(side + 0.8, side)
        axes = figure.subplots()
        drawn = axes.imshow(shares, vmin=0.0, vmax=1.0, cmap="Blues", interpolation="nearest")
        axes.set(xlabel="prediction", ylabel="reference")
        if len(names) <= MAX_NAMED:
            shown = [plot.visible(name) for name in names]
            axes.set_xticks(range(len(names)), shown, rotation=90, fontsize=7)
            axes.set_yticks(range(len(names)), shown, fontsize=7)
            for i, row in enumerate(counts):
                for j, count in enumerate(row):
                    colour = "white" if shares[i][j] > 0.6 else "black"
                    axes.text(j, i, str(count), ha="center", va="center", fontsize=6, color=colour)
        figure.colorbar(drawn, ax=axes, fraction=0.04, pad=0.02).set_label("share of the reference")
        plot.save(figure, target)
    return target


def _table(report: Report, name: str) -> Any:
    if name not in report.tables:
        raise ValueError(f"report: has no table {name!r}, needs that of a classifier")
    return report.tables[name]


def _target(path: str | Path, what: str) -> Path:
    target = Path(path)
    plot.check_format(target)
    if not plot.is_available():
        raise ImportError(f"{what} needs matplotlib: {plot.INSTALL}")
    return target
