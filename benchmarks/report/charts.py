"""Charts drawn from stored results, and the pages that show them."""

# ruff: noqa: RUF001 - charts are typeset
from __future__ import annotations

import math
import textwrap
from pathlib import Path
from typing import Any

import checkout
from report import figures, schema
from report.schema import Result
from report.tables import conditions, refreshed, result_files, stale_pages

LABEL_WIDTH = 64  # characters of a line of a case's label
LINE_INCHES = 0.14  # its height


def draw(result: Result, folder: Path, kind: str = "svg") -> list[Path]:
    """Write each of the result's charts to the folder; the files."""
    drawing = _drawing()
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    with drawing.style():
        for name in figures.chart_names(result):
            if name == "ratio":
                figure = _ratio_figure(result)
            else:
                figure = _length_figure(result) if name == "length" else _grid_figure(result, name)
            figure.supxlabel(conditions(result), x=0.01, ha="left", fontsize=6, color="0.4")
            paths.append(folder / f"{result['bench']}_{name}.{kind}")
            drawing.save(figure, paths[-1])
    return paths


def _drawing() -> Any:
    """fastattn.plot, installed or from this checkout."""
    checkout.make_importable()
    from fastattn import plot

    return plot


def _grid_figure(result: Result, direction: str) -> Any:
    """Grouped bars of TFLOP/s, a panel per mask and head dim: the form flash attention papers use."""
    cases = figures.group_of(result, direction)
    panels = sorted({(not c["params"]["causal"], c["params"]["head_dim"]) for c in cases})
    providers = list(dict.fromkeys(r["provider"] for c in cases for r in c["rows"] if r["status"] == "ok"))
    columns = len({head_dim for _, head_dim in panels})
    rows = math.ceil(len(panels) / columns)
    figure = _drawing().new_figure(5.2 * columns, 3.2 * rows + 0.4)
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis, (full, head_dim) in zip(axes.flat, panels):
        chosen = [
            c for c in cases if (not c["params"]["causal"], c["params"]["head_dim"]) == (full, head_dim)
        ]
        chosen.sort(key=lambda c: int(c["params"]["seqlen_q"]))
        width = 0.8 / max(len(providers), 1)
        for place, provider in enumerate(providers):
            found = [figures.row_of(c, provider) for c in chosen]
            heights = [row["tflops"] if row else 0 for row in found]
            left = [index - 0.4 + (place + 0.5) * width for index in range(len(chosen))]
            bars = axis.bar(left, heights, width, label=provider)
            axis.bar_label(
                bars, [f"{h:.0f}" if h else "" for h in heights], fontsize=5, rotation=90, padding=1
            )
        axis.set_xticks(range(len(chosen)), [str(c["params"]["seqlen_q"]) for c in chosen])
        axis.set_title(f"{direction}, {'full' if full else 'causal'}, head dim {head_dim}")
        axis.set_xlabel("sequence length")
        axis.set_ylabel("TFLOP/s")
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), fontsize=7, frameon=False)
    return figure


def _length_figure(result: Result) -> Any:
    """A panel per line: time over size with 20th and 80th percentiles, or the rate where one is what matters."""
    lines = figures.lines_of(result)
    columns = min(len(lines), 3)
    rows = math.ceil(len(lines) / columns)
    figure = _drawing().new_figure(4.6 * columns, 3.2 * rows + 0.3)
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis, (line, cases) in zip(axes.flat, lines.items()):
        unit = "GB/s" if cases[0].get("bytes") else "TFLOP/s" if result["device"]["kind"] == "cuda" else "ms"
        for provider in dict.fromkeys(row["provider"] for case in cases for row in case["rows"]):
            rows_found = [(case["axis"]["value"], figures.row_of(case, provider)) for case in cases]
            points = [(value, _spread(row, unit)) for value, row in rows_found if row]
            if points:
                middle = [m for _, (_, m, _) in points]
                spread = [[m - low for _, (low, m, _) in points], [high - m for _, (_, m, high) in points]]
                places = [value for value, _ in points]
                axis.errorbar(places, middle, spread, marker="o", capsize=2, label=provider)
        copy = result["ceilings"]["copy_gbps"]
        if unit == "GB/s" and copy:
            axis.axhline(copy, color="0.5", linewidth=0.8, linestyle="--", label="copy")
        axis.set_xscale("log", base=2)
        if unit == "ms":
            axis.set_yscale("log")
            _label_log(axis.yaxis, "")
        else:
            axis.set_ylim(bottom=0)
        values = list(dict.fromkeys(case["axis"]["value"] for case in cases))
        axis.set_xticks(values, [_short(value) for value in values], fontsize=7)
        axis.minorticks_off()
        axis.set_title(line)
        axis.set_xlabel(cases[0]["axis"]["name"])
        axis.set_ylabel("time (ms)" if unit == "ms" else unit)
        axis.legend(fontsize=6)
    for axis in axes.flat[len(lines) :]:
        axis.remove()
    return figure


