"""The tables of the READMEs and docs/benchmarks.md, made from stored results."""

# ruff: noqa: RUF001 - the tables are typeset, and one language is Chinese
from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from report import figures, schema
from report.schema import Result

PAGES = ("README.md", "README.zh-CN.md", "docs/benchmarks.md")
MARKER = re.compile(r"(<!-- benchmarks:([\w-]+):start -->\n)(.*?)(<!-- benchmarks:\2:end -->)", re.DOTALL)
BENCHES = (
    "attention",
    "varlen",
    "decode",
    "softmax",
    "cross-entropy",
    "train",
    "generate",
    "models",
    "swap",
    "overhead",
    "serve",
)
# The first table of the READMEs: a window, packed documents, and a loss that never materialises all logits.
HIGHLIGHTS = (
    ("attention", "window-255-8192"),
    ("attention", "packed-causal-8192"),
    ("cross-entropy", "linear-loss-1024x32768"),
)
COLUMNS = ("case", "peer", "peer_ms", "ours_ms", "speed", "target", "rate", "memory", "error")
WORDS = {
    "en": {
        "case": "call (forward + backward, float32 unless said)",
        "peer": "peer",
        "speed": "speed",
        "target": "target",
        "peer_ms": "peer, ms",
        "ours_ms": "fastattn, ms",
        "rate": "rate (of the ceiling)",
        "memory": "peak memory, MiB (peer)",
        "error": "error vs float64 (peer)",
        "none": "Not measured yet.",
        "on": "{device}, {threads} threads, torch {torch}, {date}, commit {revision}",
        "grid": "{direction}, TFLOP/s (ratio to the best peer)",
        "cells": "mask, head dim",
        "peer_us": "peer, µs",
        "ours_us": "fastattn, µs",
        "more_us": "more, µs",
        "median": "Median speed of the {count} cases measured: {speed} (target ≥ {target}×). Not measured: {missing}.",
    },
    "zh": {
        "case": "调用（未注明者为 float32 前向 + 反向）",
        "peer": "对照",
        "speed": "速度比",
        "target": "目标",
        "peer_ms": "对照，毫秒",
        "ours_ms": "fastattn，毫秒",
        "rate": "速率（占上限）",
        "memory": "峰值内存，MiB（对照）",
        "error": "与 float64 的误差（对照）",
        "none": "尚未测量。",
        "on": "{device}，{threads} 线程，torch {torch}，{date}，提交 {revision}",
        "grid": "{direction}，TFLOP/s（与最快对照之比）",
        "cells": "掩码，头维度",
        "peer_us": "对照，微秒",
        "ours_us": "fastattn，微秒",
        "more_us": "多出，微秒",
        "median": "已测 {count} 例的速度比中位数：{speed}（目标 ≥ {target}×）。未测：{missing}。",
    },
}
Words = dict[str, str]


def table_of(name: str, language: str = "en") -> str:
    """The lines between a page's markers: BENCH-cpu, BENCH-gpu, headline-cpu (every CPU case with a target) and
    highlights-cpu (HIGHLIGHTS)."""
    words = WORDS[language]
    if name not in _BUILDERS:
        raise ValueError(f"no table is called {name!r}; there are {', '.join(_BUILDERS)}")
    return "\n".join(_BUILDERS[name](words) or [words["none"]]) + "\n"


def stale_pages(root: Path = schema.ROOT) -> list[str]:
    """Pages whose tables differ from the results."""
    return [name for name in PAGES if (root / name).exists() and refreshed(root / name) != _read(root / name)]


def refreshed(page: Path) -> str:
    """The page with the tables between its markers rebuilt."""
    language = "zh" if ".zh" in page.name else "en"
    return MARKER.sub(lambda found: found[1] + table_of(found[2], language) + found[4], _read(page))


TASKS = "tasks"  # the folder of the records of trained models


