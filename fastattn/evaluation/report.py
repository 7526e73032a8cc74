"""The result of an evaluation, and the checks that all metrics share."""

from __future__ import annotations

from collections.abc import Sized
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Report:
    """Metrics of a whole set.

    Attributes:
        metrics: name -> value, a share within [0, 1] unless docs/evaluation.md says otherwise; NaN where it is
            undefined.
        count: number of examples, or of tokens for a language model.
        tables: further results by name, in JSON's types.
        signatures: sacrebleu's signature of a metric, by its name.
    """

    metrics: dict[str, float]
    count: int
    tables: dict[str, Any] = field(default_factory=dict)
    signatures: dict[str, str] = field(default_factory=dict)


class MissingPackage(ImportError):
    """A metric or baseline needs a package that the extra `evaluate` installs; the message names both."""

    def __init__(self, what: str, package: str) -> None:
        super().__init__(f"{what} needs {package}: pip install 'fastattn[evaluate]'")


def check_pairs(references: Sized, predictions: Sized, name: str = "predictions") -> int:
    """The number of pairs; ValueError if there is none, or if the numbers of both differ."""
    if len(references) != len(predictions):
        raise ValueError(
            f"{name}: got {len(predictions)}, needs one for each of {len(references)} references"
        )
    if not len(references):
        raise ValueError("references: got none, needs at least one")
    return len(references)


def f1_of(correct: int, predicted: int, expected: int) -> tuple[float, float, float]:
    """Precision, recall and their harmonic mean from counts; 0 where a denominator is 0."""
    precision = correct / predicted if predicted else 0.0
    recall = correct / expected if expected else 0.0
    return precision, recall, 2 * correct / (predicted + expected) if predicted + expected else 0.0
