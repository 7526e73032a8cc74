"""The table that ends an evidence run, one screen long."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from report import figures, schema
from report.tables import BENCHES

# dense bfloat16 TFLOP/s of the data sheets, by what a device's name contains
DATA_SHEET_TFLOPS = {"H100 PCIe": 756, "H100": 989, "H200": 989, "A100": 312}


def load_all(out: Path) -> list[schema.Result]:
    """The stored results of a run's benches, in the order of the table."""
    paths = [out / f"{name}.json" for name in BENCHES]
    return [schema.load(path) for path in paths if path.exists()]


def summary(report: dict[str, Any], measured: list[schema.Result]) -> list[str]:
    """The lines: sections, failed findings, attention's grids, a line per bench."""
    versions = report["versions"]
    lines = [
        f"{report['device']['name']}  torch {versions['torch']}  commit {(report['revision'] or '?')[:10]}"
    ]
    for entry in report["sections"]:
        text = f"  {entry['name']:<19} {entry['status']:<8} {entry['seconds']:6.1f} s  {entry['detail']}"
        lines.append(text[:118])
    if report.get("disabled"):
        lines.append(f"  left out of every section, its probe failed: {report['disabled']}"[:118])
    failed = [f for entry in report["sections"] for f in entry["findings"] if f["status"] == "failed"]
    lines += [f"  ! {f['check']} {f.get('backend', '')}: {f['detail'][:100]}" for f in failed[:6]]
    for result in measured:
        if result["bench"] == "attention":
            lines += _grids(result)
    rest = [line for result in measured for line in _bench_line(result)]
    return [*lines, *(["  ours / best peer:"] if rest else []), *rest]


def _grids(measured: schema.Result) -> list[str]:
    lines = []
    for direction in ("forward", "backward"):
        cases = [case for case in measured["cases"] if case["group"] == direction]
        kinds = {(c["params"]["causal"], c["params"]["head_dim"]) for c in cases}
        for causal, dim in sorted(kinds, key=lambda kind: (kind[1], kind[0])):
            chosen = [c for c in cases if (c["params"]["causal"], c["params"]["head_dim"]) == (causal, dim)]
            chosen.sort(key=lambda case: int(case["params"]["seqlen_q"]))
            ours = [figures.best_ours(case) for case in chosen]
            cells = " ".join(f"{row['tflops']:4.0f}" if row else "   -" for row in ours)
            label = f"{direction:<8} {'causal' if causal else 'full':<6} d{dim:<3}"
            mean = _mean([ratio for _, ratio in _ratios(chosen)])
            lines.append(
                f"  {label} TFLOP/s {cells}  " + (f"{mean:.2f}x the best peer" if mean else "no ratio")
            )
    return lines


def _bench_line(result: schema.Result) -> list[str]:
    """Geometric mean over the best peer, the worst and the best case, targets met, and the rate that matters."""
    cases = [case for case in result["cases"] if case["group"] not in ("forward", "backward")]
    if not cases:
        return []
    if result["bench"] == "overhead":
        return _overhead_line(cases)
    ratios = sorted(_ratios(cases), key=lambda pair: pair[1])
    text = f"  {result['bench']:<14} {len(ratios)} of {len(cases)} cases"
    mean = _mean([ratio for _, ratio in ratios])
    if mean:
        (worst, least), (best, most) = ratios[0], ratios[-1]
        text += f", {mean:.2f}x; worst {least:.2f}x {worst}, best {most:.2f}x {best}"
    verdicts = [figures.verdict(case) for case in cases]
    aimed = [verdict for verdict in verdicts if verdict]
    text += f"; targets {aimed.count('met')}/{len(aimed)}" if aimed else ""
    return [text, *_rates(result, cases)]


def _rates(result: schema.Result, cases: list[schema.Result]) -> list[str]:
    """The best share of the copy where memory bounds the calls; of the data sheet's peak for a training step."""
    rows = [(case, figures.best_ours(case)) for case in cases]
    shares = [(row["ceiling_share"], case["name"]) for case, row in rows if row and row["gbps"]]
    lines = []
    if any(share for share, _ in shares):
        share, name = max((share or 0.0, name) for share, name in shares)
        lines.append(f"  {'':<14} {100 * share:.0f} % of the copy's bandwidth at best ({name})")
    peak = next((t for name, t in DATA_SHEET_TFLOPS.items() if name in result["device"]["name"]), None)
    for case, row in rows if result["bench"] == "train" else []:
        if row and row["tflops"] and case["group"] == "train":
            tokens = case["params"]["batch"] * case["params"]["seqlen"] / row["time_ms"]["median"] * 1e3
            mfu = f", MFU {100 * row['tflops'] / peak:.0f} % of {peak}" if peak else ""
            lines.append(
                f"  {'':<14} {case['name']}: {tokens:.0f} tokens/s, {row['tflops']:.3g} TFLOP/s{mfu}"
            )
    return lines


def _overhead_line(cases: list[schema.Result]) -> list[str]:
    """Microseconds of the host for our call, with the peer's in brackets."""
    cells = []
    for case in cases:
        ours = figures.host_us(figures.row_of(case, "fastattn"))
        theirs = figures.host_us(figures.best_peer(case))
        if ours and theirs:
            name = case["name"].replace("forward", "fwd").replace("backward", "bwd")
            number = figures.row_of(case, "fastattn").get("launches")  # type: ignore[union-attr]
            each = f", {ours / number:.1f} a launch" if number else ""
            cells.append(f"{name} {ours:.0f} ({theirs:.0f}{each})")
    return [f"  {'overhead, us':<14} " + ", ".join(cells[:4])]


def _ratios(cases: list[schema.Result]) -> list[tuple[str, float]]:
    found = []
    for case in cases:
        ratio = figures.speed_ratio(figures.best_ours(case), figures.best_peer(case))
        if ratio:
            found.append((case["name"], ratio))
    return found


def _mean(ratios: list[float]) -> float | None:
    return math.exp(sum(map(math.log, ratios)) / len(ratios)) if ratios else None