def result_files() -> list[Path]:
    """Every stored result of a bench; records of trained models are `trained.page`'s."""
    found = schema.RESULTS.glob("*/*.json")
    return sorted(path for path in found if path.parent.name != TASKS)


def conditions(result: Result, words: Words | None = None) -> str:
    """Device, versions, date and commit in a line."""
    return (words or WORDS["en"])["on"].format(
        device=result["device"]["name"],
        threads=result["device"]["threads"],
        torch=result["versions"]["torch"],
        date=result["date"][:10],
        revision=(result["revision"] or "?")[:10] + ("+" if result["dirty"] else ""),
    )


def _results(kind: str, bench: str) -> list[Result]:
    loaded = [schema.load(path) for path in result_files()]
    return [result for result in loaded if result["device"]["kind"] == kind and result["bench"] == bench]


def _cpus() -> list[list[Result]]:
    """The results of each maker's CPU, in the order of the benches."""
    found: dict[str, list[Result]] = {}
    for bench in BENCHES:
        for result in _results("cpu", bench):
            found.setdefault(schema.folder_name(result["device"]), []).append(result)
    return [found[name] for name in sorted(found)]


def _headline_lines(words: Words) -> list[str]:
    """Every CPU case with a target: a table for each CPU, with one line per set of conditions."""
    made: list[str] = []
    for results in _cpus():
        rows, under = [], []
        for result in results:
            chosen = [case for case in result["cases"] if case["target"] is not None]
            rows += [_case_line(case) for case in chosen]
            under += [conditions(result, words)] if chosen else []
        if rows:
            made += [*_header([words[name] for name in COLUMNS]), *rows, "", *dict.fromkeys(under), ""]
    return made[:-1]


def _highlight_lines(words: Words) -> list[str]:
    """The cases of HIGHLIGHTS in few columns, a table for each CPU."""
    names = ("case", "peer", "peer_ms", "ours_ms", "speed", "memory")
    made: list[str] = []
    for results in _cpus():
        rows, under = [], []
        for bench, name in HIGHLIGHTS:
            for result in (each for each in results if each["bench"] == bench):
                for case in (each for each in result["cases"] if each["name"] == name):
                    rows.append(_highlight_line(case))
                    under.append(conditions(result, words))
        if rows:
            made += [*_header([words[name] for name in names]), *rows, "", *dict.fromkeys(under), ""]
    return made[:-1]


def _highlight_line(case: Result) -> str:
    ours, peer = figures.ours_of(case), figures.peer_of(case)
    ratio = figures.speed_ratio(ours, peer) if ours and peer else None
    speed = f"**{ratio:.1f}×**" if ratio else "–"
    who = peer["provider"] if peer else "–"
    return _line(case["label"], who, _ms(peer), _ms(ours), speed, f"{_mib(ours)} ({_mib(peer)})")


def _bench_lines(bench: str, kind: str) -> Callable[[Words], list[str]]:
    def lines(words: Words) -> list[str]:
        made: list[str] = []
        for result in _results(kind, bench):
            cases = result["cases"]
            if bench == "attention" and kind == "cuda":
                made += [*_grid_lines(result, words, "forward"), *_grid_lines(result, words, "backward")]
                cases = [case for case in cases if case["group"] not in ("forward", "backward")]
            if bench == "overhead":
                made += _overhead_lines(result, words)
            elif cases:
                made += _header([words[name] for name in COLUMNS])
                made += [_case_line(case) for case in cases]
                made += ["", *_median_lines(result, words)]
            made += [conditions(result, words), "", *_chart_lines(result), ""]
        return made[:-1]

    return lines


def _median_lines(result: Result, words: Words) -> list[str]:
    """The median of the cases' speeds, its target, and the cases that could not be measured."""
    found = figures.median_speed(result)
    if found is None:
        return []
    names = ", ".join(f"`{name}`" for name in found.missing) or "–"
    line = words["median"].format(
        count=found.measured, speed=f"**{found.ratio:.2f}×**", target=found.target, missing=names
    )
    return [line, ""]


