"""Passages and sentences of masked language models in memory-mapped files."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fastattn.data.array_files import ArrayWriter, Items, load_arrays
from fastattn.data.encoding import InputTokenizer
from fastattn.tasks.passages import Around, Passage, Tokens, pairs, sentences_of, singles

NO_PAIR = -1  # stands for None in `follows`
SENTENCES = "sentences"  # folder that exists while pairs are made of it


def stored_passages(
    tokenizer: InputTokenizer,
    texts: Iterable[str],
    longest: int,
    around: Around,
    folder: Path,
    *,
    two: bool,
) -> StoredPassages:
    """The passages of `singles`, or with `two` those of `pairs`, written to a folder."""
    largest = max(tokenizer.core.get_vocab(with_added_tokens=True).values(), default=0)
    kind = np.uint16 if largest < 1 << 16 else np.uint32
    if two:
        sentences = folder / SENTENCES
        StoredSentences.write(sentences, sentences_of(tokenizer, texts, longest, around), kind)
        StoredPassages.write(folder, pairs(StoredSentences(sentences), longest, around), kind)
        shutil.rmtree(sentences)
    else:
        StoredPassages.write(folder, singles(tokenizer, texts, longest, around), kind)
    return StoredPassages(folder)


class StoredPassages(Items[Passage]):
    """Passages of a folder, each read where it is used."""

    def __init__(self, folder: Path) -> None:
        arrays = load_arrays(folder, ("ids", "types", "words", "ends", "follows"))
        self._ids, self._types, self._words = arrays["ids"], arrays["types"], arrays["words"]
        self._ends, self._follows = arrays["ends"], arrays["follows"]

    @staticmethod
    def write(folder: Path, passages: Iterable[Passage], kind: Any) -> None:
        """Write passages, with ids of an integer dtype."""
        dtypes = {"ids": kind, "types": np.uint8, "words": np.int32, "ends": np.int64, "follows": np.int8}
        with ArrayWriter(folder, dtypes) as arrays:
            for each in passages:
                follows = NO_PAIR if each.follows is None else each.follows
                arrays.append(ids=each.ids, types=each.types, words=each.words, follows=[follows])
                arrays.append(ends=[arrays.sizes["ids"]])

    def __len__(self) -> int:
        return len(self._ends)

    def item(self, number: int) -> Passage:
        """A passage, read from the files."""
        part = _part(self._ends, number)
        follows = int(self._follows[number])
        return Passage(
            self._ids[part].tolist(),
            self._types[part].tolist(),
            self._words[part].tolist(),
            None if follows == NO_PAIR else follows,
        )


class StoredSentences(Items["_Sentences"]):
    """Documents of a folder as sequences of their sentences' tokens, each read where it is used."""

    def __init__(self, folder: Path) -> None:
        arrays = load_arrays(folder, ("ids", "words", "ends", "documents"))
        self._ids, self._words = arrays["ids"], arrays["words"]
        self._ends = arrays["ends"]  # of sentences, in tokens
        self._documents = arrays["documents"]  # their ends, in sentences

    @staticmethod
    def write(folder: Path, documents: Iterable[Sequence[Tokens]], kind: Any) -> None:
        """Write the tokens of documents' sentences, with ids of an integer dtype."""
        dtypes = {"ids": kind, "words": np.int32, "ends": np.int64, "documents": np.int64}
        with ArrayWriter(folder, dtypes) as arrays:
            for document in documents:
                for sentence in document:
                    arrays.append(ids=sentence.ids, words=sentence.words)
                    arrays.append(ends=[arrays.sizes["ids"]])
                arrays.append(documents=[arrays.sizes["ends"]])

    def __len__(self) -> int:
        return len(self._documents)

    def item(self, number: int) -> _Sentences:
        """The sentences of a document."""
        part = _part(self._documents, number)
        return _Sentences(self, range(part.start, part.stop))

    def sentence(self, number: int) -> Tokens:
        """A sentence by its number among those of all documents."""
        part = _part(self._ends, number)
        return Tokens(self._ids[part].tolist(), self._words[part].tolist())


class _Sentences(Items[Tokens]):
    """Those of one document."""

    def __init__(self, source: StoredSentences, numbers: range) -> None:
        self._source, self._numbers = source, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def item(self, number: int) -> Tokens:
        """A sentence, read from the files."""
        return self._source.sentence(self._numbers[number])


def _part(ends: npt.NDArray[np.int64], index: int) -> slice:
    """The part of an array that a piece takes, by the ends of all pieces."""
    return slice(int(ends[index - 1]) if index else 0, int(ends[index]))
