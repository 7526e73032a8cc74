"""The tables of docs/hopper.md that follow from the cycles on file, so that they cannot be older than these."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

PAGE = Path(__file__).resolve().parent.parent.parent / "docs" / "hopper.md"
WITHOUT = ", without TMA"
NAMES = {"forward": "forward", "dkdv": "dk and dv", "dq": "dq", "backward": "all in one pass"}
# What the model makes of others' kernels, compiled and modelled once in the same way: no rows on file.
# (head dim, direction) -> the products alone, FlashAttention-3, FlexAttention, Triton's tutorial
PEERS = {
    (64, "forward"): ("512", "785", "1028", "1013"),
    (128, "forward"): ("1024", "1024 (causal 1024)", "1955", "1660"),
    (64, "dkdv"): ("1024", "", "2241", "1713 (128 bytes spilled)"),
    (64, "dq"): ("768", "", "1609", "1267"),
    (128, "dkdv"): ("2048", "", "3150", ""),
    (128, "dq"): ("1536", "", "2188", ""),
    (64, "backward"): ("1280", "1948", "", ""),
    (128, "backward"): ("2560", "3208 (causal 3360)", "", ""),
}
Rows = Mapping[str, Mapping[str, Any]]


def table(titles: Iterable[str], lines: Iterable[Iterable[str]]) -> str:
    """A table of the page."""
    titles = list(titles)
    return "\n".join([_line(titles), "|" + "---|" * len(titles), *map(_line, lines)])


def _line(cells: Iterable[str]) -> str:
    return "|" + "|".join(f" {cell} " if cell else " " for cell in cells) + "|"


def peers(rows: Rows) -> str:
    """Others' kernels beside ours, in cycles for 64 x 128 scores."""
    titles = ("head dim, pass", "products", "ours, CUDA", "ours, Triton", "FlashAttention-3", "FlexAttention",
              "Triton tutorial")  # fmt: skip
    lines = []
    for (head_dim, direction), (products, *others) in PEERS.items():
        plain = rows.get(f"sm_90 16-bit D{head_dim} {direction} [plain]")
        triton = "" if plain is None else str(plain["cycles"])
        lines.append(
            [f"{head_dim}, {NAMES[direction]}", products, _cuda(rows, head_dim, direction), triton, *others]
        )
    return table(titles, lines)


def _cuda(rows: Rows, head_dim: int, direction: str) -> str:
    """The figures of the CUDA kernels without softcap; with their tiles, where there are several."""
    prefix = f"cuda bfloat16 D{head_dim} {direction} "
    found = {
        name.removeprefix(prefix): row["cycles"] for name, row in rows.items() if name.startswith(prefix)
    }
    found = {tile: cycles for tile, cycles in found.items() if "softcap" not in tile}
    if len(found) == 1:
        return str(*found.values())
    return ", ".join(f"{cycles} ({tile})" for tile, cycles in sorted(found.items(), key=lambda each: each[1]))


def without(name: str) -> str:
    """The row of the tile that takes the place of one by TMA."""
    return name.replace("]", WITHOUT + "]")


def by_tma(rows: Rows, entries: Iterable[Any], has_score_mods: bool) -> str:
    """The rows that load by TMA: cycles of the tile before, which still serves without TMA, and of the one now."""
    from compile_matrix import FEATURES

    entries = [each for each in entries if each.name in rows and WITHOUT not in each.features]
    lines = []
    for head_dim, kernel in dict.fromkeys((each.size, each.kernel) for each in entries):
        chosen = {e.features: e for e in entries if (e.size, e.kernel) == (head_dim, kernel)}
        chosen = {features: chosen[features] for features in FEATURES[has_score_mods] if features in chosen}
        if any(without(each.name) in rows for each in chosen.values()):
            tiles = ", or ".join(dict.fromkeys(each.tile for each in chosen.values()))
            cells = [_change(rows, each.name) for each in chosen.values()]
            lines.append([str(head_dim), NAMES[kernel], tiles, *cells])
    return table(("head dim", "kernel", "tile", *FEATURES[has_score_mods]), lines)


def _change(rows: Rows, name: str) -> str:
    now, before = rows[name]["cycles"], rows.get(without(name))
    if before is None:
        return f"{now}, as before"
    return f"{before['cycles']} -> {now} ({now / before['cycles'] - 1:+.0%})".replace("%", " %")


def sections(rows: Rows, entries: Iterable[Any]) -> Iterator[tuple[str, str]]:
    """(name, table) of what lies between `<!-- NAME -->` and `<!-- end of NAME -->` in the page."""
    entries = list(entries)
    yield "cycles of peers", peers(rows)
    yield "cycles of rows by TMA", by_tma(rows, entries, has_score_mods=False)
    yield "cycles of rows by TMA that change scores", by_tma(rows, entries, has_score_mods=True)


def updated(text: str, rows: Rows, entries: Iterable[Any]) -> str:
    """The page with its tables as the rows have it; ValueError where a mark is missing."""
    for name, made in sections(rows, entries):
        begin, end = f"<!-- {name} -->\n", f"\n<!-- end of {name} -->"
        head, found, rest = text.partition(begin)
        _, closed, tail = rest.partition(end)
        if not (found and closed):
            raise ValueError(f"{PAGE.name} has no section {name!r}")
        text = f"{head}{begin}\n{made}\n{end}{tail}"
    return text
