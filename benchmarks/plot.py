"""Charts and tables from stored results: nothing that README or docs/benchmarks.md shows is typed by hand.

python benchmarks/plot.py --update-docs      rewrite the charts, and the tables between markers
python benchmarks/plot.py --check            say which pages are stale
python benchmarks/plot.py RESULT.json --out FOLDER [--format png]
"""

# ruff: noqa: RUF001 - the tables are typeset, and one language is Chinese
from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import figures
import schema
from schema import Result

PAGES = ("README.md", "README.zh-CN.md", "docs/benchmarks.md")
MARKER = re.compile(r"(<!-- benchmarks:([\w-]+):start -->\n)(.*?)(<!-- benchmarks:\2:end -->)", re.DOTALL)
WORDS = {
    "en": {
        "case": "call (forward + backward, float32 unless said)",
        "peer": "peer",
        "speed": "speed",
        "target": "target",
        "peer_ms": "peer, ms",
        "ours_ms": "fastattn, ms",
        "memory": "peak memory, MiB (peer)",
        "error": "error vs float64 (peer)",
        "none": "Not measured yet.",
        "import": "`import fastattn` after `import torch`",
        "on": "{device}, {threads} threads, torch {torch}, {date}, commit {revision}",
        "grid": "{direction}, TFLOP/s (ratio to the best peer)",
        "cells": "mask, head dim",
    },
    "zh": {
        "case": "调用(未注明者为 float32 前向 + 反向)",
        "peer": "对照",
        "speed": "速度比",
        "target": "目标",
        "peer_ms": "对照,毫秒",
        "ours_ms": "fastattn,毫秒",
        "memory": "峰值内存,MiB(对照)",
        "error": "与 float64 的误差(对照)",
        "none": "尚未测量。",
        "import": "`import torch` 之后的 `import fastattn`",
        "on": "{device},{threads} 线程,torch {torch},{date},提交 {revision}",
        "grid": "{direction},TFLOP/s(与最快对照之比)",
        "cells": "掩码,头维度",
    },
}


def table_of(name: str, language: str = "en") -> str:
    """What stands between the markers: attention-cpu (cases with a target), attention-cpu-all, attention-gpu."""
    builders: dict[str, Callable[[dict[str, str]], list[str]]] = {
        "attention-cpu": lambda words: _cpu_lines(words, everything=False),
        "attention-cpu-all": lambda words: _cpu_lines(words, everything=True),
        "attention-gpu": _gpu_lines,
    }
    if name not in builders:
        raise ValueError(f"no table is called {name!r}; there are {', '.join(builders)}")
    words = WORDS[language]
    return "\n".join(builders[name](words) or [words["none"]]) + "\n"


def stale_pages(root: Path = schema.ROOT) -> list[str]:
    """Pages whose tables are not what the results give."""
    return [name for name in PAGES if (root / name).exists() and refreshed(root / name) != _read(root / name)]


def refreshed(page: Path) -> str:
    """The page with every table between markers made anew."""
    language = "zh" if ".zh" in page.name else "en"
    return MARKER.sub(lambda found: found[1] + table_of(found[2], language) + found[4], _read(page))


def result_files(results: Path | None = None) -> list[Path]:
    """Every stored result."""
    return sorted((results or schema.RESULTS).glob("*/*.json"))


def _cpu_lines(words: dict[str, str], everything: bool) -> list[str]:
    path = schema.RESULTS / "cpu" / "attention.json"
    if not path.exists():
        return []
    result = schema.load(path)
    heads = [
        words[name] for name in ("case", "peer", "peer_ms", "ours_ms", "speed", "target", "memory", "error")
    ]
    lines = _header(heads)
    for case in result["cases"]:
        if everything or case["target"] is not None:
            lines.append(_import_line(case, words) if case["direction"] == "import" else _case_line(case))
    return [*lines, "", conditions(result, words)]


