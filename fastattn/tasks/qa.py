"""Extractive question answering: the likeliest spans of a context, or no answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastattn.data.corpora import DataError
from fastattn.data.encoding import InputTokenizer, Row
from fastattn.data.records import Record, text_of
from fastattn.evaluation.answers import answers as answer_figures
from fastattn.evaluation.report import Report
from fastattn.models import BertForQuestionAnswering
from fastattn.models.fields import one_of, or_none, positive, size, size_or_0
from fastattn.tasks.answers import CONTEXT, answers_in, positions_of
from fastattn.tasks.batches import BATCH_SIZE, max_tokens, on_one_line, run, trimmed, wide
from fastattn.tasks.options import CheckedOptions, part
from fastattn.tasks.taught import TaughtAnswerer, attach_teacher
from fastattn.tasks.training import (
    FINE_TUNING,
    HEADS,
    Encoded,
    Source,
    chosen_head,
    layout_of,
    load_encoder,
    longest_of,
)

NAME = "qa"
MODELS = (BertForQuestionAnswering,)
FIELDS = ("question", "context")
OPTIONAL: tuple[str, ...] = ()
LABELS = ("answers",)
EXTRA = ("title", "id", "is_impossible")
NAMES = ("title", "id")  # which examples do not consist of
EDITABLE = False  # labels are positions in the text
NEW_PARTS = ("head.*", "qa_outputs.*")
DEFAULTS = FINE_TUNING
MAX_LENGTH = 384  # tokens of a window in training
STRIDE = 128  # tokens that consecutive windows of a context share
MAX_ANSWER_TOKENS = 30

Span = tuple[float, int, int]  # score, first and last character (exclusive)


@dataclass(frozen=True)
class Options(CheckedOptions):
    """Options of question answering.

    Args:
        max_length: tokens of a window, question included; None for 384, or fewer where the model has fewer positions.
        stride: tokens that consecutive windows of a context share; at most half of what the question leaves it.
        no_answer: whether an evaluation allows "no answer"; "auto" where some examples have no answer.
        head: "new", "saved" for the head of the model's folder, or "auto" for the saved one if there is one.
        distill_weight: share of the teacher's loss in the whole.
        temperature: of the teacher's and the model's logits in that loss.
    """

    max_length: int | None = None
    stride: int = STRIDE
    no_answer: str = "auto"
    head: str = "auto"
    distill_weight: float = 0.5
    temperature: float = 2.0

    CHECKS = {  # noqa: RUF012
        "max_length": or_none(size),
        "stride": size_or_0,
        "no_answer": one_of(("auto", "yes", "no")),
        "head": one_of(HEADS),
        "distill_weight": part,
        "temperature": positive,
    }


@dataclass(frozen=True)
class Example:
    """A question, its context, and the answers, each with its first character; no answers if it is unanswerable."""

    where: str
    question: str
    context: str
    answers: tuple[tuple[str, int], ...]


def examples_of(records: Sequence[Record], options: Options) -> list[Example]:
    """The examples of records with "question", "context" and "answers" in SQuAD's form.

    "answers" is a list of {"text", "answer_start"}, or {"text": [...], "answer_start": [...]}, empty where the context
    holds none ("is_impossible" may say so too). An answer without a start begins where its text first occurs.

    Raises:
        DataError: a record lacks a column, or an answer is not at its start in the context; with file and line.
    """
    return [
        Example(r.where, text_of(r, "question"), context, answers_in(r, context))
        for r in records
        for context in (text_of(r, "context"),)
    ]


def labels_in(examples: Sequence[Example]) -> None:
    """None: answers have no labels."""


def check_examples(examples: Sequence[Example]) -> None:
    """Refuse training data from which nothing can be learnt."""
    if not any(example.answers for example in examples):
        raise DataError(f"data: none of {len(examples)} questions has an answer")


def group_of(record: Record) -> str:
    """The key of a question's article or context: questions with the same key stay together where data is split."""
    title = record.fields.get("title")
    return title if isinstance(title, str) and title.strip() else str(record.fields.get("context"))


