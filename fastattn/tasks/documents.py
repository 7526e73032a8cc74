"""Documents as examples: the parts that the tasks on plain text share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastattn.data.records import Record, text_of


@dataclass(frozen=True)
class Example:
    """A document."""

    where: str
    text: str


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
