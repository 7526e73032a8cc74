"""Entity F1 per span: a span counts where its type and both ends are right."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from fastattn.evaluation.report import Report, check_pairs, f1_of

OUTSIDE = "O"

Span = tuple[str, int, int]  # type, first and last token (exclusive)


def spans_of(tags: Sequence[str]) -> list[Span]:
    """The entities of a sentence's tags, read strictly as IOB2.

    An entity is a B- and the I- of the same type that follow it. An I- that continues no entity of its type is ignored.

    Raises:
        ValueError: a tag is neither O nor B- or I- with a type.
    """
    spans: list[Span] = []
    kind: str | None = None
    start = 0
    for place, tag in enumerate([*tags, OUTSIDE]):
        prefix, dash, name = tag.partition("-")
        if tag != OUTSIDE and not (dash and prefix in ("B", "I")):
            raise ValueError(f"tags: got {tag!r}, needs O, or B- or I- with a type")
        if kind is not None and not (prefix == "I" and name == kind):
            spans.append((kind, start, place))
            kind = None
        if prefix == "B":
            kind, start = name, place
    return spans


def entity_f1(references: Sequence[Sequence[str]], predictions: Sequence[Sequence[str]]) -> Report:
    """Strict entity metrics of sentences' tags in IOB2 form, as in seqeval's strict mode.

    precision, recall and f1 of the entities of all sentences pooled; macro_f1 is the mean over the types that occur in
    references or predictions (0 without any); accuracy is of single tags. Table: per_type. count: sentences.

    Args:
        references, predictions: a sequence of tags for each sentence, of equal lengths.

    Raises:
        ValueError: there is no sentence, numbers of sentences or tags differ, or a tag is neither O nor B- or I- with
            a type.
    """
    count = check_pairs(references, predictions)
    expected: Counter[str] = Counter()
    predicted: Counter[str] = Counter()
    correct: Counter[str] = Counter()
    right = tokens = 0
    for number, (gold, given) in enumerate(zip(references, predictions)):
        if len(gold) != len(given):
            raise ValueError(
                f"predictions[{number}]: got {len(given)} tags, needs one for each of {len(gold)}"
            )
        tokens += len(gold)
        right += sum(int(a == b) for a, b in zip(gold, given))
        gold_spans, given_spans = set(spans_of(gold)), set(spans_of(given))
        expected.update(kind for kind, _, _ in gold_spans)
        predicted.update(kind for kind, _, _ in given_spans)
        correct.update(kind for kind, _, _ in gold_spans & given_spans)
    rows: list[dict[str, Any]] = []
    for kind in sorted(expected | predicted):
        precision, recall, f1 = f1_of(correct[kind], predicted[kind], expected[kind])
        row: dict[str, Any] = {"type": kind, "precision": precision, "recall": recall, "f1": f1}
        rows.append({**row, "references": expected[kind], "predictions": predicted[kind]})
    precision, recall, f1 = f1_of(correct.total(), predicted.total(), expected.total())
    return Report(
        metrics={
            "f1": f1,
            "precision": precision,
            "recall": recall,
            "macro_f1": sum(row["f1"] for row in rows) / len(rows) if rows else 0.0,
            "accuracy": right / tokens if tokens else 0.0,
        },
        count=count,
        tables={"per_type": rows},
    )
