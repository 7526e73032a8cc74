"""Figures of a stored case: rows, the best peer, ratios, whether the target is met, and a terminal table."""

# ruff: noqa: RUF001 - labels are typeset
from __future__ import annotations

import statistics
from typing import NamedTuple

import torch

from report.schema import Result, dtype_name

MOST_BARS = 60
OURS = "fastattn"  # prefix of the providers that are ours
FLOOR = "floor-"  # prefix of rows that are lower bounds, not providers
MEDIAN_SPEED = {"swap": 1.0}  # by bench: the least median of the speeds of all its cases


def row_of(case: Result, provider: str) -> Result | None:
    """The provider's row if it ran."""
    return next((r for r in case["rows"] if r["provider"] == provider and r["status"] == "ok"), None)


def best_ours(case: Result) -> Result | None:
    """Our fastest row."""
    rows = [r for r in case["rows"] if r["status"] == "ok" and r["provider"].startswith(OURS)]
    return min(rows, key=lambda r: r["time_ms"]["median"], default=None)


def ours_of(case: Result) -> Result | None:
    """Our row that is compared: the target's, else the call without a named backend, else our fastest."""
    target = case["target"]
    named = row_of(case, target["provider"]) if target else None
    return named or row_of(case, OURS) or best_ours(case)


def host_us(row: Result | None) -> float | None:
    """Microseconds of the host for a call; on a CPU the whole time."""
    if row is None or row["status"] != "ok":
        return None
    host = row.get("host_ms")
    return float(1e3 * (row["time_ms"]["median"] if host is None else host))


def host_text(row: Result | None) -> str:
    """`host_us` as text; where launches were counted, also their number and the time of each."""
    host = host_us(row)
    if row is None or not host:
        return "–"
    number = row.get("launches")
    return f"{host:.0f}" + (f" ({number} launches, {host / number:.1f} each)" if number else "")


def peer_of(case: Result) -> Result | None:
    """The row that ours is compared with: the target's, else the best peer's."""
    target = case["target"]
    named = row_of(case, target["against"]) if target and target["against"] else None
    return named or best_peer(case)


def best_peer(case: Result) -> Result | None:
    """The fastest row that is neither ours nor a floor (work that every provider has to do)."""
    others = [r for r in case["rows"] if not r["provider"].startswith((OURS, FLOOR))]
    peers = [r for r in others if r["status"] == "ok"]
    return min(peers, key=lambda r: r["time_ms"]["median"], default=None)


def speed_ratio(row: Result | None, peer: Result | None) -> float | None:
    """How many times faster `row` is than `peer`."""
    return peer["time_ms"]["median"] / row["time_ms"]["median"] if row and peer else None


def memory_ratio(row: Result | None, peer: Result | None) -> float | None:
    """Peak memory of `row` over that of `peer`."""
    if not row or not peer or row["peak_memory_mib"] is None or not peer["peak_memory_mib"]:
        return None
    return float(row["peak_memory_mib"] / peer["peak_memory_mib"])


def verdict(case: Result) -> str:
    """ "met", "missed (what)" or "" for a case without a target or where a part of it was not measured."""
    target = case["target"]
    if target is None:
        return ""
    ours, peer = (
        row_of(case, target["provider"]),
        row_of(case, target["against"]) if target["against"] else None,
    )
    missed = []
    if "speed" in target:
        ratio = speed_ratio(ours, peer)
        if ratio is None:
            return ""
        if ratio < target["speed"]:
            missed.append(f"{ratio:.2f}x of {target['speed']}x")
    if "time" in target:
        ratio = speed_ratio(peer, ours)
        if ratio is None:
            return ""
        if ratio > target["time"]:
            missed.append(f"{ratio:.2f}x of {target['time']}x the time")
    if "memory" in target:
        ratio = memory_ratio(ours, peer)
        if ratio is None and not missed:
            return ""
        if ratio is not None and ratio > target["memory"]:
            missed.append(f"{ratio:.2f} of {target['memory']} of the memory")
    if "extra_ms" in target:
        if ours is None:
            return ""
        if ours["time_ms"]["median"] > target["extra_ms"]:
            missed.append(f"{ours['time_ms']['median']:.0f} of {target['extra_ms']:.0f} ms")
    if "wrong" in target:
        if ours is None:
            return ""
        if ours["wrong"] > target["wrong"]:
            missed.append(f"{ours['wrong']} wrong of {target['wrong']}")
    return f"missed ({', '.join(missed)})" if missed else "met"


def goals(case: Result) -> list[str]:
    """The parts of the case's target."""
    target = case["target"] or {}
    words = {"speed": "≥ {}×", "time": "≤ {}× time", "memory": "≤ {} mem", "extra_ms": "≤ {:.0f} ms"}
    words["wrong"] = "≤ {} wrong"
    return [text.format(target[name]) for name, text in words.items() if name in target]


class MedianSpeed(NamedTuple):
    """The median speed of the measured cases of a result, and its target."""

    ratio: float
    measured: int
    target: float
    missing: list[str]  # names of the cases that could not be measured


def median_speed(result: Result) -> MedianSpeed | None:
    """The median of the cases' speeds; None for a bench without a target for it, or where nothing ran."""
    target = MEDIAN_SPEED.get(result["bench"])
    if target is None:
        return None
    speeds = {case["name"]: speed_ratio(ours_of(case), peer_of(case)) for case in result["cases"]}
    ran = [ratio for ratio in speeds.values() if ratio is not None]
    missing = [name for name, ratio in speeds.items() if ratio is None]
    return MedianSpeed(statistics.median(ran), len(ran), target, missing) if ran else None