def conditions(result: Result, words: dict[str, str] | None = None) -> str:
    """Device, versions, date and commit in a line."""
    words = words or WORDS["en"]
    return words["on"].format(
        device=result["device"]["name"],
        threads=result["device"]["threads"],
        torch=result["versions"]["torch"],
        date=result["date"][:10],
        revision=(result["revision"] or "?")[:10] + ("+" if result["dirty"] else ""),
    )


def describe(case: Result) -> str:
    """A case in words: shape, mask, features, and what is not the default."""
    params = case["params"]
    sq, sk = params["seqlen_q"], params["seqlen_k"]
    heads = f"{params['heads']}" + (f"/{params['kv_heads']}" if params["kv_heads"] != params["heads"] else "")
    shape = (
        f"{params['batch']}×{heads}×" + (f"{sq}×" if sq == sk else f"({sq}, {sk})×") + f"{params['head_dim']}"
    )
    parts = ["causal"] if params.get("causal") and sq > 1 else []
    if params.get("window"):
        parts.append(f"window ({params['window'][0]}, {params['window'][1]})")
    if params.get("documents"):
        parts.append(f"{params['documents']} packed documents")
    labels = {
        "alibi": "ALiBi",
        "softcap": "softcap",
        "bias": "bias with gradient",
        "random_mask": "dense bool mask",
    }
    parts += [label for name, label in labels.items() if params.get(name)]
    if params.get("dropout_p"):
        parts.append(f"dropout {params['dropout_p']}")
    if sq == 1:
        parts.append("one query")
    if case["dtype"] != "float32":
        parts.append(case["dtype"])
    if case["direction"] != "forward+backward":
        parts.append(case["direction"])
    return f"{shape} " + ", ".join(parts or ["full"])


def _case_line(case: Result) -> str:
    ours, peer = figures.row_of(case, "fastattn"), figures.peer_of(case)
    speed, target = figures.speed_ratio(ours, peer), case["target"] or {}
    goal = f"≥ {target['speed']}×" if "speed" in target else ""
    if "memory" in target:
        goal += f", ≤ {target['memory']} mem"
    return _line(
        describe(case),
        peer["contestant"] if peer else "–",
        _ms(peer),
        _ms(ours),
        f"**{speed:.2f}×**" if speed else "–",
        goal,
        f"{_mib(ours)} ({_mib(peer)})",
        f"{_error(ours)} ({_error(peer)})",
    )


def _import_line(case: Result, words: dict[str, str]) -> str:
    ours, target = figures.row_of(case, "fastattn"), case["target"]
    return _line(words["import"], "–", "–", _ms(ours), "–", f"≤ {target['extra_ms']:.0f} ms", "–", "–")


def _gpu_lines(words: dict[str, str]) -> list[str]:
    lines = []
    for path in result_files():
        result = schema.load(path)
        if result["bench"] == "attention" and result["device"]["kind"] == "cuda":
            lines += [*_grid_lines(result, words, "forward"), *_grid_lines(result, words, "backward")]
            lines += [conditions(result, words), ""]
    return lines[:-1]


def _grid_lines(result: Result, words: dict[str, str], direction: str) -> list[str]:
    cells = {
        (c["params"]["causal"], c["params"]["head_dim"], c["params"]["seqlen_q"]): c
        for c in _group(result, direction)
    }
    lengths = sorted({length for _, _, length in cells})
    if not cells:
        return []
    lines = [
        words["grid"].format(direction=direction),
        "",
        *_header([words["cells"], *(f"S = {s}" for s in lengths)]),
    ]
    for causal, head_dim in sorted({key[:2] for key in cells}, reverse=True):
        texts = []
        for length in lengths:
            case = cells.get((causal, head_dim, length))
            ours = figures.best_ours(case) if case else None
            ratio = figures.speed_ratio(ours, figures.best_peer(case)) if case and ours else None
            texts.append(f"{ours['tflops']:.0f} ({ratio:.2f})" if ours and ratio else "–")
        lines.append(_line(f"{'causal' if causal else 'full'}, {head_dim}", *texts))
    return [*lines, ""]


def _header(names: list[str]) -> list[str]:
    return [_line(*names), "|" + "---|" * len(names)]