def best(examples: Sequence[Example]) -> tuple[str, bool]:
    """The metric that selects the best model, and whether higher is better."""
    return "f1", True


def new_model(
    source: Source, examples: Sequence[Example], options: Options, tokenizer: InputTokenizer | None = None
) -> TaughtAnswerer:
    """The folder's or preset's encoder with its question answering head, or a new head."""
    if options.head == "saved":
        chosen_head(source, BertForQuestionAnswering, (), "saved")
    new = ("qa_outputs.*",) if options.head == "new" else ()
    return load_encoder(TaughtAnswerer, source, tokenizer, new=new)


def training_set(
    model: Any,
    tokenizer: InputTokenizer,
    examples: Sequence[Example],
    options: Options,
    *,
    teacher: tuple[Any, InputTokenizer] | None = None,
) -> Encoded:
    """The windows of the examples' contexts as items: tokens, and the first and last token of the answer.

    Of several answers it is the first that a window holds whole. A window that holds none, or only a part of one, has
    its first token as the label, which means no answer.

    Raises:
        DataError: a question leaves no room for its context, an answer has no token, or the teacher, a model with
            its tokenizer, has other tokens.
    """
    windows = windows_of(model, tokenizer, examples, options)
    rows, labels = [], []
    for example, of_example in zip(examples, windows):
        places = [positions_of(row, example.context, example.answers) for row in of_example]
        if example.answers and not any(place != (0, 0) for place in places):
            text = on_one_line(example.answers[0][0])
            raise DataError(
                f"{example.where}: the answer {text!r:.60} has no token, or too many for a window"
            )
        rows += of_example
        labels += [list(place) for place in places]
    if teacher is not None:
        attach_teacher(model, tokenizer, teacher, options, max((len(row.ids) for row in rows), default=0))
    return Encoded(rows, labels, **layout_of(model))


def windows_of(
    model: Any, tokenizer: InputTokenizer, examples: Sequence[Example], options: Options
) -> list[list[Row]]:
    """Each question with its context, in windows.

    Raises:
        DataError: a question leaves no room for its context; with file and line.
    """
    longest = window_length(model, tokenizer, options)
    pairs = [(e.question, e.context) for e in examples]
    return _windows(tokenizer, pairs, longest, options.stride, [f"{e.where}: question" for e in examples])


def window_length(model: Any, tokenizer: InputTokenizer, options: Options) -> int:
    """Most tokens of a window; DataError where the model has fewer positions."""
    limit = options.max_length
    if limit is None:
        limit = min(max_tokens(model, tokenizer), MAX_LENGTH)
    return longest_of(model, tokenizer, limit)


def saved_length(model: Any, tokenizer: InputTokenizer, options: Options, *, new: bool) -> int:
    """Most tokens of a window, for the tokenizer's files of the trained folder."""
    return window_length(model, tokenizer, options)


