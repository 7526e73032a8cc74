"""Answers to questions: the likeliest spans of a context, or that it holds none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastattn.data.encoding import InputTokenizer, Row
from fastattn.models import BertForQuestionAnswering
from fastattn.tasks.batches import BATCH_SIZE, max_tokens, on_one_line, run, wide

NAME = "qa"
MODELS = (BertForQuestionAnswering,)
FIELDS = ("question", "context")
OPTIONAL: tuple[str, ...] = ()
STRIDE = 128  # tokens that two windows of a context share
MAX_ANSWER_TOKENS = 30
CONTEXT = 1  # the text of the pair

Span = tuple[float, int, int]  # score, first and last character (exclusive)


def decode(
    start: Tensor, end: Tensor, row: Row, top_k: int, max_answer_tokens: int = MAX_ANSWER_TOKENS
) -> tuple[list[Span], float]:
    """The likeliest spans of a window's logits (S,), and the score of there being no answer.

    score = P(start) P(end), each a softmax over the context and the first token, which stands for no answer; a span
    starts no later than it ends and holds at most `max_answer_tokens`.
    """
    logits = wide(torch.stack((start, end))).cpu()
    inside = torch.tensor([sequence == CONTEXT for sequence in row.sequences])
    first = torch.zeros_like(inside)
    first[0] = True
    first_p, last_p = logits.masked_fill(~(inside | first), -torch.inf).softmax(-1)
    none = float(first_p[0] * last_p[0])
    places = inside.nonzero().squeeze(1)
    if not len(places):
        return [], none
    scores = first_p[places, None] * last_p[None, places]  # (N, N)
    allowed = torch.ones_like(scores, dtype=torch.bool).triu().tril(max_answer_tokens - 1)
    best = scores.masked_fill(~allowed, -1.0).flatten().topk(min(top_k, int(allowed.sum())))
    spans = []
    for score, flat in zip(best.values.tolist(), best.indices.tolist()):
        a, b = (int(places[i]) for i in divmod(flat, len(places)))
        spans.append((score, row.offsets[a][0], row.offsets[b][1]))
    return spans, none


def best_answers(windows: Sequence[tuple[list[Span], float]], top_k: int) -> tuple[list[Span], float]:
    """The likeliest spans of all windows of a context, each once, and the lowest of their scores of no answer."""
    by_span: dict[tuple[int, int], float] = {}
    for spans, _ in windows:
        for score, first, last in spans:
            by_span[first, last] = max(score, by_span.get((first, last), 0.0))
    ordered = sorted(by_span.items(), key=lambda item: -item[1])[:top_k]
    return [(score, *span) for span, score in ordered], min(none for _, none in windows)


def predict(
    model: Any,
    tokenizer: InputTokenizer,
    examples: Sequence[dict[str, str]],
    *,
    batch_size: int = BATCH_SIZE,
    top_k: int = 1,
    no_answer: bool = False,
) -> list[dict[str, Any]]:
    """For each example (question, context) its likeliest answers.

    A context that is too long is read in windows, so that nothing is cut. With `no_answer`, the answer None competes
    by its score; `no_answer_score` is there always.

    Raises:
        ValueError: a question leaves no room for its context; the message has its number, from 1 on.
    """
    longest = max_tokens(model, tokenizer)
    stride = check_questions(model, tokenizer, examples)
    pairs = [(e["question"], e["context"]) for e in examples]
    windows = tokenizer.encode_windows(pairs, longest, stride)
    flat = [(number, row) for number, rows in enumerate(windows) for row in rows]

    def take(outputs: Any, place: int, index: int) -> tuple[list[Span], float]:
        row = flat[index][1]
        length = len(row.ids)
        return decode(outputs.start_logits[place, :length], outputs.end_logits[place, :length], row, top_k)

    results = run(model, [row for _, row in flat], batch_size, take)
    of_example: list[list[tuple[list[Span], float]]] = [[] for _ in examples]
    for (number, _), result in zip(flat, results):
        of_example[number].append(result)
    predictions = []
    for example, found in zip(examples, of_example):
        spans, none = best_answers(found, top_k)
        answers: list[dict[str, Any]] = [
            {"answer": example["context"][a:b], "score": score, "start": a, "end": b} for score, a, b in spans
        ]
        if no_answer or not answers:
            answers.append({"answer": None, "score": none, "start": None, "end": None})
            answers.sort(key=lambda answer: -answer["score"])
        predictions.append({"answers": answers[:top_k], "no_answer_score": none, "cut": 0})
    return predictions


def check_questions(model: Any, tokenizer: InputTokenizer, examples: Sequence[dict[str, str]]) -> int:
    """The tokens that windows may share; ValueError for a question that leaves a context less than one token."""
    longest = max_tokens(model, tokenizer)
    around = tokenizer.special_counts[1] - tokenizer.special_counts[0]
    stride = STRIDE
    for number, row in enumerate(tokenizer.encode([e["question"] for e in examples]), 1):
        room = longest - len(row.ids) - around
        if room < 1:
            raise ValueError(
                f"question {number}: has {len(row.ids)} tokens of the {longest} that the model reads, "
                f"which leaves none for its context"
            )
        stride = min(stride, room // 2)
    return stride


def line(prediction: dict[str, Any]) -> str:
    """The answers with score and characters, separated by tabs."""
    return "\t".join(
        f"(no answer) {a['score']:.4f}"
        if a["answer"] is None
        else f"{on_one_line(a['answer'])} {a['score']:.4f} {a['start']}:{a['end']}"
        for a in prediction["answers"]
    )
