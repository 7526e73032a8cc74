"""What the checkpoints of `fastattn train` say of the run's inputs, and its check when a run resumes from one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

from fastattn.train.resume import inputs_of
from fastattn.train.sections import ConfigError
from fastattn.train.task_config import Sections
from fastattn.train.task_data import TaskData

SAMPLED = 4096  # documents of a large corpus whose text counts in its digest


def describe(
    task: ModuleType, sections: Sections, data: TaskData, model: Any, tokenizer: Any, teacher: str | None
) -> dict[str, Any]:
    """What decides the meaning of a run's weights and of its examples, in JSON's types.

    Keys: task; labels, of the model's outputs, or None; tokens, train and dev, digests of the tokenizer's vocabulary
    and of the examples without their places in files; options, by section, besides those of `TrainConfig`.
    """
    names = getattr(model.config, "id2label", None)
    large = data.folder is not None
    options = {
        "task": asdict(sections.task),
        "lora": asdict(sections.lora),
        "model": {} if sections.model is None else sections.model.to_dict(),
        "": {"--teacher": teacher},
    }
    found: dict[str, Any] = {
        "task": task.NAME,
        "labels": None if names is None else list(names.values()),
        "tokens": _digest(sorted(tokenizer.core.get_vocab(with_added_tokens=True).items())),
        "train": digest(data.train, large=large),
        "dev": digest(data.dev, large=large),
        "options": options,
    }
    plain: dict[str, Any] = json.loads(json.dumps(found, default=str))
    return plain


def check_same(folder: Path, here: Mapping[str, Any]) -> list[str]:
    """Refuse a checkpoint of another task, or of other labels, tokens or training examples.

    Returns a line for each option that differs, and for another dev set. A checkpoint that says nothing of its inputs
    passes.

    Raises:
        ConfigError: they differ; the message names what.
    """
    before = inputs_of(folder)
    for name, what in (("task", "TASK"), ("labels", "labels")):
        if name in before and before[name] != here[name]:
            raise ConfigError(f"{what}: {folder} was trained with {before[name]}, this run has {here[name]}")
    for name, what, kind in (("tokens", "tokenizer", "tokens"), ("train", "--train", "examples")):
        if name in before and before[name] != here[name]:
            raise ConfigError(
                f"{what}: {folder} was trained with other {kind} than this run's; a run resumes with the same ones, "
                f"and a new run may start from its model"
            )
    notes = []
    for section, options in here["options"].items():
        earlier = before.get("options", {}).get(section, {})
        for key, value in options.items():
            if key in earlier and earlier[key] != value:
                name = f"{section}.{key}" if section else key
                notes.append(f"{name}: {folder} was trained with {earlier[key]}, this run has {value}")
    if before.get("dev", here["dev"]) != here["dev"]:
        notes.append(f"--dev: {folder} was evaluated on other examples, to which earlier figures belong")
    return notes


def digest(examples: Any, *, large: bool) -> str:
    """Of the examples in their order, or of a large corpus of evenly spaced ones, and of their number."""
    step = max(1, len(examples) // SAMPLED) if large else 1
    some = (examples[i] for i in range(0, len(examples), step))
    contents = ({name: value for name, value in vars(each).items() if name != "where"} for each in some)
    return _digest([len(examples)], contents)


def _digest(*parts: Iterable[Any]) -> str:
    found = hashlib.sha256()
    for part in parts:
        for each in part:
            found.update(repr(each).encode("utf-8", "surrogatepass") + b"\n")
    return found.hexdigest()
