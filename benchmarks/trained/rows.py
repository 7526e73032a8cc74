"""What a row of docs/results.md is made of: `fastattn` commands on real data, and what stands beside their models.

In the words of a step {data}, {encoder}, {files} and {out} are folders, {seconds:0.5} is a share of the row's time
and {precision} is bfloat16 where the machine multiplies in it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

SEEDS = (0, 1, 2)
QUICK_ENCODER = (
    "--model.hidden_size=32",
    "--model.num_hidden_layers=1",
    "--model.num_attention_heads=2",
    "--model.intermediate_size=64",
)
QUICK_DECODER = ("--model.n_embd=32", "--model.n_layer=1", "--model.n_head=2")
QUICK_TRAIN = ("--train.max_steps=2", "--train.batch_size=4")


@dataclass(frozen=True)
class Step:
    """One command of a row.

    Args:
        name: what its line of the page is called; steps of one name share a line: a model's training and its figures.
        kind: "train" and "evaluate" of `fastattn`, "peer" of transformers' Trainer, "stops" of generated answers.
        words: of the command, behind its name.
        seed: of the run, None where it has none.
        preset: the kind of model with random weights, "encoder" or "decoder", which a quick run makes smaller.
        figures: prefix of this step's figures, where a line has those of several.
    """

    name: str
    kind: str
    words: tuple[str, ...]
    seed: int | None = None
    preset: str | None = None
    figures: str = ""


@dataclass(frozen=True)
class Goal:
    """What a figure of a line is to reach: at least or at most `value`."""

    line: str
    figure: str
    value: float
    least: bool = True


@dataclass(frozen=True)
class TaskRow:
    """A named run.

    Args:
        name: of the command and the page's section.
        title: what it shows.
        minutes: its time where the command gives none; steps that are limited by time take shares of it.
        prepare: writes what is made of the data folder, (data, files).
        steps: in their order, so that a run cut short has whole lines first.
        shown: the figures of the page's table, in their order.
        goals: what they are held against.
        note: said under the table.
    """

    name: str
    title: str
    minutes: float
    prepare: Callable[[Path, Path], None]
    steps: tuple[Step, ...]
    shown: tuple[str, ...]
    goals: tuple[Goal, ...] = ()
    note: str = ""


def train(
    name: str, task: str, *words: str, seed: int | None = 0, out: str = "", preset: str | None = None
) -> Step:
    """A step that trains into {out}/OUT."""
    seeded = () if seed is None else (f"--train.seed={seed}",)
    folder = ("--out", f"{{out}}/{out or name.replace(' ', '-')}")
    return Step(name, "train", ("train", task, *words, *folder, *seeded), seed, preset)


def evaluate(name: str, *words: str, out: str = "", figures: str = "") -> Step:
    """A step that evaluates {out}/OUT."""
    folder = f"{{out}}/{out or name.replace(' ', '-')}"
    return Step(name, "evaluate", ("evaluate", folder, *words, "--json"), figures=figures)


def peer(name: str, task: str, like: str, out: str, seed: int = 0) -> Step:
    """A step in which transformers' Trainer trains as {out}/LIKE was: its data, rate, batches and number of steps."""
    return Step(name, "peer", (task, "--like", f"{{out}}/{like}", "--out", f"{{out}}/{out}"), seed)


def with_peers(
    task: str, words: Sequence[str], tests: Sequence[str], seeds: Sequence[int], preset: str | None = None
) -> tuple[Step, ...]:
    """For each seed our run, its figures on the test set, the peer's run and its figures; preset as of `Step`."""
    steps: list[Step] = []
    for seed in seeds:
        ours, theirs = f"seed {seed}", f"transformers, seed {seed}"
        steps += [
            train(ours, task, *words, seed=seed, preset=preset),
            evaluate(ours, *(tests if seed == seeds[0] else _without_baselines(tests))),
            peer(theirs, task, f"seed-{seed}", f"transformers-{seed}", seed),
            evaluate(theirs, *_without_baselines(tests), out=f"transformers-{seed}"),
        ]
    return tuple(steps)


def _without_baselines(words: Sequence[str]) -> list[str]:
    kept, rest = [], iter(words)
    for word in rest:
        if word in ("--baseline", "--train"):
            next(rest)
        else:
            kept.append(word)
    return kept
