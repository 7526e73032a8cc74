"""All use of matplotlib: figures without the global state of pyplot, bitwise reproducible; and text charts."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastattn.cache import write_atomically

INSTALL = "pip install 'fastattn[plot]'"
STYLE: Any = {
    "svg.hashsalt": "fastattn",
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
METADATA: dict[str, dict[str, str | None]] = {"svg": {"Date": None}, "png": {"Software": None}}
MARKS = ".ox+#"  # markers of a text chart's series, in order

Point = tuple[float, float]


def is_available() -> bool:
    """Whether matplotlib can be imported."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return False
    return True


@contextmanager
def style() -> Iterator[None]:
    """The style that figures are made and saved with."""
    import matplotlib

    with matplotlib.rc_context(STYLE):
        yield


def new_figure(width: float, height: float) -> Any:
    """A figure of this size in inches, laid out so that nothing overlaps; make and save it under `style`."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def save(figure: Any, path: Path, *, dpi: float = 150) -> None:
    """Write a figure in the format that the file's name ends with, .svg or .png."""
    kind = path.suffix.removeprefix(".")
    if kind not in METADATA:
        raise ValueError(f"path: got {path.name}, needs a name that ends with .{' or .'.join(METADATA)}")
    drawn = io.BytesIO()
    figure.savefig(drawn, format=kind, metadata=METADATA[kind], dpi=dpi)
    write_atomically(path, drawn.getvalue())


def log_ticks(low: float, high: float) -> list[float]:
    """Three to eight round values within [low, high] > 0 for a logarithmic axis: of each decade, or evenly spaced."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for mantissas in ((1, 2, 5), (1, 3), (1,)):
        # Dividing by a power rounds to the nearest decimal: 3 / 100 is 0.03, but 3 * 0.01 may differ in the last bit.
        values = [m * 10**p if p >= 0 else m / 10**-p for p in powers for m in mantissas]
        ticks = [value for value in values if low <= value <= high]
        if len(ticks) <= 8:
            break
    if len(ticks) < 3:
        ticks = _even_ticks(low, high)
    return ticks[:: -(-len(ticks) // 8)]


def _even_ticks(low: float, high: float) -> list[float]:
    """Three to seven multiples of 1, 2 or 5 times a power of ten."""
    power = math.floor(math.log10(high - low)) - 1
    for step in (50, 20, 10, 5, 2, 1):  # times 10**power
        unit = step * 10**power if power >= 0 else step / 10**-power
        ticks = [float(f"{n * unit:.12g}") for n in range(math.ceil(low / unit), math.floor(high / unit) + 1)]
        if len(ticks) >= 3:
            break
    return ticks


def text_chart(
    series: Mapping[str, Sequence[Point]], x_label: str, *, width: int = 64, height: int = 10
) -> str:
    """A chart of text characters for a terminal; where points coincide, later series overwrite earlier ones."""
    points = [point for curve in series.values() for point in curve]
    xs, ys = zip(*points)
    grid = [[" "] * width for _ in range(height)]
    for mark, curve in zip(MARKS, series.values()):
        for x, y in curve:
            grid[height - 1 - _cell(y, min(ys), max(ys), height)][_cell(x, min(xs), max(xs), width)] = mark
    labels = [f"{max(ys):.4g}", *[""] * (height - 2), f"{min(ys):.4g}"]
    margin = max(map(len, labels))
    rows = [f"{label:>{margin}} |{''.join(row)}".rstrip() for label, row in zip(labels, grid)]
    first, last = f"{min(xs):g}", f"{max(xs):g}"
    legend = ", ".join(f"{mark} {name}" for mark, (name, curve) in zip(MARKS, series.items()) if curve)
    return "\n".join(
        [
            *rows,
            f"{'':{margin}} +{'-' * width}",
            f"{'':{margin}}  {first}{last:>{width - len(first)}}",
            f"{'':{margin}}  {x_label} ({legend})",
        ]
    )


def _cell(value: float, low: float, high: float, cells: int) -> int:
    return round((value - low) / (high - low) * (cells - 1)) if high > low else 0
