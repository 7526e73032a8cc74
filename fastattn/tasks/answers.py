"""Answers that stand in a context: read from records, and their tokens in a window."""

from __future__ import annotations

from collections.abc import Sequence

from fastattn.data.corpora import DataError
from fastattn.data.encoding import Row
from fastattn.data.records import Record, required

CONTEXT = 1  # the text of the pair


def positions_of(row: Row, context: str, answers: Sequence[tuple[str, int]]) -> tuple[int, int]:
    """The first and last token of the first answer that a window holds whole; (0, 0), no answer, where it holds none.

    A part of an answer is none: its tokens would teach a wrong end.
    """
    for text, start in answers:
        place = _place_of(row, context, start, start + len(text))
        if place is not None:
            return place
    return 0, 0


def _place_of(row: Row, context: str, start: int, end: int) -> tuple[int, int] | None:
    """The first and last token of the characters from start to end; None where the window lacks some."""
    inside = [i for i, sequence in enumerate(row.sequences) if sequence == CONTEXT]
    touched = [i for i in inside if row.offsets[i][0] < end and row.offsets[i][1] > start]
    if not touched:
        return None
    before = touched[0] != inside[0] or row.offsets[touched[0]][0] <= start
    behind = touched[-1] != inside[-1] or row.offsets[touched[-1]][1] >= end
    first_of_all = context[start : row.offsets[touched[0]][0]].strip() == ""
    last_of_all = context[row.offsets[touched[-1]][1] : end].strip() == ""
    if not ((before or first_of_all) and (behind or last_of_all)):
        return None
    return touched[0], touched[-1]


def answers_in(record: Record, context: str) -> tuple[tuple[str, int], ...]:
    """The answers of a record, each with its first character in the context; none for an unanswerable question.

    Raises:
        DataError: an answer is not at its start in the context, or none is given; with file and line.
    """
    given = required(record, "answers")
    if isinstance(given, dict):
        texts, starts = given.get("text"), given.get("answer_start")
        if not isinstance(texts, list) or not isinstance(starts, list) or len(texts) != len(starts):
            raise DataError(
                f'{record.where}: answers needs lists "text" and "answer_start" of the same length'
            )
        given = [{"text": text, "answer_start": start} for text, start in zip(texts, starts)]
    if isinstance(given, str):
        given = [{"text": given}]
    if not isinstance(given, list):
        raise DataError(f"{record.where}: answers is a {type(given).__name__}, needs a list")
    if record.fields.get("is_impossible") is True:
        return ()
    if not given and record.fields.get("is_impossible") is False:
        raise DataError(f"{record.where}: answers is empty, needs an answer or is_impossible true")
    found = []
    for number, answer in enumerate(given, 1):
        text = answer.get("text") if isinstance(answer, dict) else None
        if not isinstance(text, str) or not text.strip():
            raise DataError(f"{record.where}: answer {number} has no text")
        start = answer.get("answer_start", context.find(text))
        if not isinstance(start, int) or isinstance(start, bool):
            raise DataError(
                f"{record.where}: answer {number} has the start {start!r:.40}, needs a number of characters"
            )
        if start < 0 or context[start : start + len(text)] != text:
            at = context[max(start, 0) : max(start, 0) + len(text)]
            raise DataError(
                f"{record.where}: answer {number}, {text!r:.60}, is not at character {start} of its context"
                + (f", {at!r:.60} is" if start >= 0 else "")
            )
        found.append((text, start))
    return tuple(found)
