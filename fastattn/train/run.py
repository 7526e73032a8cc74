"""A task trained from files: the work of `fastattn train`."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping
from inspect import signature
from itertools import chain
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from fastattn.cache import write_atomically
from fastattn.data import DataError
from fastattn.models import GPT, families
from fastattn.models.checkpoint.hub import resolve_folder
from fastattn.models.peft import ADAPTER_CONFIG
from fastattn.models.pretrained import PretrainedEncoder
from fastattn.tasks import causal_lm, chat, classify, dpo, embed, masked_lm, qa, seq2seq, tag
from fastattn.tasks.samples import sample_of
from fastattn.tasks.training import learning_rate
from fastattn.train.adapters import attach_adapters
from fastattn.train.checkpoint import CURVE, OPTIONS, REPORT, RunDirectory
from fastattn.train.config import step_limit
from fastattn.train.corpus import Corpus, is_large
from fastattn.train.distributed import usable_device
from fastattn.train.end_of_run import best_model, draw_loss, evaluated, report_of
from fastattn.train.log import plain
from fastattn.train.needs import check_effect
from fastattn.train.optim import WARMUP
from fastattn.train.places import place_of
from fastattn.train.prepared import Inputs as Inputs
from fastattn.train.prepared import Prepared
from fastattn.train.progress import ProgressDisplay
from fastattn.train.same_run import check_same, describe
from fastattn.train.sections import ConfigError
from fastattn.train.task_config import Sections, kinds_of, presets_of, read_sections
from fastattn.train.task_data import check_columns, read_data
from fastattn.train.tokenizing import (
    Texts,
    check_fits,
    kind_of,
    learnt_tokenizer,
    saved_tokenizer,
    teacher_of,
    to_save,
)
from fastattn.train.trainer import Trainer

TASKS: dict[str, ModuleType] = {
    task.NAME: task for task in (causal_lm, masked_lm, classify, tag, qa, seq2seq, embed, chat, dpo)
}
EVALUATIONS = 5  # default number in a run of at most one epoch


def train(inputs: Inputs, *, display: ProgressDisplay | None = None) -> dict[str, Any]:
    """Train as the inputs say; returns the report, which is also in OUT/report.json.

    OUT holds the best model by the dev set in a folder that `fastattn predict`, `fastattn.models.load` and
    transformers read, checkpoints, log.jsonl, run.yaml (every option, for --config), report.json and, where matplotlib
    is installed, loss.png.

    Raises:
        ConfigError: an input cannot be used; raised before any training, except for what only a step shows.
        TrainingDiverged: see `Trainer.fit`.
    """
    prepared = prepare(inputs)
    try:
        return fit(prepared, display=display)
    except ValueError as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(" ".join(str(error).split())) from error


def prepare(inputs: Inputs) -> Prepared:
    """Read and check everything, cheap things first; nothing is written but the files of a large corpus."""
    try:
        return _prepare(inputs)
    except (TypeError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(" ".join(str(error).split())) from None


def fit(prepared: Prepared, *, display: ProgressDisplay | None = None) -> dict[str, Any]:
    """Train, keep the best model, evaluate it and write the report."""
    task, sections, data = prepared.task, prepared.sections, prepared.data
    started = time.monotonic()
    best = task.picked(data.options) if hasattr(task, "picked") else task.best(data.dev)

    def figures(model: nn.Module) -> Mapping[str, float]:
        found: Mapping[str, float] = evaluated(prepared, model).metrics
        return found

    options: dict[str, Any] = {}
    if best[0] != "loss":  # the trainer computes the loss itself
        options = {"evaluate_with": figures, "best": best}
    sample = sample_of(task)
    options["show_with"] = lambda model: sample(model, prepared.tokenizer, data.dev, data.options)
    trainer = Trainer(
        prepared.model,
        sections.train,
        prepared.train_set,
        prepared.dev_set,
        tokenizer=prepared.saved_tokenizer,
        display=display,
        inputs=prepared.about,
        where=place_of(prepared),
        **({"collate": prepared.train_set.collate} if hasattr(prepared.train_set, "collate") else {}),
        **options,
    )
    out = Path(prepared.inputs.out)
    for note in prepared.notes:
        trainer.display.note(f"WARNING: {note}")
    if data.held_out is not None:
        trainer.display.note(
            f"no --dev: {data.held_out} examples are held out of the training data, {len(data.train)} train"
            f" (seed {sections.train.seed})"
        )
    if data.folder is not None:
        trainer.display.note(f"data: in files in {data.folder}, for later runs of the same data too")
    for name, count in data.cleaning.items():
        trainer.display.note(f"clean.{name}: {count} examples")
    for name, cut in (("training", prepared.train_set), ("dev", prepared.dev_set)):
        if getattr(cut, "cut_rows", 0):
            trainer.display.note(
                f"{cut.cut_rows} {name} texts are longer than the model's limit: {cut.cut} tokens are cut"
            )
    if hasattr(task, "lost") and (lost := task.lost(prepared.tokenizer, data.train)):
        trainer.display.note(lost)
    result = trainer.fit()
    report = report_of(prepared, result, best)
    if result.interrupted:
        return report
    model = trainer.whole_model()
    if not trainer.distributed.is_main:
        return report
    model = best_model(prepared, model.to(trainer.device), out)
    found = evaluated(prepared, model)
    report.update(metrics=found.metrics, tables=found.tables, count=found.count)
    report["wall_seconds"] = time.monotonic() - started
    write_atomically(out / OPTIONS, sections.to_yaml())
    write_atomically(out / REPORT, json.dumps(plain(report), indent=2) + "\n")
    draw_loss(prepared, result, out / CURVE, trainer.display.note)
    return report


def task_named(name: str) -> ModuleType:
    """The task of that name; ConfigError with the nearest name otherwise."""
    if name not in TASKS:
        import difflib

        near = difflib.get_close_matches(name, TASKS, n=1)
        hint = f", did you mean {near[0]}?" if near else f", needs one of {', '.join(TASKS)}"
        raise ConfigError(f"TASK: got {name!r}{hint}")
    return TASKS[name]


def _prepare(inputs: Inputs) -> Prepared:
    task = task_named(inputs.task)
    if inputs.teacher is not None and not learns_from_teachers(task):
        able = ", ".join(name for name, each in TASKS.items() if learns_from_teachers(each))
        raise ConfigError(f"--teacher: the task {task.NAME} does not support it; {able} do")
    preset = _preset_of(inputs.model, task)
    sections = _sections(inputs, task, preset)
    check_effect(
        kinds_of(task, preset),
        sections,
        preset=preset,
        teacher=inputs.teacher,
        dev=bool(inputs.dev),
        decoder=GPT in task.MODELS,
        file=inputs.config,
        words=inputs.overrides,
    )
    directory = RunDirectory(inputs.out, resume=sections.train.resume, overwrite=sections.train.overwrite)
    if preset is None:
        _check_class(inputs.model, task)
    for option, folder in (
        ("--model", inputs.model if preset is None else None),
        ("--teacher", inputs.teacher),
    ):
        if (
            sections.train.overwrite
            and folder is not None
            and Path(folder).resolve() == Path(inputs.out).resolve()
        ):
            raise ConfigError(f"--out: {inputs.out} is the folder of {option}, which overwrite would delete")
    teacher = None if inputs.teacher is None else teacher_of(inputs.teacher, task)
    learns = sections.data.learnt or (preset is not None and sections.data.tokenizer is None)
    tokenizer = None if learns else saved_tokenizer(inputs.model, sections, task)
    corpus = _corpus(task, inputs, sections)
    data = read_data(task, inputs.train, inputs.dev, sections) if corpus is None else corpus.read()
    given = None if sections.data.tokenizer is None else tokenizer
    if tokenizer is None:

        def learn() -> Any:
            return learnt_tokenizer(task, sections.data, preset, Texts(data.train), directory.resume_from)

        if corpus is None or directory.resume_from is not None:
            tokenizer = learn()
        else:
            tokenizer = corpus.tokenizer(learn, kind_of(task).from_pretrained)
        given = tokenizer
    source: Any = sections.model if preset is not None else inputs.model
    if preset is None:
        check_fits(inputs.model, task, tokenizer, chain(Texts(data.train), Texts(data.dev)))
    torch.manual_seed(sections.train.seed)
    model = task.new_model(source, data.train, data.options, tokenizer)
    if getattr(task, "CHANGES_TOKENIZER", False):
        given = tokenizer
    if sections.lora.r is not None:
        attach_adapters(model, task, sections.lora)
    extra = {} if teacher is None else {"teacher": teacher}
    _move(task, sections, model, teacher)
    if corpus is None:
        train_set = task.training_set(model, tokenizer, data.train, data.options, **extra)
        dev_set = _dev_set(task, model, tokenizer, data.dev, data.options)
    else:

        def build(folder: Path, training: bool, reuse: bool) -> Any:
            if not training:
                return _dev_set(task, model, tokenizer, data.dev, data.options, folder, reuse=reuse)
            return task.training_set(model, tokenizer, data.train, data.options, folder, reuse=reuse, **extra)

        train_set, dev_set = corpus.sets(model, tokenizer, build)
    saved = to_save(task, data.options, preset, inputs.model, model, tokenizer, given)
    sections = _scheduled(inputs, task, preset, len(train_set), model)
    about = describe(task, sections, data, model, tokenizer, inputs.teacher)
    notes = () if directory.resume_from is None else tuple(check_same(directory.resume_from, about))
    return Prepared(task, inputs, sections, data, model, tokenizer, saved, train_set, dev_set, about, notes)


def _move(task: ModuleType, sections: Sections, model: nn.Module, teacher: tuple[Any, Any] | None) -> None:
    """Put a model that runs over the examples before training onto the device of the training."""
    moved = None
    if task is dpo and sections.train.sharding != "fsdp":  # there a device may not have room for all of it
        moved = model
    elif task is classify and teacher is not None:
        moved = teacher[0]
    if moved is not None:
        moved.to(usable_device(sections.train.device))


def _dev_set(task: ModuleType, *arguments: Any, **options: Any) -> Any:
    """The dev set as items; an error says that it is of the dev set."""
    try:
        return getattr(task, "dev_set", task.training_set)(*arguments, **options)
    except DataError as error:
        raise DataError(f"dev set: {error}") from None


def _corpus(task: ModuleType, inputs: Inputs, sections: Sections) -> Corpus | None:
    """The files of a language model's data; None where it is held in memory."""
    if task not in (causal_lm, masked_lm):
        if sections.data.cache is not None:
            raise ConfigError(f"data.cache: is for causal-lm and masked-lm, {task.NAME} holds its examples")
        return None
    if not is_large(inputs.train, inputs.dev, sections):
        return None
    check_columns(task, sections.data.mapping)
    return Corpus(task, inputs.train, inputs.dev, sections)


