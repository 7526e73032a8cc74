"""Predictions with a model's folder, whose head decides the task: the work of `fastattn predict`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from fastattn.console import InputError, check_folder, is_unicode
from fastattn.data import DataError, json_lines
from fastattn.data.encoding import InputTokenizer
from fastattn.models import BertForEmbedding, families
from fastattn.tasks import classify, embed, fill, qa, tag

TASKS: tuple[ModuleType, ...] = (classify, tag, qa, fill, embed)


def task_of(folder: Path) -> ModuleType:
    """The task of a folder's head; no weight is read. InputError for any other folder."""
    check_folder(folder)
    try:
        cls = families.class_for(folder)
    except ValueError as error:
        raise InputError(str(error)) from None
    for task in TASKS:
        if cls in task.MODELS:
            return task
    raise InputError(f"{folder}: holds a {cls.__name__}, needs `fastattn generate`")


def load_folder(folder: Path, task: ModuleType) -> tuple[Any, InputTokenizer]:
    """The model, on a GPU where there is one, and its tokenizer, which is read first."""
    import torch

    try:
        tokenizer = _tokenizer_of(folder)
        model: Any = BertForEmbedding.from_pretrained(folder) if task is embed else families.load(folder)
        tokenizer = tokenizer or InputTokenizer.from_pretrained(model.loaded_from)
    except (DataError, ValueError) as error:
        raise InputError(str(error)) from None
    if torch.cuda.is_available():
        model = model.to("cuda")
    return model, tokenizer


def check_options(task: ModuleType, options: dict[str, Any]) -> dict[str, Any]:
    """The given options, for `task.predict`; InputError for one that the task does not have."""
    given = {name: value for name, value in options.items() if value is not None}
    known = task.predict.__kwdefaults__
    for name in given:
        if name not in known:
            able = " or ".join(t.NAME for t in TASKS if name in t.predict.__kwdefaults__)
            raise InputError(
                f"--{name.replace('_', '-')}: is not an option of the task {task.NAME}, needs a folder for {able}"
            )
    return given


def examples_of(task: ModuleType, data: Path | None, standard_input: str | None) -> list[dict[str, str]]:
    """The examples of a JSONL file, or of standard input: a line each, with a tab between the task's fields."""
    if data is not None:
        return list(_entries(task, data))
    examples = list(_lines(task, standard_input or ""))
    if not examples:
        raise InputError("standard input: got no text, needs an example in each line")
    return examples


def predictions_of(
    task: ModuleType,
    model: Any,
    tokenizer: InputTokenizer,
    examples: Sequence[dict[str, str]],
    options: dict[str, Any],
) -> list[dict[str, Any]]:
    """The predictions of `task.predict`; InputError for an invalid example."""
    try:
        found: list[dict[str, Any]] = task.predict(model, tokenizer, examples, **options)
    except ValueError as error:
        raise InputError(str(error)) from None
    return found


def _tokenizer_of(folder: Path) -> InputTokenizer | None:
    """The tokenizer of the model's folder; None if the folder has none and its base model's folder must have it."""
    if not (folder / "config.json").is_file():
        return None
    return InputTokenizer.from_pretrained(folder)


def _lines(task: ModuleType, text: str) -> Iterator[dict[str, str]]:
    for number, line in enumerate(text.removesuffix("\n").split("\n") if text else [], 1):
        where = f"standard input: line {number}"
        fields = line.removesuffix("\r").split("\t") if len(task.FIELDS) > 1 else [line.removesuffix("\r")]
        if len(fields) != len(task.FIELDS):
            raise InputError(f"{where} needs {' and '.join(task.FIELDS)} with a tab between them")
        yield {name: _checked(where, name, value) for name, value in zip(task.FIELDS, fields)}


def _entries(task: ModuleType, path: Path) -> Iterator[dict[str, str]]:
    try:
        for where, entry in json_lines.objects_of(path, json_lines.MAX_BYTES):
            wanted = [*task.FIELDS, *(name for name in task.OPTIONAL if name in entry)]
            yield {name: _checked(f"--data {where}", name, entry.get(name)) for name in wanted}
    except DataError as error:
        raise InputError(f"--data {error}") from None


def _checked(where: str, name: str, value: object) -> str:
    if not isinstance(value, str) or not value.strip():
        raise InputError(f'{where} has no text under "{name}"')
    if not is_unicode(value):
        raise InputError(f'{where} has characters under "{name}" that are not valid Unicode')
    return value