def median_line(result: Result) -> str:
    """`median_speed` as a line of the terminal; empty where there is none."""
    found = median_speed(result)
    if found is None:
        return ""
    said = "met" if found.ratio >= found.target else "missed"
    missing = f"; not measured: {', '.join(found.missing)}" if found.missing else ""
    return f"median of {found.measured} cases  {found.ratio:.2f}x  target ≥ {found.target}×: {said}{missing}"


def case_lines(case: Result) -> list[str]:
    """The case as lines of a terminal table, one per provider."""
    lines = [f"{case['name']}  [{case['direction']}, {case['dtype']}]"]
    if case["target"] is not None:
        against = f" against {case['target']['against']}" if case["target"]["against"] else ""
        lines[0] += f"  target {', '.join(goals(case))}{against}: {verdict(case) or 'not measured'}"
    if "small_form_of" in case:
        lines[0] += f"  (the small form of {case['small_form_of']}: {case['label']})"
    peer = peer_of(case)
    for row in case["rows"]:
        if row["status"] != "ok":
            lines.append(f"  {row['provider']:<18} {row['status']}: {row['reason']}")
            continue
        ratio = speed_ratio(row, peer)
        spread = row["time_ms"]
        parts = [
            f"{spread['median']:10.3f} ms [{spread['p20']:.3f}, {spread['p80']:.3f}]",
            f"{ratio:6.2f}x" if ratio else "",
            f"{row['tflops']:8.3f} TFLOP/s" if row["tflops"] else "",
            f"{row['gbps']:8.1f} GB/s" if row.get("gbps") else "",
            f"{100 * row['ceiling_share']:3.0f}% of ceiling" if row["ceiling_share"] else "",
            f"{row['peak_memory_mib']:8.1f} MiB" if row["peak_memory_mib"] is not None else "",
            f"error {max(row['error'].values()):.1e}" + ("" if row["within_rule"] else " (over the rule)")
            if row["error"]
            else "",
        ]
        lines.append(f"  {row['provider']:<18} " + "  ".join(part for part in parts if part))
    return lines


def target(speed: float, against: str, provider: str = "fastattn", *, memory: float | None = None) -> Result:
    """The target of a case: the least speed over the peer `against`, and the greatest share of its peak memory."""
    goal: Result = {"provider": provider, "against": against, "speed": speed}
    return goal if memory is None else {**goal, "memory": memory}


def sizes(case: object, *names: str) -> Result:
    """These fields of a case, except zero, empty or None ones: the params of its result."""
    return {name: value for name in names if (value := getattr(case, name))}


def unusual(dtype: torch.dtype, direction: str) -> list[str]:
    """The suffix of a label: a dtype other than float32, a direction other than forward and backward."""
    words = [] if dtype == torch.float32 else [dtype_name(dtype)]
    return words if direction == "forward+backward" else [*words, direction]


def describe_attention(params: Result, dtype: str, direction: str) -> str:
    """A call of attention in words: shape, mask, features, and a dtype or direction other than the default."""
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
    if dtype != "float32":
        parts.append(dtype)
    if direction != "forward+backward":
        parts.append(direction)
    return f"{shape} " + ", ".join(parts or ["full"])


def least_speed(case: Result) -> float | None:
    """The speed that the case's target asks for."""
    target = case["target"] or {}
    return 1 / target["time"] if "time" in target else target.get("speed")


def chart_names(result: Result) -> list[str]:
    """The charts a result has cases for: the grids of attention, speed over size, ratios to the peer."""
    names = [
        name for name in ("forward", "backward") if result["bench"] == "attention" and group_of(result, name)
    ]
    names += ["length"] if lines_of(result) else []
    names += ["ratio"] if ratios_of(result) else []
    return names


def group_of(result: Result, name: str) -> list[Result]:
    """The cases of a group."""
    return [case for case in result["cases"] if case["group"] == name]


def lines_of(result: Result) -> dict[str, list[Result]]:
    """The cases of each line of a chart over size, by rising size; a line has two sizes at least."""
    found: dict[str, list[Result]] = {}
    for case in result["cases"]:
        if case.get("axis") and any(row["status"] == "ok" for row in case["rows"]):
            line = case["axis"]["line"]
            other = case["dtype"] != "float32" and case["dtype"] not in line
            found.setdefault(f"{line}, {case['dtype']}" if other else line, []).append(case)
    several = {line: cases for line, cases in found.items() if len({c["axis"]["value"] for c in cases}) > 1}
    return {line: sorted(cases, key=lambda c: float(c["axis"]["value"])) for line, cases in several.items()}


def ratios_of(result: Result) -> list[tuple[str, float, float | None]]:
    """(case, times the peer's speed, target) of the cases that have both; the grids of attention have their own."""
    found = []
    for case in result["cases"]:
        if case["direction"] == "import" or case["group"] in ("forward", "backward"):
            continue
        ours, peer = ours_of(case), peer_of(case)
        ratio = speed_ratio(ours, peer)
        if ratio and peer:
            label = f"{case['label']}  (peer: {peer['provider']})"
            found.append((label, ratio, least_speed(case)))
    return found[:MOST_BARS]
