"""The examples of a task's run: read, cleaned, split, and checked against each other and the model."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import compress, islice
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from fastattn.data import DataError
from fastattn.data.cleaning import Cleaner
from fastattn.data.records import (
    Record,
    contents,
    groups_of,
    held_out,
    rank_of,
    read_records,
)
from fastattn.train.task_config import Sections


@dataclass(frozen=True)
class TaskData:
    """Checked examples, and what was done to get them.

    held_out: number of examples of a dev set that is held out of the training data, one of which may be the end of a
    document, see `split_texts`; None where it has files of its own. cleaning: per step, the number of training examples
    that it changed, or of examples that it dropped. folder: where the files of a large corpus are.
    """

    train: Sequence[Any]
    dev: Sequence[Any]
    options: Any  # of the task, settled by the training files
    held_out: int | None
    cleaning: dict[str, int] = field(default_factory=dict)
    folder: Path | None = None


def read_data(task: ModuleType, train: Sequence[str], dev: Sequence[str], sections: Sections) -> TaskData:
    """The examples of the training files, and of the dev files or held out of the training data.

    Texts of the dev set are never changed, so that metrics are of the original data. Where it is held out, lengths and
    the choice are by the texts as cleaning makes them, and no training example is a duplicate of a held-out one by
    `clean.exact_duplicates` or `clean.near_duplicates`.

    Raises:
        DataError: a file or an example cannot be used, or the training data lacks a label of the dev set; with file
            and line.
    """
    data, options = sections.data, sections.task
    check_columns(task, data.mapping)

    def records_of(paths: Sequence[str]) -> list[Record]:
        return read_records(list(paths), columns=data.mapping, format=data.format)

    records = records_of(train)
    options = task.settled(options, records) if hasattr(task, "settled") else options
    cleaner = cleaner_of(task, sections)
    if dev:
        records, dev_records = list(cleaner.kept(records)), records_of(dev)
        cleaner.check_some_left(len(records))
        examples, dev_examples = (task.examples_of(part, options) for part in (records, dev_records))
    else:
        records, dev_records = _divided(task, records, sections, cleaner)
        examples, dev_examples = _examples_apart(task, records, dev_records, options, cleaner)
    task.check_examples(examples)
    least = task.least_batch(examples) if hasattr(task, "least_batch") else 1
    if (size := sections.train.batch_size) < least:
        raise DataError(
            f"train.batch_size: got {size}, {task.NAME} needs at least {least} for these examples"
        )
    check_documents(task, options, examples, dev_examples)
    if dev:
        check_known(task, examples, dev_examples)
    return TaskData(examples, dev_examples, options, None if dev else len(dev_examples), cleaner.counts)


def cleaner_of(task: ModuleType, sections: Sections) -> Cleaner:
    """The cleaning of a task's records."""
    editable = getattr(task, "EDITABLE", True)
    return Cleaner(sections.clean, texts_in(task), compared=compared_in(task), editable=editable)


def least_documents(task: ModuleType, options: Any) -> int:
    """The fewest documents that the training set and the dev set must have."""
    return int(task.least_documents(options)) if hasattr(task, "least_documents") else 1


def check_documents(task: ModuleType, options: Any, train: Sequence[Any], dev: Sequence[Any]) -> None:
    """Refuse sets with fewer documents than the task needs; the message names the set."""
    least = least_documents(task, options)
    for name, examples in (("--train", train), ("--dev", dev)):
        if len(examples) < least:
            some = f"{len(examples)} document{'s' * (len(examples) != 1)}"
            raise DataError(f"{name}: holds {some}, next_sentence needs at least {least}")


def texts_in(task: ModuleType) -> tuple[str, ...]:
    """The fields that hold a task's texts."""
    return tuple(getattr(task, "TEXTS", (*task.FIELDS, *task.OPTIONAL)))


def compared_in(task: ModuleType) -> tuple[str, ...]:
    """The fields that a task's examples are made of: what else a record has, as its id, makes no other example."""
    read = (*texts_in(task), *task.FIELDS, *task.OPTIONAL, *task.LABELS, *getattr(task, "EXTRA", ()))
    return tuple(name for name in dict.fromkeys(read) if name not in getattr(task, "NAMES", ()))


