"""The files of records by format: JSONL, JSON and SQuAD's layout, CSV, TSV, CoNLL."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fastattn.data.corpora import DataError
from fastattn.data.json_lines import lines_of, objects_of

DOCUMENT_START = "-DOCSTART-"  # CoNLL-2003's line between documents

Placed = tuple[str, dict[str, Any]]  # a record's place for messages, and its fields


def _json(path: Path) -> Iterator[Placed]:
    text = "\n".join(line for _, line in lines_of(path))
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        if isinstance(error, json.JSONDecodeError) and error.msg == "Extra data":  # an object in each line
            yield from objects_of(path)
            return
        at = f": line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise DataError(f"{path}{at} is not JSON ({getattr(error, 'msg', 'nested too deep')})") from None
    if isinstance(content, dict) and isinstance(content.get("data"), list):
        content_list = content["data"]
        if not content_list or (isinstance(content_list[0], dict) and "paragraphs" in content_list[0]):
            yield from _squad(path, content_list)
            return
        content = content_list
    if isinstance(content, dict):
        content = [content]
    if not isinstance(content, list):
        raise DataError(f"{path}: holds a {type(content).__name__}, needs a list of objects or SQuAD's data")
    for number, entry in enumerate(content, 1):
        if not isinstance(entry, dict):
            raise DataError(f"{path}: item {number} is not a JSON object")
        yield f"{path}: item {number}", entry


def _squad(path: Path, articles: list[Any]) -> Iterator[Placed]:
    for a, article in enumerate(articles):
        at = f"{path}: data[{a}]"
        for p, paragraph in enumerate(_list_of(article, "paragraphs", at)):
            inner = f"{at}.paragraphs[{p}]"
            for q, question in enumerate(_list_of(paragraph, "qas", inner)):
                where = f"{inner}.qas[{q}]"
                if not isinstance(question, dict):
                    raise DataError(f"{where} is not a JSON object")
                fields = {"id": f"{a}-{p}-{q}", "title": article.get("title", f"data[{a}]"), **question}
                yield where, {**fields, "context": paragraph.get("context")}


def _list_of(entry: Any, name: str, where: str) -> list[Any]:
    value = entry.get(name) if isinstance(entry, dict) else None
    if not isinstance(value, list):
        raise DataError(f"{where} has no list {name!r}, needs SQuAD's layout")
    return value


def _csv(path: Path) -> Iterator[Placed]:
    return _table(path, delimiter=",", strict=True)


def _tsv(path: Path) -> Iterator[Placed]:
    return _table(path, delimiter="\t", quoting=csv.QUOTE_NONE)


def _table(path: Path, **dialect: Any) -> Iterator[Placed]:
    rows = _rows(path, dialect)
    _, header = next(rows, (1, []))
    for column in header:
        if not column.strip() or header.count(column) > 1:
            what = "more than one column is named" if column.strip() else "a column has no name:"
            raise DataError(f"{path}: line 1: {what} {column!r}")
    unquoted = ", a tab or line end always ends a value" if "quoting" in dialect else ""
    for number, row in rows:
        if len(row) != len(header):
            raise DataError(
                f"{path}: line {number} has {len(row)} values, needs {len(header)} as its first line names{unquoted}"
            )
        yield f"{path}: line {number}", dict(zip(header, row))


def _rows(path: Path, dialect: dict[str, Any]) -> Iterator[tuple[int, list[str]]]:
    """The rows that are not empty, each with the number of its first line."""
    reader = csv.reader((line + "\n" for _, line in lines_of(path)), **dialect)
    begins = 1
    while True:
        limit = csv.field_size_limit(sys.maxsize)  # of this row alone: it holds for the whole process
        try:
            row = next(reader, None)
        except csv.Error as error:
            raise DataError(f"{path}: line {begins} is not CSV ({error})") from None
        finally:
            csv.field_size_limit(limit)
        if row is None:
            return
        if row:
            yield begins, row
        begins = reader.line_num + 1


def _conll(path: Path) -> Iterator[Placed]:
    tokens: list[str] = []
    tags: list[str] = []
    begins, width = 1, 0
    for number, line in lines_of(path):
        if not line.strip() or line.startswith(DOCUMENT_START):
            if tokens:
                yield f"{path}: line {begins}", {"tokens": tokens, "tags": tags}
                tokens, tags = [], []
            continue
        parts = line.split("\t") if "\t" in line else line.split()
        if len(parts) < 2 or not parts[0].strip() or not parts[-1].strip():
            raise DataError(f"{path}: line {number} needs a word and its tag with a tab between them")
        if width and len(parts) != width:
            raise DataError(f"{path}: line {number} has {len(parts)} columns, those before it have {width}")
        width = len(parts)
        if not tokens:
            begins = number
        tokens.append(parts[0])
        tags.append(parts[-1].strip())
    if tokens:
        yield f"{path}: line {begins}", {"tokens": tokens, "tags": tags}


READERS: dict[str, Callable[[Path], Iterator[Placed]]] = {
    "jsonl": objects_of,
    "json": _json,
    "csv": _csv,
    "tsv": _tsv,
    "conll": _conll,
}
