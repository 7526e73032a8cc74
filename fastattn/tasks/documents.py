"""Documents as examples: the parts that the tasks on plain text share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, overload

from fastattn.data.records import Record, text_of


@dataclass(frozen=True)
class Example:
    """A document."""

    where: str
    text: str


class StoredExamples(Sequence[Example]):
    """Documents as examples, each made where it is used.

    texts: the documents, such as `fastattn.data.array_files.StoredTexts`.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        self.texts = texts

    def __len__(self) -> int:
        return len(self.texts)

    def __iter__(self) -> Iterator[Example]:
        return (Example(f"document {number}", text) for number, text in enumerate(self.texts, 1))

    @overload
    def __getitem__(self, index: int) -> Example: ...

    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...

    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return Example(f"document {index % max(1, len(self)) + 1}", self.texts[index])


def examples_of(records: Sequence[Record], options: Any) -> list[Example]:
    """The examples of records with "text".

    Raises:
        DataError: a record has no text; with file and line.
    """
    return [Example(record.where, text_of(record, "text")) for record in records]


def labels_in(examples: Sequence[Any]) -> None:
    """None: the tokens are the labels."""


def check_examples(examples: Sequence[Any]) -> None:
    """Accept all examples: any text can be used."""


def best(examples: Sequence[Any]) -> tuple[str, bool]:
    """The metric that selects the best model, and whether higher is better."""
    return "loss", False
