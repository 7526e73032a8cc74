"""All use of matplotlib: figures without the global state of pyplot, bitwise reproducible; and text charts."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastattn.cache import write_atomically
from fastattn.integers import cdiv

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
CHART_CELLS = (64, 10)  # columns and rows of a text chart

MAX_FIGURE = 60.0  # inches, of the longer side of a figure of attention maps
SHOWN_TOKENS = 64  # most tokens for which an axis has labels
GAPS = {
    " ": "\N{OPEN BOX}",
    "\n": "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}",
    "\t": "\N{RIGHTWARDS ARROW TO BAR}",
}

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
    kind = check_format(path)
    drawn = io.BytesIO()
    figure.savefig(drawn, format=kind, metadata=METADATA[kind], dpi=dpi)
    write_atomically(path, drawn.getvalue())


def check_format(path: Path) -> str:
    """The format by the ending of a file's name; ValueError for another one than .svg and .png."""
    kind = path.suffix.removeprefix(".")
    if kind not in METADATA:
        raise ValueError(f"path: got {path.name!r}, needs a name that ends with .{' or .'.join(METADATA)}")
    return kind


def plot_attention(
    attentions: Any,
    tokens: Sequence[str],
    *,
    query_tokens: Sequence[str] | None = None,
    layer: int | Sequence[int] | None = None,
    head: int | Sequence[int] | None = None,
    path: str | os.PathLike[str] = "attention.png",
) -> Path:
    """Draw attention weights as maps over the tokens: a row of maps per layer, a map per head.

    Rows are queries, columns are keys. In every map the lightest colour is weight 0 and the darkest is 1. Returns the
    path.

    Args:
        attentions: per layer (H, Sq, Sk) or (1, H, Sq, Sk), as models return with output_attentions=True; or the
            weights of one layer from `attention(..., return_weights=True)`.
        tokens: Sk texts of the keys.
        query_tokens: Sq texts of the queries, as of cross-attention; None = the last Sq of the keys'.
        layer, head: numbers of the layers and heads to draw, from 0, negative from the end; all by default.
        path: the file, with the ending .png or .svg.

    Raises:
        ImportError: matplotlib is not installed.
        TypeError, ValueError: an argument has a wrong type, shape or value; the message names it.
    """
    target = Path(path)
    check_format(target)
    maps = _maps(attentions)
    _, seqlen_q, seqlen_k = maps[0].shape
    names = _names("tokens", tokens, seqlen_k, "keys")
    if query_tokens is not None:
        query_names = _names("query_tokens", query_tokens, seqlen_q, "queries")
    elif seqlen_q <= seqlen_k:
        query_names = names[seqlen_k - seqlen_q :]
    else:
        raise ValueError(
            f"query_tokens: got None, needs the texts of the {seqlen_q} queries, as there are {seqlen_k} keys only"
        )
    layers = _chosen("layer", layer, len(maps))
    heads = _chosen("head", head, min(len(each) for each in maps))
    if not is_available():
        raise ImportError(f"plot_attention needs matplotlib: {INSTALL}")
    longest = max(seqlen_q, seqlen_k)
    side = min(0.16 * max(longest, 9), 6.0, 0.9 * MAX_FIGURE / max(len(heads), len(layers)))
    # names of tokens, on the left and below
    margin = 0.075 * min(max(map(len, (*names, *query_names))), 24) + 0.2
    with style():
        figure = new_figure(
            len(heads) * (side + 0.15) + margin + 0.7, len(layers) * (side + 0.25) + margin + 0.2
        )
        figure.set_layout_engine("compressed")  # for maps whose sides have a fixed proportion
        grid = figure.subplots(len(layers), len(heads), squeeze=False, sharex=True, sharey=True)
        step = cdiv(longest, max(1, min(SHOWN_TOKENS, int(side / 0.12))))
        for row, number in enumerate(layers):
            for column, which in enumerate(heads):
                axes = grid[row, column]
                drawn = axes.imshow(
                    maps[number][which], vmin=0.0, vmax=1.0, cmap="Blues", interpolation="nearest"
                )
                axes.set_title(f"layer {number}, head {which}", fontsize=8, pad=3)
                axes.tick_params(length=0, labelsize=7)
                axes.tick_params(axis="x", labelrotation=90)
                axes.spines[:].set(visible=True, color="0.7", linewidth=0.6)
        grid[0, 0].set_xticks(range(0, seqlen_k, step), names[::step])
        grid[0, 0].set_yticks(range(0, seqlen_q, step), query_names[::step])
        bar = figure.colorbar(
            drawn, ax=grid, fraction=0.03, pad=0.01, aspect=30, shrink=min(1.0, 4.0 / (len(layers) * side))
        )
        bar.set_label("attention weight", fontsize=8)
        bar.ax.tick_params(labelsize=7)
        save(figure, target)
    return target


