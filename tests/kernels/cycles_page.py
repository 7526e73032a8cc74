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
# The CUDA backward, (head dim, passes) -> cycles of the kernels in their place before, "" where there was none.
BACKWARD = {
    (64, ("dkdv",)): "1162", (64, ("dq",)): "768", (64, ("dkdv", "dq")): "1930", (64, ("backward",)): "",
    (128, ("dkdv",)): "2248", (128, ("dq",)): "1536", (128, ("dkdv", "dq")): "3784", (128, ("backward",)): "3319",
    (256, ("dkdv",)): "4616 + 3024 (products 5120)", (256, ("dq",)): "4584", (256, ("dkdv", "dq")): "12224",
}  # fmt: skip
PRODUCTS = {"dkdv": 4, "dq": 3, "backward": 5}
OPERATIONS_A_CYCLE = 4096  # of the tensor cores, 16-bit operands
# Triton's dk and dv with lse prepared once: (row, what it is, instructions before, cycles before and after by the model
# as it was then)
PREPARED = [
    ("sm_90 16-bit D128 dkdv [causal]", "dk/dv, head dim 128, 64x128 TMA", 422, "3066 -> 3049"),
    ("sm_90 16-bit D64 dkdv [causal]", "dk/dv, head dim 64, 64x64 TMA", 372, "1666 -> 1613"),
    ("sm_90 16-bit D64 dkdv [causal, without TMA]", "dk/dv, head dim 64, 64x128 without TMA", 386, "2386 -> 2353"),
]  # fmt: skip
PLAIN_CAUSAL = ("plain", "causal", "causal, window, lengths, sinks", "causal, packed")
CUDA_128, CUDA_256 = "cuda bfloat16 D128 forward ", "cuda bfloat16 D256 forward "


def _triton(head_dim: int, kernel: str, *features: str) -> list[str]:
    return [f"sm_90 16-bit D{head_dim} {kernel} [{each}]" for each in features]


# Sentences of the page that quote figures on file: {} is a row's cycles, or the least and most of several rows.
QUOTED: list[tuple[str, list[list[str]]]] = [
    (
        "{} cycles at 128 x 176 ({} in clusters), {} at head dim 256",
        [[CUDA_128 + "128x176"], [CUDA_128 + "128x176 cluster 2"], [CUDA_256 + "128x80"]],
    ),
    ("the loop takes {} cycles where the products take 2048", [[CUDA_256 + "128x80"]]),
    ("| forward at 64, 128x64 without TMA | {} |", [_triton(64, "forward", "plain, without TMA")]),
    ("| forward at 64, 128x64 by TMA | {} |", [_triton(64, "forward", "plain")]),
    ("| dq at 64, 128x64 by TMA | {} |", [_triton(64, "dq", "plain")]),
    ("| forward at 128, 128x128 by TMA | {} |", [_triton(128, "forward", "plain")]),
    ("| dk and dv at 128, 64x128 by TMA | {} |", [_triton(128, "dkdv", "plain")]),
    ("64 queries by 128 keys at {} (full) and", [_triton(128, "dkdv", "plain")]),
    ("(full) and {} (causal) cycles", [_triton(128, "dkdv", "causal")]),
    ("takes {} and 2906 cycles, {} ungrouped",
        [_triton(128, "dkdv", "causal, grouped"), _triton(128, "dkdv", "causal")]),
    ("two blocks | 1482 to 1640 cycles where 128x128 has {}.",
        [_triton(128, "forward", "causal", "causal, window, lengths, sinks", "causal, packed")]),
    ("808 to 858 cycles where 128x64 has {}, but", [_triton(64, "forward", *PLAIN_CAUSAL)]),
    ("in causal calls where 64x64 has {};", [_triton(64, "dkdv", *PLAIN_CAUSAL[1:])]),
    ("; 1596 for {} without a mask", [_triton(64, "dkdv", "plain")]),
    ("by the L2 cache at 28 bytes a clock) where 64x128 has {};", [_triton(128, "dkdv", *PLAIN_CAUSAL)]),
    ("1846 to 1903 cycles where 128x64 has {};", [_triton(128, "dq", *PLAIN_CAUSAL)]),
    ("770 cycles where 128x64 has {}, but 1170", [_triton(64, "dq", *PLAIN_CAUSAL)]),
    ("but 128x64 by TMA has {}: with", [_triton(64, "dq", *PLAIN_CAUSAL)]),
    ("{} cycles per 64 x 128 scores with it and 639 without", [["cuda bfloat16 D64 forward 192x128"]]),
]  # fmt: skip
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


