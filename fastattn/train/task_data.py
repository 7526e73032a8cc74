"""The examples of a task's run: read, cleaned, split, and checked against each other and the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from fastattn.data import DataError
from fastattn.data.cleaning import clean
from fastattn.data.records import Record, read_records, split_records, text_of
from fastattn.train.task_config import Sections


@dataclass(frozen=True)
class TaskData:
    """Checked examples, and what was done to get them.

    held_out: number of training examples that became the dev set, None where that has files of its own. cleaning: per
    step, the number of training examples that it changed or dropped. folder: where the files of a large corpus are.
    """

    train: Sequence[Any]
    dev: Sequence[Any]
    options: Any  # of the task, settled by the training examples
    held_out: int | None
    cleaning: dict[str, int] = field(default_factory=dict)
    folder: Path | None = None


def read_data(task: ModuleType, train: Sequence[str], dev: Sequence[str], sections: Sections) -> TaskData:
    """The examples of the training files, and of the dev files or held out of the training data.

    The dev set is never cleaned, so that metrics are of the original data.

    Raises:
        DataError: a file or an example cannot be used, or the training data lacks a label of the dev set; with file
            and line.
    """
    data, options = sections.data, sections.task
    check_columns(task, data.mapping)

    def records_of(paths: Sequence[str]) -> list[Record]:
        return read_records(list(paths), columns=data.mapping, format=data.format)

    records = records_of(train)
    if dev:
        dev_records = records_of(dev)
    elif len(records) == 1 and len(parts := _parts(task, records[0], data.dev_fraction)) == 2:
        records, dev_records = parts[:1], parts[1:]
    else:
        key = getattr(task, "group_of", None)
        try:
            records, dev_records = split_records(
                records, data.dev_fraction, seed=sections.train.seed, key=key
            )
        except DataError:
            task.examples_of(
                records, options
            )  # an error in a line is more useful than an error about equal lines
            raise
    counts: dict[str, int] = {}
    if sections.clean.on:
        names = getattr(task, "TEXTS", (*task.FIELDS, *task.OPTIONAL))
        records, counts = clean(records, sections.clean, names, editable=getattr(task, "EDITABLE", True))
    examples = task.examples_of(records, options)
    task.check_examples(examples)
    least = task.least_batch(examples) if hasattr(task, "least_batch") else 1
    if (size := sections.train.batch_size) < least:
        raise DataError(
            f"train.batch_size: got {size}, {task.NAME} needs at least {least} for these examples"
        )
    options = task.settled(options, examples) if hasattr(task, "settled") else options
    dev_examples = task.examples_of(dev_records, options)
    if dev:
        check_known(task, examples, dev_examples)
        return TaskData(examples, dev_examples, options, None, counts)
    # labels that only held-out examples have go back to training
    labels = set(task.labels_in(examples) or ())
    fits = [set(task.labels_in([example]) or ()) <= labels for example in dev_examples]
    needed = [example for example, fit in zip(dev_examples, fits) if not fit]
    dev_examples = [example for example, fit in zip(dev_examples, fits) if fit]
    if not dev_examples:
        raise DataError("data: has too few examples of each label to hold some out, needs --dev")
    return TaskData([*examples, *needed], dev_examples, options, len(dev_examples), counts)


def check_columns(task: ModuleType, mapping: Mapping[str, str]) -> None:
    """Refuse a column for a field that the task does not have."""
    fields = {*task.FIELDS, *task.OPTIONAL, *task.LABELS, *getattr(task, "EXTRA", ())}
    for name in mapping:
        if name not in fields:
            known = ", ".join(sorted(fields))
            raise DataError(f"data.columns: {name!r} is not a field of {task.NAME}, needs one of {known}")


def _parts(task: ModuleType, record: Record, fraction: float) -> list[Record]:
    """The only document of a language model's data, in two parts where it can be split."""
    if (*task.FIELDS, *task.LABELS) != ("text",):
        return [record]
    return split_document(record, fraction)


def check_known(task: ModuleType, train: Sequence[Any], dev: Sequence[Any]) -> None:
    """Refuse dev examples with a label that no training example has; the message names the first."""
    known = task.labels_in(train)
    if known is None:
        return
    for example in dev:
        for label in task.labels_in([example]) or ():
            if label not in known:
                raise DataError(f"{example.where}: label {label!r} is in no training example")


def texts_of(example: Any) -> list[str]:
    """Every text of an example but its label."""
    found = []
    for name, value in vars(example).items():
        if name in ("where", "label", "tags", "answers"):
            continue
        for each in [value] if isinstance(value, str) else value or ():
            text = each.get("content") if isinstance(each, dict) else each  # a message
            found += [text] if isinstance(text, str) else []
    return found


def split_document(record: Record, fraction: float) -> list[Record]:
    """A text's beginning, and its last `fraction` from the next line or else word on; the record alone where there is
    no such place."""
    text = text_of(record, "text")
    at = round((1 - fraction) * len(text))
    for mark in ("\n", " "):
        cut = text.find(mark, at) + 1 or text.rfind(mark, 0, at) + 1
        parts = text[:cut], text[cut:]
        if all(part.strip() for part in parts):
            return [Record(record.where, {**record.fields, "text": part}) for part in parts]
    return [record]