def _windows(
    tokenizer: InputTokenizer,
    pairs: Sequence[tuple[str, str]],
    longest: int,
    stride: int,
    names: Sequence[str],
) -> list[list[Row]]:
    """The windows of each pair, which share `stride` tokens, or half of what its question leaves where that is less.

    Raises:
        DataError: a question, which `names` has a name for, leaves no room for its context.
    """
    around = tokenizer.special_counts[1] - tokenizer.special_counts[0]
    of_stride: dict[int, list[int]] = {}
    for number, row in enumerate(tokenizer.encode([question for question, _ in pairs])):
        room = longest - len(row.ids) - around
        if room < 1:
            raise DataError(
                f"{names[number]} has {len(row.ids)} tokens of the {longest} that the model reads, "
                f"which leaves none for its context"
            )
        of_stride.setdefault(min(stride, room // 2), []).append(number)
    found: list[list[Row]] = [[] for _ in pairs]
    for each, numbers in of_stride.items():
        made = tokenizer.encode_windows([pairs[number] for number in numbers], longest, each)
        for number, windows in zip(numbers, made):
            found[number] = windows
    return found


def evaluate(
    model: Any,
    tokenizer: InputTokenizer,
    examples: Sequence[Example],
    *,
    batch_size: int = BATCH_SIZE,
    options: Options | None = None,
) -> Report:
    """Exact match and F1 of the likeliest answers, see `fastattn.evaluation.answers`."""
    options = options or Options()
    competes = options.no_answer == "yes" or (
        options.no_answer == "auto" and not all(example.answers for example in examples)
    )
    windows = windows_of(model, tokenizer, examples, options)
    found = answers_of(model, windows, [e.context for e in examples], batch_size, 1)
    predictions = [
        None if not spans or (competes and none > spans[0][0]) else example.context[spans[0][1] : spans[0][2]]
        for example, (spans, none) in zip(examples, found)
    ]
    return answer_figures([[text for text, _ in e.answers] for e in examples], predictions)


def decode(
    start: Tensor, end: Tensor, row: Row, top_k: int, max_answer_tokens: int = MAX_ANSWER_TOKENS
) -> tuple[list[Span], float]:
    """The likeliest spans of a window's logits (S,), and the score of there being no answer.

    score = P(start) P(end), each a softmax over the context's tokens and the first token, which means no answer. A span
    has 1 to `max_answer_tokens` tokens.
    """
    logits = wide(torch.stack((start, end))).cpu()
    inside = torch.tensor([sequence == CONTEXT for sequence in row.sequences], device="cpu")
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
    """The likeliest spans of all windows of a context, without duplicates, and the lowest of the no-answer scores."""
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
    """The likeliest answers to questions. A long context is read in windows, so that nothing is truncated.

    Args:
        model, tokenizer: a `BertForQuestionAnswering`, run in eval mode on its device, and its tokenizer.
        examples: dicts with "question" and "context".
        batch_size, top_k: windows at a time, and most answers to a question.
        no_answer: whether None is a possible answer, ranked by its score.

    Returns:
        For each example {"answers": [{"answer", "score", "start", "end"}, ...], "no_answer_score", "cut": 0}; start and
        end (exclusive) count characters of the context.

    Raises:
        ValueError: a question leaves no room for its context; the message has its number, from 1 on.
    """
    longest = max_tokens(model, tokenizer)
    pairs = [(e["question"], e["context"]) for e in examples]
    names = [f"question {number}:" for number in range(1, len(pairs) + 1)]
    windows = _windows(tokenizer, pairs, longest, STRIDE, names)
    predictions = []
    found = answers_of(model, windows, [e["context"] for e in examples], batch_size, top_k)
    for example, (spans, none) in zip(examples, found):
        answers: list[dict[str, Any]] = [
            {"answer": example["context"][a:b], "score": score, "start": a, "end": b} for score, a, b in spans
        ]
        if no_answer or not answers:
            answers.append({"answer": None, "score": none, "start": None, "end": None})
            answers.sort(key=lambda answer: -answer["score"])
        predictions.append({"answers": answers[:top_k], "no_answer_score": none, "cut": 0})
    return predictions


def answers_of(
    model: Any, windows: Sequence[Sequence[Row]], contexts: Sequence[str], batch_size: int, top_k: int
) -> list[tuple[list[Span], float]]:
    """For each context in windows its likeliest spans, and the score of no answer."""
    flat = [(number, row) for number, rows in enumerate(windows) for row in rows]

    def take(outputs: Any, place: int, index: int) -> tuple[list[Span], float]:
        number, row = flat[index]
        length = len(row.ids)
        spans, none = decode(
            outputs.start_logits[place, :length], outputs.end_logits[place, :length], row, top_k
        )
        return [(score, *trimmed(contexts[number], a, b)) for score, a, b in spans], none

    results = run(model, [row for _, row in flat], batch_size, take)
    of_context: list[list[tuple[list[Span], float]]] = [[] for _ in windows]
    for (number, _), result in zip(flat, results):
        of_context[number].append(result)
    return [best_answers(found, top_k) for found in of_context]


def line(prediction: dict[str, Any]) -> str:
    """The answers with score and characters, separated by tabs."""
    return "\t".join(
        f"(no answer) {a['score']:.4f}"
        if a["answer"] is None
        else f"{on_one_line(a['answer'])} {a['score']:.4f} {a['start']}:{a['end']}"
        for a in prediction["answers"]
    )
