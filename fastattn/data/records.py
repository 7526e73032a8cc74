"""Labelled data as records: JSONL, CSV, CoNLL, SQuAD's JSON, text files, folders of these, and `datasets`."""

from __future__ import annotations

import difflib
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fastattn.data.corpora import DataError, check_text_file, split_documents
from fastattn.data.hub_records import HUB, is_saved_dataset, read_hub, read_saved
from fastattn.data.json_lines import check_file
from fastattn.data.readers import READERS

SUFFIXES = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".conll": "conll",
    ".bio": "conll",
    ".iob": "conll",
    ".iob2": "conll",
    ".txt": "text",
    ".text": "text",
    ".md": "text",
}
FORMATS = ("jsonl", "json", "csv", "tsv", "conll", "text")


@dataclass(frozen=True)
class Record:
    """One example of a file.

    where: its place for messages, as "train.jsonl: line 7"; fields: column -> value.
    """

    where: str
    fields: dict[str, Any]


def read_records(
    paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    columns: Mapping[str, str] | None = None,
    format: str | None = None,
) -> list[Record]:
    """The records of files, folders and data sets, in their order.

    A file's suffix determines its format, see `SUFFIXES`:

    - JSONL: an object in each line. JSON: SQuAD's layout, a list of objects, or lines as JSONL.
    - CSV and TSV: the first line names the columns; every value is a str. CSV has quotes; TSV has none: a value ends
      at a tab or line end, and quotation marks are part of it (IANA's text/tab-separated-values).
    - CoNLL: a word and its tag in each line, the first and last of columns separated by tabs or else spaces, a blank
      line or one that begins with -DOCSTART- between sentences: fields "tokens" and "tags".
    - SQuAD: fields "id", "title", "question", "context", "answers" (a list of {"text", "answer_start"}) and
      "is_impossible" where the file has it.
    - Text: field "text", documents separated by two blank lines or more.

    A folder stands for its files with such suffixes, in the order of their names, or for a data set written by
    `datasets.save_to_disk`. `hf:OWNER/NAME[/CONFIG][:SPLIT]` is a data set of `datasets.load_dataset`, in which numbers
    of a ClassLabel become their names; SPLIT is "train" by default.

    Args:
        paths: one path or several.
        columns: the field that a task reads -> the file's column that holds it.
        format: one of `FORMATS`, for every file regardless of its suffix.

    Raises:
        DataError: a path, a line or a column cannot be used; the message has the file and the line.
    """
    return list(iterate_records(paths, columns=columns, format=format))


def iterate_records(
    paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    columns: Mapping[str, str] | None = None,
    format: str | None = None,
) -> Iterator[Record]:
    """The same one after another, of which only a JSON file that is one list is held as a whole."""
    if isinstance(paths, (str, os.PathLike)):
        paths = [paths]
    if format is not None and format not in FORMATS:
        raise DataError(f"format: got {format!r}, needs one of {', '.join(FORMATS)}")
    if not paths:
        raise DataError("data: got no file, needs at least one")
    for path in paths:
        for record in _records_of(path, format):
            yield mapped(record, columns) if columns else record


def source_files(path: str | os.PathLike[str], format: str | None = None) -> list[Path] | None:
    """The files that `read_records` reads for a path that exists; None for a data set by name."""
    if os.fspath(path).startswith(HUB):
        return None
    place = Path(path)
    if not place.is_dir():
        return [place]
    if is_saved_dataset(place):
        return [file for file in sorted(place.rglob("*")) if file.is_file()]
    return _files_of(place, format)


def mapped(record: Record, columns: Mapping[str, str]) -> Record:
    """The record with each field of `columns` taken from the column that it names.

    Raises:
        DataError: the record lacks a column.
    """
    fields = dict(record.fields)
    for name, column in columns.items():
        if column not in record.fields:
            raise DataError(f"{record.where} has no column {column!r} for {name}, {_columns_of(record)}")
        fields[name] = record.fields[column]
    return Record(record.where, fields)


def required(record: Record, name: str) -> Any:
    """A field's value; DataError, which names the nearest column, for a record that lacks it."""
    if name not in record.fields:
        raise DataError(
            f"{record.where} has no {name!r}, {_columns_of(record, name)}; columns are mapped by {name}=COLUMN"
        )
    return record.fields[name]


def text_of(record: Record, name: str) -> str:
    """A field that holds a text that is not blank; DataError otherwise."""
    value = required(record, name)
    if not isinstance(value, str):
        raise DataError(f"{record.where}: {name} is a {type(value).__name__}, needs a text")
    if not value.strip():
        raise DataError(f"{record.where}: {name} is empty")
    check_unicode(record.where, name, value)
    return value


def check_unicode(where: str, name: str, text: str) -> None:
    """Refuse a text with lone surrogates, which JSON can hold and UTF-8 cannot."""
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise DataError(f"{where}: {name} has characters that are not valid Unicode")