def learns_from_teachers(task: ModuleType) -> bool:
    """Whether the task supports a teacher."""
    return "teacher" in signature(task.training_set).parameters


def _sections(
    inputs: Inputs, task: ModuleType, preset: str | None, steps: Mapping[str, Any] | None = None
) -> Sections:
    # numbers of steps that hold until those of an epoch are known, as patience needs evaluations
    start = {"warmup_steps": 0, "eval_every": 1, "save_every": 1} if steps is None else steps
    defaults = {**task.DEFAULTS, **start, "output_dir": inputs.out}
    overrides = [*inputs.overrides, f"--train.output_dir={inputs.out}"]
    if inputs.resume is not None:
        overrides.append(f"--train.resume={inputs.resume}")
    return read_sections(task, preset=preset, file=inputs.config, overrides=overrides, defaults=defaults)


def _scheduled(inputs: Inputs, task: ModuleType, preset: str | None, examples: int, model: Any) -> Sections:
    """The sections with defaults that depend on steps and model: the rate, warmup, evaluations and checkpoints."""
    first = _sections(inputs, task, preset)
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    config = first.train
    epoch = max(1, math.ceil(examples / (config.batch_size * config.accumulate * world_size)))
    total = step_limit(config, examples, world_size)
    every = epoch if total is None or total > epoch else math.ceil(total / EVALUATIONS)
    steps: dict[str, Any] = {"eval_every": every, "save_every": every}
    if "lr" not in task.DEFAULTS:
        steps["lr"] = learning_rate(model.config.hidden_size)
    steps["warmup_steps"] = None  # a share of the run, whose steps nobody knows where time may end it
    if total is not None and config.max_seconds is None:
        steps["warmup_steps"] = round(WARMUP * total)
    return _sections(inputs, task, preset, steps)


def _preset_of(model: str, task: ModuleType) -> str | None:
    rows = presets_of(task)[1]
    if model in rows and not Path(model).is_dir():
        return model
    try:
        resolve_folder(model)
    except ValueError as error:
        text = " ".join(str(error).split()).removeprefix("pretrained model: ")
        raise ConfigError(f"--model: {text}; presets are {', '.join(rows)}") from None
    return None


def _check_class(model: str, task: ModuleType) -> None:
    """Raise ConfigError for a folder whose model is of another kind than the task's; no weight is read."""
    folder = resolve_folder(model)
    if (folder / ADAPTER_CONFIG).is_file() and not (folder / "config.json").is_file():
        raise ConfigError(f"--model: {model} holds an adapter; merge it into its model first")
    cls = families.class_for(folder)
    able: tuple[type, ...] = (GPT,) if GPT in task.MODELS else (PretrainedEncoder, *task.MODELS)
    if not issubclass(cls, able):
        need = "a decoder" if GPT in task.MODELS else "an encoder"
        raise ConfigError(f"--model: {model} holds a {cls.__name__}, {task.NAME} needs {need}")
