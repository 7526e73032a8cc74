"""The documents of a large corpus for a language model, in files that a later run of the same data reads again.

A folder of the cache holds the cleaned documents, another the tokenizer that was trained on them, and another their
tokens. Each has a name made of everything that it depends on, and takes that name when all of it is on disk.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from itertools import chain, compress, repeat
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from fastattn.cache import cache_dir, locked, write_atomically
from fastattn.data import DataError
from fastattn.data.array_files import StoredTexts
from fastattn.data.cleaning import Cleaner
from fastattn.data.records import Record, iterate_records, rank_of, source_files
from fastattn.models.checkpoint.swap import UNFINISHED, delete, naming
from fastattn.tasks.documents import StoredExamples
from fastattn.train.checkpoint import publish
from fastattn.train.sections import ConfigError
from fastattn.train.task_config import Sections
from fastattn.train.task_data import (
    TaskData,
    check_documents,
    choice_of,
    cleaner_of,
    least_documents,
    split_texts,
)

FORMAT = 4  # of the files; another number makes them anew
LARGE = 64 << 20  # bytes of data from which on it goes into files by default
COUNTS = "counts.json"
Made = TypeVar("Made")


class Corpus:
    """What a run of `fastattn train` on many documents keeps in files.

    Args:
        task: causal-lm or masked-lm.
        train, dev: paths, as for `read_records`.
        sections: the options of the run.

    Raises:
        ConfigError: the folder of the cache cannot be made, or its disk has less space than the documents take.
    """

    def __init__(
        self, task: ModuleType, train: Sequence[str], dev: Sequence[str], sections: Sections
    ) -> None:
        self.task, self.sections = task, sections
        self.train, self.dev = tuple(train), tuple(dev)
        chosen = sections.data.cache
        self.folder = cache_dir() / "corpora" if chosen is None else Path(chosen)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"data.cache: {self.folder} cannot be made ({error.strerror or error}), needs a folder"
            ) from None
        need = size_of([*train, *dev], sections.data.format) or 0
        free = shutil.disk_usage(self.folder).free
        if free < need:
            raise ConfigError(
                f"data.cache: {self.folder} has {free / 1e9:.2f} GB free, needs {need / 1e9:.2f} GB for the texts alone"
            )
        self.key = _digest(
            FORMAT,
            [[source_key(path, sections.data.format) for path in paths] for paths in (train, dev)],
            [sections.data.mapping, sections.data.format, asdict(sections.clean)],
            None
            if dev
            else [sections.data.dev_fraction, sections.train.seed, least_documents(task, sections.task)],
        )

    def read(self) -> TaskData:
        """The documents, from files that an earlier run wrote or that are written now."""
        folder = self._folder("documents", self.key)
        train, dev, counts = made(folder, self._write, _documents)
        check_documents(self.task, self.sections.task, train, dev)
        return TaskData(
            StoredExamples(train),
            StoredExamples(dev),
            self.sections.task,
            None if self.dev else len(dev),
            counts,
            self.folder,
        )

    def tokenizer(self, learn: Callable[[], Any], load: Callable[[Path], Any]) -> Any:
        """The tokenizer that `learn` trains on the documents, or an earlier run did with the same options."""
        options = self.sections.data
        key = _digest(self.key, [options.tokenizer, options.vocab_size, options.lowercase], self.task.NAME)
        return made(self._folder("tokenizer", key), lambda folder: learn().save_pretrained(folder), load)

    def sets(
        self, model: Any, tokenizer: Any, build: Callable[[Path, bool, bool], Made]
    ) -> tuple[Made, Made]:
        """The training and the dev set, `build(folder, whether it is the training set, whether its files exist)`."""
        options = self.sections.task
        learnt = [tokenizer.core.to_str(), getattr(tokenizer, "eos_id", None)]
        # passages have the length that the model and its tokenizer allow; a stream of tokens has none
        length = (
            self.task.passage_length(model, tokenizer, options)
            if hasattr(self.task, "passage_length")
            else None
        )
        key = _digest(self.key, learnt, asdict(options), self.task.NAME, length)

        def write(folder: Path) -> None:
            for name, training in (("train", True), ("dev", False)):
                build(folder / name, training, False)

        return made(
            self._folder("tokens", key),
            write,
            lambda folder: (build(folder / "train", True, True), build(folder / "dev", False, True)),
        )

    def _folder(self, kind: str, key: str) -> Path:
        return self.folder / f"{kind}-{key[:32]}"

    def _records(self, paths: Sequence[str]) -> Iterator[Record]:
        data = self.sections.data
        return iterate_records(list(paths), columns=data.mapping, format=data.format)

    def _texts(self, records: Iterator[Record]) -> Iterator[str]:
        """The texts of records, each checked."""
        for record in records:
            yield self.task.examples_of([record], self.sections.task)[0].text

    def _write(self, folder: Path) -> None:
        """train/ and dev/ with the documents, and what cleaning did."""
        cleaner = cleaner_of(self.task, self.sections)
        train: Iterator[Record]
        if self.dev:
            train, dev = self._records(self.train), self._records(self.dev)
        else:
            train, dev = self._divided(cleaner)
        StoredTexts.write(folder / "dev", self._texts(dev))
        texts: Iterable[str] = () if self.dev else StoredTexts(folder / "dev")
        held = (Record("", {"text": text}) for text in texts)
        StoredTexts.write(folder / "train", self._texts(cleaner.kept(train, held)))
        cleaner.check_some_left(len(StoredTexts(folder / "train")))
        write_atomically(folder / COUNTS, json.dumps(cleaner.counts) + "\n")

    def _divided(self, cleaner: Cleaner) -> tuple[Iterator[Record], Iterator[Record]]:
        """(training, held-out) records: those that `read_data` takes."""
        choice = choice_of(self.task, self._records(self.train), self.sections, cleaner)

        def read() -> Iterator[Record]:
            # further records than the first time are read too, so that `split_texts` finds the change
            return compress(self._records(self.train), chain(choice.fits, repeat(True)))

        fraction, least = self.sections.data.dev_fraction, least_documents(self.task, self.sections.task)
        try:
            return split_texts(read, choice.ranks, choice.lengths, fraction, least)
        except DataError:
            for _ in self._texts(read()):  # an error in a line is more useful than one of the split
                pass
            raise


def made(folder: Path, write: Callable[[Path], None], read: Callable[[Path], Made]) -> Made:
    """What `read` finds in a folder, which `write` fills where there is none, or where `read` finds it damaged.

    One process of this machine writes at a time. The folder has its name once all of it is on disk; what a process
    leaves that is killed, or meets a full disk, is deleted by this or by the next.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with naming(folder.parent), locked(folder.with_name(f"{folder.name}.lock")):
        if folder.is_dir():
            try:
                return read(folder)
            except DataError:
                delete(folder)
        partial = folder.with_name(f"{UNFINISHED}{folder.name}")
        delete(partial)
        try:
            partial.mkdir()
            write(partial)
            publish(partial, folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return read(folder)


def _documents(folder: Path) -> tuple[StoredTexts, StoredTexts, dict[str, int]]:
    try:
        counts = json.loads((folder / COUNTS).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{folder / COUNTS}: cannot be read ({error})") from None
    return StoredTexts(folder / "train"), StoredTexts(folder / "dev"), counts


def is_large(train: Sequence[str], dev: Sequence[str], sections: Sections) -> bool:
    """Whether the data goes into files: it is large, its size is unknown, or `data.cache` says where."""
    size = size_of([*train, *dev], sections.data.format)
    return sections.data.cache is not None or size is None or size >= LARGE


def size_of(paths: Sequence[str], format: str | None) -> int | None:
    """Bytes of the files; 0 for what cannot be read, None where a data set is given by name."""
    total = 0
    for path in paths:
        try:
            files = source_files(path, format)
            if files is None:
                return None
            total += sum(file.stat().st_size for file in files)
        except (OSError, ValueError):  # the reader says what is wrong
            continue
    return total


def source_key(path: str, format: str | None) -> Any:
    """What changes with the content: path, size and time of change of each file; a data set by name has its rows."""
    files = source_files(path, format)
    if files is None:
        rows = hashlib.sha256()
        for record in iterate_records(path):
            rows.update(rank_of(record))
        return [path, rows.hexdigest()]
    found = []
    for file in files:
        try:
            about = file.stat()
        except OSError:
            continue  # the reader says what is wrong
        found.append([os.fspath(file.resolve()), about.st_size, about.st_mtime_ns])
    return found


def _digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()
