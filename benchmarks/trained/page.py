"""docs/results.md, written from the stored records of `benchmarks/tasks.py`; no figure in it is typed by hand."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from report import schema
from report.schema import Result
from trained.recipes import ROWS
from trained.rows import Goal, TaskRow

STORED = schema.RESULTS / "tasks"
PAGE = Path("docs") / "results.md"
PEER = "transformers, "
HEAD = """\
# Results

What models reach that `fastattn train` trained on real data, written from the records of their runs by
`python benchmarks/tasks.py --page`. Every section is one command:

```bash
python benchmarks/tasks.py NAME --data DATA --encoder ENCODER --out OUT --minutes M
```

It runs the commands that its section lists, in which `RUN` is `OUT/NAME`. `DATA` is a folder with `lm/`, `classify/`,
`ner/`, `qa/`, `summarise/` and `translate/`, data sets in the formats of [training](training.md#data), and `ENCODER` is
the folder of all-MiniLM-L6-v2. Neither comes with fastattn. Settings are fixed from the training data alone: the best
model is picked by a part of it, or by the dev part that a set comes with, never by a test set. Figures of a test set
are those of `fastattn evaluate` ([their definitions](evaluation.md#metrics)); shares are within [0, 1]. A line that
begins with "transformers" has the same start, data, rate, batches and number of steps in transformers' Trainer. Time is
that of training with its evaluations. A run that was cut short says so and shows what there was; `--resume` goes on
with it.
"""
NAMES = {
    "ece": "calibration error", "macro_f1": "macro F1", "f1": "F1", "exact_match": "exact match", "bleu": "BLEU",
    "chrf": "chrF", "rouge1": "ROUGE-1", "rougeL": "ROUGE-L", "loss": "loss, nats", "bits_per_byte": "bits per byte",
    "end_accuracy": "end accuracy", "next_sentence_accuracy": "next-sentence accuracy",
}  # fmt: skip
COSTS = ("time", "steps", "tokens", "peak memory")


def update(root: Path = schema.ROOT, stored: Path | None = None) -> list[str]:
    """Rewrite the page and its charts; the names of what was written."""
    stored = stored or STORED
    records = load(stored)
    written = [str(PAGE)]
    for name, record in records.items():
        if chart := draw(record, stored / f"{name}.svg"):
            written.append(chart.name)
    schema.replace_file(root / PAGE, page(records, stored))
    return written


def load(stored: Path | None = None) -> dict[str, Result]:
    """The stored records by row, in the order of the page."""
    paths = {name: (stored or STORED) / f"{name}.json" for name in ROWS}
    return {name: json.loads(p.read_text(encoding="utf-8")) for name, p in paths.items() if p.is_file()}


def page(records: dict[str, Result], stored: Path | None = None) -> str:
    """The whole page."""
    parts = [HEAD, summary(records)]
    for name, record in records.items():
        chart = (stored or STORED) / f"{name}.svg"
        parts.append(section(ROWS[name], record, chart.is_file()))
    missing = [name for name in ROWS if name not in records]
    if missing:
        parts.append(
            "## Not run yet\n\n" + "\n".join(f"- `{name}`: {ROWS[name].title}" for name in missing) + "\n"
        )
    return "\n".join(parts)


def summary(records: dict[str, Result]) -> str:
    """A table of every goal, reached or not."""
    lines = ["| run | figure | goal | reached |", "|---|---|---|---|"]
    for name, record in records.items():
        for goal in ROWS[name].goals:
            value = _figure_of(record, goal)
            reached = (
                "not measured"
                if value is None
                else f"{_number(value)}{'' if holds(goal, value) else ' (missed)'}"
            )
            figure = f"{goal.line}: {NAMES.get(goal.figure, goal.figure)}"
            lines.append(f"| [{name}](#{name}) | {figure} | {_goal(goal)} | {reached} |")
    return "\n".join(lines) + "\n" if len(lines) > 2 else ""


def holds(goal: Goal, value: float) -> bool:
    """Whether a figure reaches its goal."""
    return value >= goal.value if goal.least else value <= goal.value


def section(row: TaskRow, record: Result, chart: bool) -> str:
    """A row's section: its figures, what is beside them, where and when, and its commands."""
    parts = [f"## {row.name}", f"{row.title}.", "\n".join(table(row, record))]
    if compared := comparison(row, record):
        parts.append(compared)
    if chart:
        parts.append(f"![Validation loss of {row.name}](../benchmarks/results/tasks/{row.name}.svg)")
    parts += [text for text in (row.note, _cuts(record), _about(record)) if text]
    commands = [record["command"], *(step["command"] for step in record["steps"])]
    parts.append("```bash\n" + "\n".join([commands[0], "", *commands[1:]]) + "\n```")
    return "\n\n".join(parts) + "\n"


def lines_of(record: Result) -> dict[str, Result]:
    """The steps of each line of the table as one: the figures of all, the costs of its training."""
    lines: dict[str, Result] = {}
    for step in record["steps"]:
        line = lines.setdefault(step["name"], {"metrics": {}, "baselines": {}, "cut": False})
        line["metrics"] |= step.get("metrics", {})
        line["baselines"] |= step.get("baselines", {})
        if step["kind"] in ("train", "peer"):
            line |= {k: step[k] for k in ("train_seconds", "steps", "tokens", "peak_memory") if k in step}
            line["cut"] = step["status"] == "cut"
    return lines


def table(row: TaskRow, record: Result) -> list[str]:
    """The table of a row: a line for each model, means of several seeds, and the simple methods beside."""
    heads = [NAMES.get(name, name.replace("_", " ")) for name in row.shown]
    made = [f"| | {' | '.join([*heads, *COSTS])} |", "|---" * (1 + len(heads) + len(COSTS)) + "|"]
    lines = lines_of(record)
    for name, line in lines.items():
        label = f"{name} (cut short)" if line["cut"] else name
        made.append(_line(label, [_number(line["metrics"].get(f)) for f in row.shown], _costs(line)))
    for prefix in ("", PEER):
        seeds = _seeds(lines, prefix)
        if len(seeds) > 1:
            cells = [_spread([s["metrics"].get(f) for s in seeds]) for f in row.shown]
            made.append(
                _line(f"{prefix}mean of {len(seeds)} seeds ± standard deviation", cells, [""] * len(COSTS))
            )
    for name, line in lines.items():
        for method, found in line["baselines"].items():
            label = method if len([x for x in lines.values() if x["baselines"]]) == 1 else f"{method}, {name}"
            made.append(_line(label, [_number(found.get(f)) for f in row.shown], [""] * len(COSTS)))
    return made


def comparison(row: TaskRow, record: Result) -> str:
    """Ours beside transformers' Trainer in a sentence; empty where one of them has no figures or was cut short."""
    lines = lines_of(record)
    pairs = [(lines[name.removeprefix(PEER)], peer) for name, peer in lines.items() if name.startswith(PEER)]
    figure = row.shown[0]
    pairs = [p for p in pairs if all(figure in each["metrics"] and not each["cut"] for each in p)]
    if not pairs:
        return ""
    ours, theirs = ([pair[i]["metrics"][figure] for pair in pairs] for i in (0, 1))
    ratio = statistics.median(a["train_seconds"] / b["train_seconds"] for a, b in pairs)
    name = NAMES.get(figure, figure)
    return (
        f"{name} of {len(pairs)} {'pair' if len(pairs) == 1 else 'pairs'} of runs with equal steps: ours "
        f"{_spread(ours)}, transformers' Trainer {_spread(theirs)}, in {ratio:.2f} times its time."
    )


def _seeds(lines: dict[str, Result], prefix: str) -> list[Result]:
    names = [name for name in lines if name.startswith(f"{prefix}seed ")]
    return [lines[name] for name in names if lines[name]["metrics"] and not lines[name]["cut"]]


def _figure_of(record: Result, goal: Goal) -> float | None:
    value = lines_of(record).get(goal.line, {"metrics": {}})["metrics"].get(goal.figure)
    return None if value is None else float(value)


def _goal(goal: Goal) -> str:
    return f"at {'least' if goal.least else 'most'} {goal.value:g}"


def _line(name: str, *cells: Sequence[str]) -> str:
    return f"| {' | '.join([name, *(cell for group in cells for cell in group)])} |"


def _costs(line: Result) -> list[str]:
    seconds, steps, tokens = (line.get(key) for key in ("train_seconds", "steps", "tokens"))
    memory = line.get("peak_memory")
    return [
        "" if seconds is None else f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.1f} min",
        "" if steps is None else f"{steps:,}",
        "" if tokens is None else f"{tokens / 1e6:.2f} M",
        "" if memory is None else f"{memory / 1e9:.2f} GB",
    ]


def _number(value: Any) -> str:
    return "" if value is None else f"{value:.2f}" if abs(value) >= 10 else f"{value:.4f}"


def _spread(values: Sequence[Any]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return ""
    mean = _number(statistics.mean(known))
    return mean if len(known) == 1 else f"{mean} ± {_number(statistics.stdev(known))}"


def _cuts(record: Result) -> str:
    """What of a row did not end by itself."""
    said = []
    for step in record["steps"]:
        if step["status"] != "done":
            reason = step.get("reason", "the run ended")
            at = f" after {step['steps']:,} steps" if step["status"] == "cut" and step.get("steps") else ""
            said.append(f"{step['name']} ({step['kind']}) was {step['status']}{at}: {reason}")
        if "note" in step:
            said.append(f"{step['name']}: {step['note']}")
    left = record["planned"] - len(record["steps"])
    if left > 0:
        said.append(f"{left} further step{' was' if left == 1 else 's were'} not begun")
    if not said:
        return ""
    minutes = record["minutes"] + sum(each["minutes"] for each in record.get("continued", []))
    return f"**This run was cut short** at {minutes:g} minutes: {'; '.join(said)}."


def _about(record: Result) -> str:
    """Machine, versions, date and commit."""
    device = record["device"]
    versions = ", ".join(
        f"{k} {v}" for k, v in record["versions"].items() if v and k not in ("platform", "fastattn")
    )
    threads = f"{device['threads']} thread{'' if device['threads'] == 1 else 's'}"
    beside = f" {record['conditions']}" if record.get("conditions") else ""
    continued = "".join(
        f" Continued on {each['date'][:10]} after step {each['after']}, commit {_commit(each)}, "
        f"on {each['device']['name']}. {each['conditions']}".rstrip()
        for each in record.get("continued", [])
    )
    return (
        f"{device['name']}, {threads}; {versions}; {record['date'][:10]}, commit {_commit(record)}, "
        f"{record['seconds'] / 60:.0f} minutes in all.{beside}{continued}"
    )


def _commit(record: Result) -> str:
    return (record["revision"] or "?")[:10] + ("+" if record["dirty"] else "")


def draw(record: Result, path: Path) -> Path | None:
    """Validation loss over the minutes of training, a curve for each run that was evaluated three times; the file."""
    curves = {
        step["name"]: [(p["seconds"] / 60, p["loss"]) for p in step.get("curve", []) if "seconds" in p]
        for step in record["steps"]
        if step["kind"] == "train"
    }
    curves = {name: points for name, points in curves.items() if len(points) > 2}
    if not curves:
        return None
    from fastattn import plot

    if not plot.is_available():
        return None
    path.parent.mkdir(parents=True, exist_ok=True)
    with plot.style():
        figure = plot.new_figure(7.0, 3.6)
        axes = figure.subplots()
        for name, points in curves.items():
            axes.plot(*zip(*points), label=name, linewidth=1.2)
        losses = sorted(loss for points in curves.values() for _, loss in points)
        axes.set_ylim(losses[0] * 0.95, losses[int(0.9 * (len(losses) - 1))] * 1.15)
        axes.set_xlabel("minutes of training")
        axes.set_ylabel("validation loss, nats")
        axes.legend(fontsize=7)
        plot.save(figure, path)
    return path