def _spread(row: Result, unit: str) -> tuple[float, float, float]:
    """(20th percentile, median, 80th percentile) of a row in the unit."""
    time = row["time_ms"]
    if unit == "ms":
        return time["p20"], time["median"], time["p80"]
    rate = row["gbps"] if unit == "GB/s" else row["tflops"]
    return rate * time["median"] / time["p80"], rate, rate * time["median"] / time["p20"]


def _short(value: float) -> str:
    return f"{value / 1024:.0f}k" if value >= 16384 and value % 1024 == 0 else f"{value:g}"


def _label_log(axis: Any, unit: str) -> None:
    """Round numbers along a logarithmic axis of matplotlib, for any range."""
    axis.axes.minorticks_off()
    ticks = _drawing().log_ticks(*sorted(axis.get_view_interval()))
    axis.set_ticks(ticks, [f"{tick:g}{unit}" for tick in ticks])


def _ratio_figure(result: Result) -> Any:
    """A bar from 1 for each case: to the right where ours is faster than the peer, to the left where it is slower."""
    ratios = figures.ratios_of(result)
    labels = [textwrap.fill(label, LABEL_WIDTH) for label, _, _ in ratios]
    lines = max([2, *(label.count("\n") + 1 for label in labels)])
    figure = _drawing().new_figure(9, LINE_INCHES * lines * len(ratios) + 1.1)
    axis = figure.subplots()
    places = range(len(ratios), 0, -1)
    values = [ratio for _, ratio, _ in ratios]
    targets = [target for _, _, target in ratios if target]
    low, high = min([1.0, *values, *targets]), max([1.0, *values, *targets])
    room = (high / low) ** 0.1  # space for the figures at the ends of the bars
    axis.set_xscale("log")
    axis.set_xlim(low / room, high * room)
    axis.set_ylim(0.4, len(ratios) + 0.6)
    colors = ["#4477aa" if ratio >= 1.0 else "#99bbdd" for ratio in values]
    axis.barh(list(places), [ratio - 1.0 for ratio in values], left=1.0, color=colors, height=0.7)
    for place, (_, ratio, target) in zip(places, ratios):
        offset, side, outermost = (3, "left", max) if ratio >= 1.0 else (-3, "right", min)
        # The figure is moved beside a target line that is near it.
        end = outermost(ratio, target) if target and 1 / room < target / ratio < room else ratio
        axis.annotate(
            f"{ratio:.2f}×", (end, place), (offset, 0),
            textcoords="offset points", ha=side, va="center", fontsize=7,
        )  # fmt: skip
        if target:
            axis.plot([target, target], [place - 0.4, place + 0.4], color="#cc3311")
    axis.axvline(1.0, color="0.3", linewidth=0.8)
    axis.set_yticks(list(places), labels, fontsize=7)
    _label_log(axis.xaxis, "×")
    # at the right end: with long labels the axis is narrower than this text
    axis.set_xlabel("times the peer's speed" + (" (red: the target)" if targets else ""), loc="right")
    return figure


def stale_charts() -> list[str]:
    """Stored results whose charts are missing, drawn from other results, or of no stored result."""
    stale = []
    for folder in sorted({path.parent for path in result_files()}):
        wanted: dict[Path, Result] = {}
        for path in result_files():
            if path.parent == folder:
                result = schema.load(path)
                wanted |= {folder / f"{result['bench']}_{n}.svg": result for n in figures.chart_names(result)}
        for chart in {*wanted, *folder.glob("*.svg")}:
            fresh = chart in wanted and chart.exists()
            if not fresh or conditions(wanted[chart]) not in chart.read_text(encoding="utf-8"):
                stale.append(f"{folder.name}/{chart.name}")
    return sorted(stale)


def update_docs(root: Path = schema.ROOT) -> list[str]:
    """Rewrite every page's tables and every result's charts; the names of what changed."""
    changed = stale_pages(root)
    for name in changed:
        schema.replace_file(root / name, refreshed(root / name))
    drawn = [chart for path in result_files() for chart in draw(schema.load(path), path.parent)]
    for folder in {path.parent for path in result_files()}:
        for chart in set(folder.glob("*.svg")) - set(drawn):
            chart.unlink()
    return changed + [chart.name for chart in drawn]