def _line(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def _ms(row: Result | None) -> str:
    if row is None:
        return "–"
    median = row["time_ms"]["median"]
    return f"{median:.0f}" if median >= 100 else f"{median:.3g}"


def _mib(row: Result | None) -> str:
    return f"{row['peak_memory_mib']:.0f}" if row and row["peak_memory_mib"] is not None else "–"


def _error(row: Result | None) -> str:
    return f"{max(row['error'].values()):.1e}" if row and row["error"] else "–"


def _read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def _group(result: Result, name: str) -> list[Result]:
    return [case for case in result["cases"] if case["group"] == name]


def draw(result: Result, folder: Path, kind: str = "svg") -> list[Path]:
    """The charts a result has cases for: TFLOP/s by length, head dim and mask; time by length; ratios to the peer."""
    import matplotlib

    matplotlib.use("Agg")
    style: Any = {
        "svg.hashsalt": "fastattn",
        "svg.fonttype": "none",
        "font.size": 9,
        "axes.spines.top": False,
    }
    charts: dict[str, Any] = {}
    with matplotlib.rc_context({**style, "axes.spines.right": False}):
        for direction in ("forward", "backward"):
            if _group(result, direction):
                charts[direction] = _grid_figure(result, direction)
        if any(len(_lengths(result, group)) > 1 for group in ("dense", "window")):
            charts["length"] = _length_figure(result)
        if result["device"]["kind"] == "cpu":
            charts["ratio"] = _ratio_figure(result)
        folder.mkdir(parents=True, exist_ok=True)
        paths = []
        for name, figure in charts.items():
            figure.supxlabel(conditions(result), x=0.01, ha="left", fontsize=6, color="0.4")
            paths.append(folder / f"{result['bench']}_{name}.{kind}")
            figure.savefig(paths[-1], metadata={"Date": None} if kind == "svg" else None, dpi=150)
    return paths


def _grid_figure(result: Result, direction: str) -> Any:
    """Grouped bars of TFLOP/s, a panel per mask and head dim: the form flash attention papers use."""
    from matplotlib.figure import Figure

    cases = _group(result, direction)
    panels = sorted({(not c["params"]["causal"], c["params"]["head_dim"]) for c in cases})
    contestants = list(
        dict.fromkeys(r["contestant"] for c in cases for r in c["rows"] if r["status"] == "ok")
    )
    columns = len({head_dim for _, head_dim in panels})
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(5.2 * columns, 3.2 * rows + 0.4), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis, (full, head_dim) in zip(axes.flat, panels):
        chosen = [
            c for c in cases if (not c["params"]["causal"], c["params"]["head_dim"]) == (full, head_dim)
        ]
        chosen.sort(key=lambda c: int(c["params"]["seqlen_q"]))
        width = 0.8 / max(len(contestants), 1)
        for place, contestant in enumerate(contestants):
            found = [figures.row_of(c, contestant) for c in chosen]
            heights = [row["tflops"] if row else 0 for row in found]
            left = [index - 0.4 + (place + 0.5) * width for index in range(len(chosen))]
            bars = axis.bar(left, heights, width, label=contestant)
            axis.bar_label(
                bars, [f"{h:.0f}" if h else "" for h in heights], fontsize=5, rotation=90, padding=1
            )
        axis.set_xticks(range(len(chosen)), [str(c["params"]["seqlen_q"]) for c in chosen])
        axis.set_title(f"{direction}, {'full' if full else 'causal'}, head dim {head_dim}")
        axis.set_xlabel("sequence length")
        axis.set_ylabel("TFLOP/s")
    axes.flat[0].legend(fontsize=6)
    return figure


def _lengths(result: Result, group: str) -> list[Result]:
    """The cases of a group that differ from each other only in length."""
    plain = [
        c
        for c in _group(result, group)
        if c["dtype"] == "float32" and (group != "dense" or c["params"]["causal"])
    ]
    return sorted(plain, key=lambda c: int(c["params"]["seqlen_q"]))


def _length_figure(result: Result) -> Any:
    from matplotlib.figure import Figure

    groups = [group for group in ("dense", "window") if len(_lengths(result, group)) > 1]
    figure = Figure(figsize=(4.6 * len(groups), 3.4), layout="constrained")
    for axis, group in zip(figure.subplots(1, len(groups), squeeze=False).flat, groups):
        cases = _lengths(result, group)
        for contestant in dict.fromkeys(row["contestant"] for case in cases for row in case["rows"]):
            found = [(case["params"]["seqlen_q"], figures.row_of(case, contestant)) for case in cases]
            points = [(length, row["time_ms"]) for length, row in found if row]
            middle = [time["median"] for _, time in points]
            spread = [
                [m - t["p20"] for m, (_, t) in zip(middle, points)],
                [t["p80"] - t["median"] for _, t in points],
            ]
            axis.errorbar(
                [length for length, _ in points], middle, spread, marker="o", capsize=2, label=contestant
            )
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xticks(
            [case["params"]["seqlen_q"] for case in cases], [str(c["params"]["seqlen_q"]) for c in cases]
        )
        window = cases[0]["params"].get("window")
        axis.set_title(f"window ({window[0]}, {window[1]})" if window else "causal")
        axis.set_xlabel("sequence length")
        axis.set_ylabel("ms, forward + backward")
        axis.legend(fontsize=7)
    return figure


def _ratio_figure(result: Result) -> Any:
    from matplotlib.figure import Figure

    ratios = []
    for case in result["cases"]:
        ours, peer = figures.row_of(case, "fastattn"), figures.peer_of(case)
        ratio = figures.speed_ratio(ours, peer) if case["direction"] != "import" else None
        if ratio and peer:
            ratios.append(
                (
                    f"{describe(case)}  (peer: {peer['contestant']})",
                    ratio,
                    (case["target"] or {}).get("speed"),
                )
            )
    figure = Figure(figsize=(9, 0.28 * len(ratios) + 1.1), layout="constrained")
    axis = figure.subplots()
    places = range(len(ratios), 0, -1)
    bars = axis.barh(list(places), [ratio for _, ratio, _ in ratios], color="#4477aa", height=0.7)
    axis.bar_label(bars, [f"{ratio:.2f}×" for _, ratio, _ in ratios], fontsize=7, padding=2)
    for place, (_, _, target) in zip(places, ratios):
        if target:
            axis.plot([target, target], [place - 0.4, place + 0.4], color="#cc3311")
    axis.axvline(1.0, color="0.5", linewidth=0.8)
    axis.set_yticks(list(places), [label for label, _, _ in ratios], fontsize=7)
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}×")
    axis.set_xlabel("times the peer's speed (red: the target)")
    return figure