def _names(argument: str, tokens: Sequence[str], count: int, what: str) -> list[str]:
    """The tokens as an axis shows them."""
    if isinstance(tokens, str) or not all(isinstance(token, str) for token in tokens):
        raise TypeError(f"{argument}: needs a list of texts, one for each of the {count} {what}")
    if len(tokens) != count:
        raise ValueError(f"{argument}: got {len(tokens)}, needs one for each of the {count} {what}")
    return [visible(token) for token in tokens]


def _maps(attentions: Any) -> list[Any]:
    """Per layer an array (H, Sq, Sk) in float32."""
    layers = [attentions] if hasattr(attentions, "shape") else list(attentions or ())
    if not layers or not all(hasattr(each, "shape") for each in layers):
        raise TypeError(
            "attentions: needs a tensor for each layer, as models return with output_attentions=True"
        )
    maps = []
    for number, each in enumerate(layers):
        shape = tuple(each.shape)
        if len(shape) == 4 and shape[0] == 1:
            each = each[0]
        if len(each.shape) != 3 or shape[-2:] != tuple(layers[0].shape)[-2:] or 0 in shape:
            raise ValueError(
                f"attentions[{number}]: got shape {shape}, needs (heads, queries, keys) of one sequence, as all layers"
            )
        maps.append(each.detach().float().cpu().numpy() if hasattr(each, "detach") else each)
    return maps


def _chosen(name: str, wanted: int | Sequence[int] | None, count: int) -> list[int]:
    """The numbers of layers or heads, from 0."""
    if wanted is None:
        return list(range(count))
    given: list[Any] = list(wanted) if isinstance(wanted, (list, tuple, range)) else [wanted]
    for number in given:
        if not isinstance(number, int) or isinstance(number, bool):
            raise TypeError(f"{name}: got {number!r}, needs an integer or a list of integers")
        if not -count <= number < count:
            raise ValueError(f"{name}: got {number}, needs {-count} to {count - 1}")
    if not given:
        raise ValueError(f"{name}: got an empty list, needs at least one number")
    return [number % count for number in given]


def visible(token: str) -> str:
    """A token with visible white space, escaped so that matplotlib does not read it as a formula."""
    shown = token.replace("$", r"\$")
    return "".join(GAPS.get(character, character) for character in shown)


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
    return ticks[:: cdiv(len(ticks), 8)]


def _even_ticks(low: float, high: float) -> list[float]:
    """Three to seven multiples of 1, 2 or 5 times a power of ten."""
    power = math.floor(math.log10(high - low)) - 1
    for step in (50, 20, 10, 5, 2, 1):  # times 10**power
        unit = step * 10**power if power >= 0 else step / 10**-power
        ticks = [float(f"{n * unit:.12g}") for n in range(math.ceil(low / unit), math.floor(high / unit) + 1)]
        if len(ticks) >= 3:
            break
    return ticks


def text_chart(series: Mapping[str, Sequence[Point]], x_label: str) -> str:
    """A chart of text characters for a terminal; where points coincide, later series overwrite earlier ones."""
    points = [point for curve in series.values() for point in curve]
    xs, ys = zip(*points)
    width, height = CHART_CELLS
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
