"""`fastattn train TASK`: a task trained from files."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from fastattn.cli.command import INTERRUPTED, JsonFlag, print_json, stop
from fastattn.collector import paused
from fastattn.console import InputError

OVERRIDES = {"allow_extra_args": True, "ignore_unknown_options": True}  # of the command's settings


def train(
    context: typer.Context,
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="TASK [--SECTION.KEY=VALUE]...",
            help="causal-lm, masked-lm, classify, tag, qa, seq2seq, embed, chat or dpo; options of the sections train, "
            "task, data, clean, lora and, for a preset, model.",
        ),
    ] = None,
    train_data: Annotated[
        list[str] | None,
        typer.Option("--train", help="File or folder to train on, or hf:NAME; may be repeated."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Folder or hub repository of the model to start from, or a preset's name."),
    ] = None,
    out: Annotated[
        str | None, typer.Option(help="Folder for the trained model and the files of the run.")
    ] = None,
    dev: Annotated[
        list[str] | None,
        typer.Option(
            help="File or folder to select the best model by, may be repeated; else a part of the training data."
        ),
    ] = None,
    teacher: Annotated[str | None, typer.Option(help="Folder of a model to learn soft labels from.")] = None,
    resume: Annotated[
        str | None, typer.Option(help="auto, or the folder of a checkpoint, to continue from.")
    ] = None,
    config: Annotated[str | None, typer.Option(help="YAML file with the sections' options.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Train a model for a task: fastattn train classify --train FILE --model DIR --out DIR [--train.lr=1e-4].

    Without --dev a part of the training data is held out, and a line says so; training reads no test set. OUT is a
    folder for fastattn predict and transformers, with log.jsonl, run.yaml and report.json. Exits with 2 on bad input.
    """
    with paused():
        from fastattn.train import ConfigError, TrainingDiverged
        from fastattn.train import run as work
        from fastattn.train.progress import NoDisplay

    task, overrides = _split([*(words or ()), *context.args])
    try:
        work.task_named(task)
        if not train_data or model is None or out is None:
            missing = "--train" if not train_data else "--model" if model is None else "--out"
            raise InputError(f"{missing}: is missing")
        inputs = work.Inputs(
            task, tuple(train_data), tuple(dev or ()), model, out, teacher, resume, config, tuple(overrides)
        )
        report = work.train(inputs, display=NoDisplay() if as_json else None)
    except ConfigError as error:
        raise InputError(" ".join(str(error).split())) from None
    except TrainingDiverged as error:
        raise stop(str(error), 1) from None
    if os.environ.get("RANK", "0") != "0":
        pass  # the first process reports
    elif as_json:
        print_json(report)
    elif not report["interrupted"] and "metrics" in report:
        figures = ", ".join(f"{name} {value:.4f}" for name, value in report["metrics"].items())
        typer.echo(f"{report['out']}: {figures}")
    if report["interrupted"]:
        raise typer.Exit(INTERRUPTED)


def _split(words: list[str]) -> tuple[str, list[str]]:
    """The task and the overrides, each in one word; a value may also be the next word."""
    task: str | None = None
    overrides: list[str] = []
    rest = iter(words)
    for word in rest:
        if word.startswith("--"):
            if "=" not in word:
                value = next(rest, None)
                if value is None:
                    raise InputError(f"{word}: needs a value")
                word = f"{word}={value}"
            overrides.append(word)
        elif task is None:
            task = word
        else:
            raise InputError(f"{word!r}: is one word too many; repeat --train or --dev for each further file")
    if task is None:
        raise InputError("TASK: is missing")
    return task, overrides
