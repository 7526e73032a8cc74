"""Exact match and F1 of answers, by the rules of SQuAD's official scripts, and by characters for Chinese."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

from fastattn.evaluation.report import Report, check_pairs
from fastattn.evaluation.words import is_unspaced, pieces_of, without_punctuation

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_ASCII_PUNCTUATION = str.maketrans("", "", string.punctuation)


def tokens_of(text: str, unspaced: bool) -> list[str]:
    """The counted words of an answer: lower-case without punctuation and English articles, as SQuAD's script has them.

    With `unspaced`, Unicode's punctuation is removed too, each Han or kana character is a word of its own, and articles
    are kept, because they are part of names then.
    """
    text = text.lower()
    if unspaced:
        return pieces_of(without_punctuation(text))
    return _ARTICLES.sub(" ", text.translate(_ASCII_PUNCTUATION)).split()


def exact_match(reference: str, answer: str) -> bool:
    """Whether two answers have the same tokens."""
    unspaced = is_unspaced(reference) or is_unspaced(answer)
    return tokens_of(reference, unspaced) == tokens_of(answer, unspaced)


def f1(reference: str, answer: str) -> float:
    """F1 of the tokens of an answer, with multiplicity; where a side has none, 1 if both have none, else 0."""
    unspaced = is_unspaced(reference) or is_unspaced(answer)
    expected, given = tokens_of(reference, unspaced), tokens_of(answer, unspaced)
    if not expected or not given:
        return float(expected == given)
    same = (Counter(expected) & Counter(given)).total()
    return 2 * same / (len(expected) + len(given))


def answers(references: Sequence[Sequence[str]], predictions: Sequence[str | None]) -> Report:
    """exact_match and f1 of answers, each the best over the right answers; shares within [0, 1].

    For a question without a right answer, or without one that has a token, the prediction is right if it is None or has
    no token. If there are questions without a right answer, the report also has no_answer_accuracy,
    has_answer_exact_match and has_answer_f1.

    Args:
        references: for each question the right answers; an empty list where the context has none.
        predictions: for each question a text, or None for no answer.

    Raises:
        TypeError: references holds texts instead of lists of texts.
        ValueError: there is no question, or the numbers of references and predictions differ.
    """
    count = check_pairs(references, predictions)
    if isinstance(references[0], str):
        raise TypeError("references: got texts, needs a list of right answers for each question")
    exact, overlap, answerable = [], [], []
    for right, prediction in zip(references, predictions):
        golds = [text for text in right if tokens_of(text, is_unspaced(text))] or [""]
        answer = prediction or ""
        answerable.append(bool(right))
        exact.append(float(max(exact_match(gold, answer) for gold in golds)))
        overlap.append(max(f1(gold, answer) for gold in golds))
    metrics = {"exact_match": sum(exact) / count, "f1": sum(overlap) / count}
    with_answer = sum(answerable)
    if with_answer < count:
        none = [score for score, able in zip(exact, answerable) if not able]
        metrics["no_answer_accuracy"] = sum(none) / len(none)
        if with_answer:
            some = [(e, f) for e, f, able in zip(exact, overlap, answerable) if able]
            metrics["has_answer_exact_match"] = sum(e for e, _ in some) / with_answer
            metrics["has_answer_f1"] = sum(f for _, f in some) / with_answer
    return Report(metrics=metrics, count=count)
