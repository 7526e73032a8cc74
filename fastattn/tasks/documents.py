"""Documents as examples: the parts that the tasks on plain text share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from fastattn.data.array_files import Items
from fastattn.data.records import Record, text_of


@dataclass(frozen=True)
class Example:
    """A document."""

    where: str
    text: str


class StoredExamples(Items[Example]):
    """Documents as examples, each made where it is used.

    texts: the documents, such as `fastattn.data.array_files.StoredTexts`.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        self.texts = texts

    def __len__(self) -> int:
        return len(self.texts)

    def item(self, number: int) -> Example:
        """An example; its place is the document's number from 1 on."""
        return Example(f"document {number + 1}", self.texts[number])

    def __iter__(self) -> Iterator[Example]:  # the texts open their file once
        return (Example(f"document {number}", text) for number, text in enumerate(self.texts, 1))


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