def key_of(task: ModuleType) -> Callable[[Record], str]:
    """What records that must not be apart have in common: the texts that a model is given, whatever their labels."""
    if hasattr(task, "group_of"):
        group: Callable[[Record], str] = task.group_of
        return group
    return lambda record: contents(record, getattr(task, "INPUTS", (*task.FIELDS, *task.OPTIONAL)))


def check_columns(task: ModuleType, mapping: Mapping[str, str]) -> None:
    """Refuse a column for a field that the task does not have."""
    fields = {*task.FIELDS, *task.OPTIONAL, *task.LABELS, *getattr(task, "EXTRA", ())}
    for name in mapping:
        if name not in fields:
            known = ", ".join(sorted(fields))
            raise DataError(f"data.columns: {name!r} is not a field of {task.NAME}, needs one of {known}")


@dataclass(frozen=True)
class Choice:
    """What decides which records are held out.

    fits: of each record, whether its length by the cleaning steps keeps it. ranks, lengths: of each that fits, by
    `rank_of` and in characters.
    """

    fits: bytearray
    ranks: list[bytes]
    lengths: Sequence[int]


def choice_of(task: ModuleType, records: Iterable[Record], sections: Sections, cleaner: Cleaner) -> Choice:
    """Ranks are of edited texts, so that texts that editing makes equal stay together.

    Raises:
        DataError: no record is left.
    """
    fits, lengths = bytearray(), array("q")
    ranks: list[bytes] = []
    key, seed = key_of(task), sections.train.seed
    for record in records:
        edited = cleaner.fitting(record)
        fits.append(edited is not None)
        if edited is not None:
            ranks.append(rank_of(edited, seed=seed, key=key))
            lengths.append(len(_text(record)))
    cleaner.check_some_left(len(ranks))
    return Choice(fits, ranks, lengths)


def _divided(
    task: ModuleType, records: list[Record], sections: Sections, cleaner: Cleaner
) -> tuple[list[Record], list[Record]]:
    """(training, held-out) records: a share of a language model's text, and of the number of other examples."""
    choice = choice_of(task, records, sections, cleaner)
    records = list(compress(records, choice.fits))
    fraction, least = sections.data.dev_fraction, least_documents(task, sections.task)
    try:
        if (*task.FIELDS, *task.LABELS) == ("text",):
            train, dev = split_texts(lambda: records, choice.ranks, choice.lengths, fraction, least)
            return list(train), list(dev)
        held = held_out(choice.ranks, fraction)
    except DataError:
        task.examples_of(records, sections.task)  # an error in a line is more useful than one of the split
        raise
    return list(compress(records, ~held)), list(compress(records, held))


def _examples_apart(
    task: ModuleType, train: list[Record], dev: list[Record], options: Any, cleaner: Cleaner
) -> tuple[list[Any], list[Any]]:
    """(training, held-out) examples; held-out ones with a label that no training example has go back to training."""
    counts = dict(cleaner.counts)
    while dev:
        cleaner.counts = dict(counts)
        kept = list(cleaner.kept(train, dev))
        cleaner.check_some_left(len(kept))
        examples, dev_examples = task.examples_of(kept, options), task.examples_of(dev, options)
        known = set(task.labels_in(examples) or ())
        fits = [set(task.labels_in([example]) or ()) <= known for example in dev_examples]
        if all(fits):
            return examples, dev_examples
        train = [*train, *(record for record, fit in zip(dev, fits) if not fit)]
        dev = list(compress(dev, fits))
    raise DataError("data: has too few examples of each label to hold some out, needs --dev")


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