def split_records(
    records: Sequence[Record],
    fraction: float,
    *,
    seed: int = 0,
    key: Callable[[Record], str] | None = None,
) -> tuple[list[Record], list[Record]]:
    """(training, held-out) records, in their order; those with the lowest seeded hashes are held out.

    Args:
        records: at least two with different keys.
        fraction: share of the records that is held out, within (0, 1); at least one is, and at least one is not.
        seed: of the hash.
        key: records with the same key stay together, such as those of one context; by default all fields of an
            example, so that equal examples stay together.

    Raises:
        DataError: all records have the same key.
    """
    ranks = [rank_of(record, seed=seed, key=key) for record in records]
    held = held_out(ranks, fraction)
    train = [record for record, out in zip(records, held) if not out]
    return train, [record for record, out in zip(records, held) if out]


def rank_of(record: Record, *, seed: int = 0, key: Callable[[Record], str] | None = None) -> bytes:
    """The seeded hash by which `held_out` decides on a record: 32 bytes."""
    text = key(record) if key else contents(record)
    return hashlib.sha256(f"{seed}\n{text}".encode("utf-8", "surrogatepass")).digest()


def contents(record: Record, names: Sequence[str] | None = None) -> str:
    """The fields, or those of `names` that are there and not null, as one text that is equal for equal values."""
    fields = record.fields
    if names is not None:
        fields = {name: fields[name] for name in names if fields.get(name) is not None}
    return json.dumps(fields, sort_keys=True, default=str)


def held_out(ranks: Sequence[bytes], fraction: float) -> npt.NDArray[np.bool_]:
    """Whether each record is held out, by their ranks: see `split_records`.

    Raises:
        DataError: all ranks are equal.
    """
    group_of, sizes = groups_of(ranks)
    if len(sizes) < 2:
        raise DataError(
            "data: has fewer than two different examples, by their texts or by the articles they are about, so none "
            "can be held out, needs --dev"
        )
    wanted = max(1, round(fraction * len(ranks)))
    taken = np.cumsum(sizes) - sizes < wanted  # until enough are held out
    taken[-1] = False
    held: npt.NDArray[np.bool_] = taken[group_of]
    return held


def groups_of(ranks: Sequence[bytes]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Those of equal rank as groups in the order of ranks: the group of each one, and the sizes of the groups."""
    numbers = np.array(ranks, dtype="S32")  # of one length, so that zero bytes at the end change no order
    _, group_of, sizes = np.unique(numbers, return_inverse=True, return_counts=True)
    return group_of, sizes


def conversation_of(record: Record) -> list[dict[str, str]]:
    """The messages of a chat record: its "messages" ({"role", "content"} each), or "prompt" and "completion".

    Raises:
        DataError: a message lacks "role" or "content", or is not valid Unicode.
    """
    if "messages" not in record.fields and "prompt" in record.fields:
        return [
            {"role": "user", "content": text_of(record, "prompt")},
            {"role": "assistant", "content": text_of(record, "completion")},
        ]
    messages = required(record, "messages")
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{record.where}: messages is not a list of messages")
    for number, message in enumerate(messages, 1):
        good = isinstance(message, dict) and isinstance(message.get("role"), str)
        if not good or not isinstance(message.get("content"), str):
            raise DataError(f'{record.where}: message {number} needs "role" and "content" that are texts')
        check_unicode(record.where, f"message {number}", message["role"] + message["content"])
    return messages


def _columns_of(record: Record, wanted: str = "") -> str:
    names = [str(name) for name in record.fields]
    near = difflib.get_close_matches(wanted, names, n=1) if wanted else []
    listed = ", ".join(repr(name) for name in names[:12])
    return f"it has {listed or 'none'}" + (f" (did you mean {near[0]!r}?)" if near else "")


def _records_of(path: str | os.PathLike[str], format: str | None) -> Iterator[Record]:
    text = os.fspath(path)
    if text.startswith(HUB):
        for where, fields in read_hub(text):
            yield Record(where, fields)
        return
    place = Path(path)
    try:
        is_folder = place.is_dir()
    except (OSError, ValueError):  # a name too long, or with a zero byte
        is_folder = False
    if is_folder and is_saved_dataset(place):
        for where, fields in read_saved(place):
            yield Record(where, fields)
        return
    for file in _files_of(place, format) if is_folder else [place]:
        yield from _file_records(file, format)


def _files_of(folder: Path, format: str | None) -> list[Path]:
    found = [
        file
        for file in sorted(folder.rglob("*"))
        if (format is not None or file.suffix.lower() in SUFFIXES)
        and not any(part.startswith(".") for part in file.relative_to(folder).parts)
        and file.is_file()
    ]
    if not found:
        raise DataError(f"{folder}: holds no file with a suffix of {', '.join(SUFFIXES)}")
    return found


def _file_records(path: Path, format: str | None) -> Iterator[Record]:
    kind = format or SUFFIXES.get(path.suffix.lower())
    if kind is None:
        check_file(path)
        raise DataError(
            f"{path}: got the suffix {path.suffix!r}, needs one of {', '.join(SUFFIXES)}, or the format"
        )
    if kind == "text":
        check_text_file(path)
        with path.open(encoding="utf-8-sig") as lines:
            for number, document in enumerate(split_documents(lines), 1):
                yield Record(f"{path}: document {number}", {"text": document})
        return
    check_file(path)
    empty = True
    for where, fields in READERS[kind](path):
        empty = False
        yield Record(where, fields)
    if empty:
        raise DataError(f"{path}: holds no example")
