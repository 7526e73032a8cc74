"""The import graph between the layers, drawn from ARROWS of test_imports.py: a picture and a table for the docs.

`python tests/import_graph.py --write` writes docs/images/imports.svg and the table in docs/architecture.md; a test
fails when either is not that of the arrows.
"""

from __future__ import annotations

import ast
import sys
from itertools import pairwise
from pathlib import Path

from test_imports import ARROWS, imports

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "architecture.md"
PICTURE = ROOT / "docs" / "images" / "imports.svg"
START, END = "<!-- imports:start -->", "<!-- imports:end -->"
PUBLIC = "fastattn"  # the layer "" of ARROWS: the package's own names
WIDTH, ROW, BOX, MARGIN = 1000, 92, 30, 24
CHARACTER = 8.2  # of a label, in pixels
SWEEPS = 12

Graph = dict[str, set[str]]


def layers() -> Graph:
    """Layer -> the layers that it may import; fastattn itself imports what its __init__ imports."""
    source = (ROOT / "fastattn" / "__init__.py").read_text(encoding="utf-8")
    named = {name.split(".")[1] for name in imports("__init__.py", source) if name.startswith("fastattn.")}
    graph = {PUBLIC: named & ARROWS.keys()}
    for layer, targets in ARROWS.items():
        graph[layer] = {PUBLIC if target == "" else target for target in targets - {"__version__"}}
    return graph


def reduced(graph: Graph) -> Graph:
    """The graph without an arrow that a longer way implies."""
    beyond: Graph = {}

    def reach(layer: str) -> set[str]:
        if layer not in beyond:
            beyond[layer] = graph[layer].union(*(reach(target) for target in graph[layer]))
        return beyond[layer]

    return {
        layer: {t for t in targets if not any(t in reach(other) for other in targets - {t})}
        for layer, targets in graph.items()
    }


def rows_of(graph: Graph) -> list[list[str]]:
    """Layers from those that nothing imports to those that import nothing, each as low as its imports allow."""
    rank: dict[str, int] = {}

    def height(layer: str) -> int:
        if layer not in rank:
            rank[layer] = 1 + max((height(target) for target in graph[layer]), default=-1)
        return rank[layer]

    top = max(height(layer) for layer in graph)
    return [sorted(layer for layer in graph if rank[layer] == top - row) for row in range(top + 1)]


def with_bends(rows: list[list[str]], graph: Graph) -> tuple[list[list[str]], list[tuple[str, ...]]]:
    """The rows with a point in each row that an arrow passes, and every arrow as the points it goes through."""
    row_of = {layer: number for number, row in enumerate(rows) for layer in row}
    rows = [list(row) for row in rows]
    ways = []
    for layer in sorted(graph):
        for target in sorted(graph[layer]):
            bends = [f"{layer}>{target}@{row}" for row in range(row_of[layer] + 1, row_of[target])]
            for row, bend in enumerate(bends, row_of[layer] + 1):
                rows[row].append(bend)
            ways.append((layer, *bends, target))
    return rows, ways


def width_of(name: str) -> float:
    """Of a box, or of the gap that a passing arrow needs."""
    return 18.0 if ">" in name else 26 + CHARACTER * len(name)


def places(rows: list[list[str]], ways: list[tuple[str, ...]]) -> dict[str, float]:
    """The x of every box and bend: each row is ordered by the mean place of its neighbours, a few times over."""
    near: dict[str, set[str]] = {name: set() for row in rows for name in row}
    for way in ways:
        for first, second in pairwise(way):
            near[first].add(second)
            near[second].add(first)
    x: dict[str, float] = {}
    for row in rows:
        x |= spread(row)
    for sweep in range(SWEEPS):
        for row in rows if sweep % 2 else reversed(rows):
            mean = {name: sum(x[other] for other in near[name]) / max(1, len(near[name])) for name in row}
            x |= spread(sorted(row, key=lambda name: (round(mean[name], 3), name)))
    return x


def spread(row: list[str]) -> dict[str, float]:
    """Even gaps between the boxes of a row, across the picture."""
    widths = [width_of(name) for name in row]
    gap = (WIDTH - 2 * MARGIN - sum(widths)) / (len(row) + 1)
    x, at = {}, MARGIN + gap
    for name, width in zip(row, widths):
        x[name] = at + width / 2
        at += width + gap
    return x


def picture(graph: Graph) -> str:
    """The graph as SVG."""
    fewer = reduced(graph)
    rows, ways = with_bends(rows_of(fewer), fewer)
    x = places(rows, ways)
    y = {name: MARGIN + BOX / 2 + ROW * number for number, row in enumerate(rows) for name in row}
    height = 2 * MARGIN + BOX + ROW * (len(rows) - 1)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="monospace" '
        'font-size="13">',
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
        '<defs><marker id="head" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0L8 4L0 8z" fill="#607d8b"/></marker></defs>',
    ]
    for way in ways:
        start, end = way[0], way[-1]
        parts = [f"M{x[start]:.0f} {y[start] + BOX / 2:.0f}"]
        for first, second in pairwise(way):
            above = y[first] + (BOX / 2 if first == start else 0)
            below = y[second] - (BOX / 2 if second == end else 0)
            middle = (above + below) / 2
            parts.append(
                f"C{x[first]:.0f} {middle:.0f} {x[second]:.0f} {middle:.0f} {x[second]:.0f} {below:.0f}"
            )
        lines.append(
            f'<path d="{"".join(parts)}" fill="none" stroke="#90a4ae" stroke-width="1.3" marker-end="url(#head)"/>'
        )
    for name in sorted(graph):
        width = width_of(name)
        lines += [
            f'<rect x="{x[name] - width / 2:.0f}" y="{y[name] - BOX / 2:.0f}" width="{width:.0f}" height="{BOX}" '
            'rx="4" fill="#e0f2f1" stroke="#00796b"/>',
            f'<text x="{x[name]:.0f}" y="{y[name] + 4:.0f}" text-anchor="middle">{name}</text>',
        ]
    return "\n".join([*lines, "</svg>", ""])


def summary(layer: str) -> str:
    """The first line of a layer's docstring."""
    if layer == PUBLIC:
        return "The public names."
    folder = ROOT / ("kernels" if layer == "kernels" else f"fastattn/{layer}")
    file = folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")
    said = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    return said.partition("\n\n")[0].replace("\n", " ").replace("|", "\\|")


def table(graph: Graph) -> str:
    """A line per layer: what it is, and all that it may import."""
    lines = ["| layer | what it is | may import |", "|---|---|---|"]
    for layer in (name for row in rows_of(graph) for name in row):
        targets = ", ".join(f"`{target}`" for target in sorted(graph[layer])) or "nothing of fastattn"
        lines.append(f"| `{layer}` | {summary(layer)} | {targets} |")
    return "\n".join(lines)


def rendered() -> dict[Path, str]:
    """The files as they should be."""
    graph = layers()
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(START)
    _, _, after = rest.partition(END)
    return {PICTURE: picture(graph), PAGE: f"{before}{START}\n{table(graph)}\n{END}{after}"}


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit("say --write")
    for path, text in rendered().items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
        print(path.relative_to(ROOT))