def update_docs(root: Path = schema.ROOT) -> list[str]:
    """Rewrite every page's tables and every result's charts; the names of what changed."""
    changed = stale_pages(root)
    for name in changed:
        (root / name).write_text(refreshed(root / name), encoding="utf-8")
    for path in result_files():
        changed += [chart.name for chart in draw(schema.load(path), path.parent)]
    return changed


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description="Charts and tables from stored results.")
    parser.add_argument("result", nargs="?", type=Path, help="a result file to draw")
    parser.add_argument("--out", type=Path, default=Path("."), help="folder for its charts")
    parser.add_argument("--format", choices=("svg", "png"), default="svg")
    parser.add_argument("--update-docs", action="store_true", help="rewrite tables and charts of the pages")
    parser.add_argument("--check", action="store_true", help="fail when a page is stale")
    options = parser.parse_args()
    if options.check:
        stale = stale_pages()
        print(
            "\n".join(f"{name} is stale: python benchmarks/plot.py --update-docs" for name in stale)
            or "up to date"
        )
        return 1 if stale else 0
    if options.update_docs:
        print("\n".join(update_docs()))
        return 0
    if options.result is None:
        parser.error("give a result file, --update-docs or --check")
    for chart in draw(schema.load(options.result), options.out, options.format):
        print(chart)
    return 0


if __name__ == "__main__":
    sys.exit(main())
