"""JSON Lines: the lines of a UTF-8 file, and the JSON objects in them, each with its place for messages."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastattn.data.corpora import DataError

MAX_BYTES = 2**30  # of a file of prompts or examples that a command reads as a whole


def check_file(path: Path) -> None:
    """Raise DataError unless `path` is a regular file that can be read."""
    try:
        if not path.exists():
            raise DataError(f"{str(path)[:200]}: no such file")
        if not path.is_file():
            raise DataError(f"{path}: is not a regular file")
        with path.open("rb"):
            pass
    except (OSError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(
            f"{str(path)[:200]}: cannot be read ({getattr(error, 'strerror', None) or error})"
        ) from None


def lines_of(path: Path) -> Iterator[tuple[int, str]]:
    """The lines of a UTF-8 file with their numbers from 1 on, without line ends and byte order mark.

    Raises:
        DataError: a line is not UTF-8 or holds a zero byte.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                byte = line[error.start]
                raise DataError(f"{path}: line {number} is not UTF-8 (byte 0x{byte:02x})") from None
            if "\0" in text:
                raise DataError(f"{path}: line {number} is binary (a zero byte), needs UTF-8 text")
            yield number, text.rstrip("\r\n")


def objects_of(path: Path, most_bytes: float = math.inf) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects in a JSONL file, each with its place, as "train.jsonl: line 7"; blank lines are skipped.

    Raises:
        DataError: the file cannot be read or holds more than `most_bytes`, a line holds no JSON object, or no line
            holds anything.
    """
    check_file(path)
    if path.stat().st_size > most_bytes:
        raise DataError(f"{path}: holds over {most_bytes} bytes")
    empty = True
    for number, line in lines_of(path):
        if not line.strip():
            continue
        where = f"{path}: line {number}"
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            raise DataError(f"{where} is not JSON") from None
        if not isinstance(entry, dict):
            raise DataError(f"{where} is not a JSON object")
        empty = False
        yield where, entry
    if empty:
        raise DataError(f"{path}: holds no example")