def _chart_lines(result: Result) -> list[str]:
    """The result's charts, as a page in docs/ links them."""
    titles = {"length": "Speed over size", "ratio": "Times the peer's speed"}
    folder = f"../benchmarks/results/{schema.folder_name(result['device'])}"
    names = figures.chart_names(result)
    return [f"![{titles.get(n, f'The {n} grid')}]({folder}/{result['bench']}_{n}.svg)" for n in names]


def _case_line(case: Result) -> str:
    ours, peer = figures.ours_of(case), figures.peer_of(case)
    speed = figures.speed_ratio(ours, peer)
    if {"extra_ms", "wrong"} & (case["target"] or {}).keys():
        peer = speed = None
    return _line(
        case["label"],
        peer["provider"] if peer else "–",
        _ms(peer),
        _ms(ours),
        f"**{speed:.2f}×**" if speed else "–",
        ", ".join(figures.goals(case)),
        _rate(case, ours),
        f"{_mib(ours)} ({_mib(peer)})",
        f"{_error(ours)} ({_error(peer)})",
    )


def _rate(case: Result, row: Result | None) -> str:
    """TFLOP/s or GB/s and the share of the ceiling; where the case has a floor, its time."""
    parts = []
    share = f" ({100 * row['ceiling_share']:.0f} %)" if row and row["ceiling_share"] else ""
    if row and row["tflops"]:
        tflops = row["tflops"]
        rate = f"{tflops:.3g} TFLOP/s" if tflops >= 1 else f"{1e3 * tflops:.3g} GFLOP/s"
        parts.append(rate + share)
    elif row and row.get("gbps"):
        parts.append(f"{row['gbps']:.3g} GB/s{share}")
    floors = [r for r in case["rows"] if r["status"] == "ok" and r["provider"].startswith(figures.FLOOR)]
    parts += [f"{r['provider'].removeprefix(figures.FLOOR)} {_ms(r)} ms" for r in floors]
    return ", ".join(parts) or "–"


def _overhead_lines(result: Result, words: Words) -> list[str]:
    """Microseconds of a call: on a CPU its time, on a GPU what launching took the host."""
    lines = _header([words[name] for name in ("case", "peer", "peer_us", "ours_us", "more_us")])
    for case in result["cases"]:
        peers = [r for r in case["rows"] if not r["provider"].startswith("fastattn")]
        peer, *others = peers or [None]
        for row in case["rows"]:
            if not row["provider"].startswith("fastattn"):
                continue
            ours, theirs = figures.host_us(row), figures.host_us(peer)
            variant = row["provider"].removeprefix("fastattn").lstrip("-")
            label = case["label"] + (f" (`{variant}`)" if variant else "")
            more = f"**{ours - theirs:.0f}**" if ours and theirs else "–"
            name = peer["provider"] if peer else "–"
            lines.append(_line(label, name, figures.host_text(peer), figures.host_text(row), more))
        for row in others:
            lines.append(_line(case["label"], row["provider"], figures.host_text(row), "", ""))
    return [*lines, ""]


def _grid_lines(result: Result, words: Words, direction: str) -> list[str]:
    cells = {
        (c["params"]["causal"], c["params"]["head_dim"], c["params"]["seqlen_q"]): c
        for c in result["cases"]
        if c["group"] == direction
    }
    lengths = sorted({length for _, _, length in cells})
    if not cells:
        return []
    heads = [words["cells"], *(f"S = {s}" for s in lengths)]
    lines = [words["grid"].format(direction=direction), "", *_header(heads)]
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


_BUILDERS: dict[str, Callable[[Words], list[str]]] = {
    "headline-cpu": _headline_lines,
    "highlights-cpu": _highlight_lines,
    **{f"{bench}-cpu": _bench_lines(bench, "cpu") for bench in BENCHES},
    **{f"{bench}-gpu": _bench_lines(bench, "cuda") for bench in BENCHES},
}