def backward(rows: Rows) -> str:
    """The CUDA backward: each kernel, the two passes together and one pass, before and now."""
    titles = ("head dim", "kernel", "products alone", "before", "now", "bound by", "L2, bytes a clock")
    lines = []
    for (head_dim, passes), before in BACKWARD.items():
        found = [_backward_row(rows, head_dim, kernel) for kernel in passes]
        products = sum(_product_cycles(head_dim) * PRODUCTS[kernel] for kernel in passes)
        cycles = sum(row["cycles"] for _, row in found)
        bound = traffic = ""
        name = {"backward": "one pass"}.get(passes[0], NAMES[passes[0]])
        if len(passes) > 1:
            name = "two passes"
        else:
            (tile, row), kernel = found[0], passes[0]
            bound = f"{row['bound']}, {row['share']:.2f}"
            traffic = f"{_l2_bytes(head_dim, kernel, tile) / cycles:.0f}"
        if passes == ("backward",):
            two = sum(_backward_row(rows, head_dim, kernel)[1]["cycles"] for kernel in ("dkdv", "dq"))
            name += f", {cycles / two - 1:+.0%} cycles of two".replace("%", " %")
        lines.append([str(head_dim), name, str(products), before or "none", str(cycles), bound, traffic])
    return table(titles, lines)


def _backward_row(rows: Rows, head_dim: int, kernel: str) -> tuple[str, Mapping[str, Any]]:
    """(tile, row) of the kernel without softcap."""
    prefix = f"cuda bfloat16 D{head_dim} {kernel} "
    ((tile, row),) = [
        (name.removeprefix(prefix), row)
        for name, row in rows.items()
        if name.startswith(prefix) and "softcap" not in name
    ]
    return tile, row


def _product_cycles(head_dim: int) -> int:
    """Of the tensor cores, for one product of 64 x 128 scores."""
    return 2 * 64 * 128 * head_dim // OPERATIONS_A_CYCLE


def _l2_bytes(head_dim: int, kernel: str, tile: str) -> float:
    """Read from L2, and added there, for 64 x 128 scores: two 16-bit operands, float32 sums of dq in one pass."""
    queries, keys = map(int, tile.split("x"))
    if kernel == "dq":  # 128 keys and their values for all queries of a tile
        return 2 * 2 * 128 * head_dim * 64 / queries
    step = 2 * 2 * 64 * head_dim + (4 * 64 * head_dim if kernel == "backward" else 0)
    return step * 128 / keys


def prepared(rows: Rows) -> str:
    """Triton's dk and dv with what both passes need of lse prepared once."""
    titles = (
        "prepared once",
        "instructions per full block, causal",
        "cycles, by the model as it was then",
        "cycles now",
    )
    lines = [
        [words, f"{before} -> {rows[name]['instructions']}", then, str(rows[name]["cycles"])]
        for name, words, before, then in PREPARED
    ]
    lines.append(["dq, head dims 64, 128", "unchanged: it loads lse once per program", "", ""])
    return table(titles, lines)


def quotations(rows: Rows) -> Iterator[str]:
    """The sentences of QUOTED as the rows have them."""
    for words, fields in QUOTED:
        figures = []
        for names in fields:
            cycles = [rows[name]["cycles"] for name in names]
            least, most = min(cycles), max(cycles)
            figures.append(str(least) if least == most else f"{least} to {most}")
        yield words.format(*figures)


def without(name: str) -> str:
    """The row of the tile that takes the place of one by TMA."""
    return name.replace("]", WITHOUT + "]")


def by_tma(rows: Rows, entries: Iterable[Any], has_score_mods: bool) -> str:
    """The rows that load by TMA: cycles of the tile before, which still serves without TMA, and of the one now."""
    from compile_entries import FEATURES

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
    yield "cycles of the backward", backward(rows)
    yield "cycles of peers", peers(rows)
    yield "cycles of rows by TMA", by_tma(rows, entries, has_score_mods=False)
    yield "cycles of rows by TMA that change scores", by_tma(rows, entries, has_score_mods=True)
    yield "cycles with lse prepared once", prepared(rows)


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