def split_texts(
    read: Callable[[], Iterable[Record]],
    ranks: Sequence[bytes],
    lengths: Sequence[int],
    fraction: float,
    least: int = 1,
) -> tuple[Iterator[Record], Iterator[Record]]:
    """(training, held-out) documents, in their order, of which about `fraction` of all characters is held out.

    The choice by the number of documents stands where it holds out half to twice of that. Otherwise documents are held
    out in the order of their ranks while they fit, and where these are less than half, the end of the first that does
    not fit, as `split_document` finds it. Equal documents stay together: several that do not fit are passed over. The
    choice by number also stands where that document cannot be split, or nothing fits. Where this holds out fewer than
    `least` documents, those of the lowest ranks are held out whole.

    Args:
        read: gives the documents, each time from the first one on.
        ranks, lengths: of each document, by `rank_of` and in characters.
        fraction: within (0, 1).
        least: the fewest documents of either part.

    Raises:
        DataError: the only document cannot be split, all are equal, or there are too few for `least` in both parts;
            from an iterator, `read` gave another number of documents than before.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    total = int(sizes.sum())
    wanted = min(fraction * total, total - 1)  # not all, however large the fraction
    held = np.zeros(len(ranks), dtype=np.bool_)
    refused: DataError | None = None
    try:
        held = held_out(ranks, fraction)
    except DataError as error:
        refused = error
    cut: int | None = None
    parts: tuple[Record, Record] | None = None
    if refused is not None or not wanted <= 2 * sizes[held].sum() <= 4 * wanted:
        fitting, cut = _fitting(ranks, sizes, wanted)
        if cut is not None:
            for record in islice(read(), cut, cut + 1):
                parts = split_document(record, wanted - float(sizes[fitting].sum()))
        if parts is not None or (cut is None and fitting.any()):
            held = fitting
        elif refused is not None:
            raise refused
    if held.sum() + (parts is not None) < least:
        parts, held = None, _lowest(ranks, least)
    if len(held) - held.sum() < least:
        raise DataError(
            f"data: has too few documents for {least} in training and {least} held out, needs --dev"
        )

    def part(dev: bool) -> Iterator[Record]:
        number = -1
        for number, record in enumerate(read()):
            if parts is not None and number == cut:
                yield parts[dev]
            elif number < len(held) and held[number] == dev:
                yield record
        if number + 1 != len(held):
            raise DataError(f"data: {len(held)} examples had become {number + 1} when read again")

    return part(False), part(True)


def _lowest(ranks: Sequence[bytes], count: int) -> npt.NDArray[np.bool_]:
    """The documents of the lowest ranks, at least `count`; equal ones together."""
    group_of, sizes = groups_of(ranks)
    taken: npt.NDArray[np.bool_] = np.cumsum(sizes) - sizes < count
    return taken[group_of]


def _fitting(
    ranks: Sequence[bytes], sizes: npt.NDArray[np.int64], wanted: float
) -> tuple[npt.NDArray[np.bool_], int | None]:
    """Which documents are held out whole, and the number of the one whose end is needed too: see `split_texts`."""
    group_of, counts = groups_of(ranks)
    characters = np.zeros(len(counts), dtype=np.int64)
    np.add.at(characters, group_of, sizes)
    taken = np.zeros(len(counts), dtype=np.bool_)
    used = 0
    for group, (size, count) in enumerate(zip(characters.tolist(), counts.tolist())):
        if used + size <= wanted:
            taken[group] = True
            used += size
        elif count == 1:
            cut = int(np.flatnonzero(group_of == group)[0]) if 2 * used < wanted else None
            return taken[group_of], cut
    return taken[group_of], None


def split_document(record: Record, size: float) -> tuple[Record, Record] | None:
    """A text's beginning, and its end of about `size` characters from a line or else a word on; None where there is no
    such place.

    It is the next line, the one before, the next word or the one before: the first with half to twice of the size after
    it, or else the one nearest to the size.
    """
    text = _text(record)
    at = round(len(text) - size)
    cuts = [
        cut
        for mark in ("\n", " ")
        for cut in (text.find(mark, at) + 1, text.rfind(mark, 0, at) + 1)
        if text[:cut].strip() and text[cut:].strip()
    ]
    if not cuts:
        return None
    close = [cut for cut in cuts if size <= 2 * (len(text) - cut) <= 4 * size]
    cut = close[0] if close else min(cuts, key=lambda cut: abs(len(text) - cut - size))
    begin, end = (Record(record.where, {**record.fields, "text": part}) for part in (text[:cut], text[cut:]))
    return begin, end


def _text(record: Record) -> str:
    """The text; empty for a record without one, which is refused with its line where examples are made."""
    text = record.fields.get("text")
    return text if isinstance(text, str) else ""
