"""Token classification: entities as spans of characters, from BIO labels of tokens; trained from tagged words."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from fastattn.constants import IGNORE_INDEX
from fastattn.data.corpora import DataError
from fastattn.data.encoding import InputTokenizer, Row
from fastattn.data.records import Record, required
from fastattn.evaluation.report import Report
from fastattn.evaluation.spans import entity_f1
from fastattn.evaluation.words import UNSPACED, is_unspaced
from fastattn.models import BertForTokenClassification
from fastattn.models.fields import one_of, or_none, positive, size
from fastattn.tasks.batches import BATCH_SIZE, label_name, max_tokens, on_one_line, run, trimmed, wide
from fastattn.tasks.options import CheckedOptions, part
from fastattn.tasks.taught import TaughtTagger, attach_teacher
from fastattn.tasks.training import (
    FINE_TUNING,
    HEADS,
    EncodedTokens,
    Source,
    chosen_head,
    layout_of,
    load_encoder,
    longest_of,
    saved_labels,
)
from fastattn.tasks.training import saved_length as saved_length

NAME = "tag"
MODELS = (BertForTokenClassification,)
FIELDS = ("text",)
OPTIONAL: tuple[str, ...] = ()
LABELS = ("tokens", "tags")
TEXTS = INPUTS = ("tokens",)  # what cleaning and the model read
EDITABLE = False  # labels belong to positions in the text
NEW_PARTS = ("head.*", "classifier.*")
DEFAULTS = {**FINE_TUNING, "max_epochs": 5.0}
OUTSIDE = "O"
PIECES = ("all", "first")


@dataclass(frozen=True)
class Options(CheckedOptions):
    """How words are tagged.

    Args:
        max_length: most tokens of a sentence, which is truncated there; None for the model's limit.
        label_pieces: the pieces of a word that are trained: "all", where pieces after the first of a B- word get I-, as
            `fastattn predict` and transformers' pipeline expect; or only the "first".
        head: "new", "saved" for the head of the model's folder, or "auto" for the saved one if it has all labels.
        distill_weight: share of the teacher's loss in the whole.
        temperature: of the teacher's and the model's logits in that loss.
    """

    max_length: int | None = None
    label_pieces: str = "all"
    head: str = "auto"
    distill_weight: float = 0.5
    temperature: float = 2.0

    CHECKS = {  # noqa: RUF012
        "max_length": or_none(size),
        "label_pieces": one_of(PIECES),
        "head": one_of(HEADS),
        "distill_weight": part,
        "temperature": positive,
    }


@dataclass(frozen=True)
class Example:
    """A sentence's words and their tags."""

    where: str
    tokens: tuple[str, ...]
    tags: tuple[str, ...]


def examples_of(records: Sequence[Record], options: Options) -> list[Example]:
    """The examples of records with "tokens" and "tags", two lists of texts of the same length.

    Tags of entities become IOB2: an I- that continues no entity of its type becomes the B- of a new one, as IOB1 means.

    Raises:
        DataError: a record lacks a column, or its lists differ in length; with file and line.
    """
    made = []
    for record in records:
        tokens, tags = (_texts(record, name) for name in ("tokens", "tags"))
        if len(tokens) != len(tags):
            raise DataError(
                f"{record.where}: has {len(tokens)} tokens and {len(tags)} tags, needs one for each"
            )
        made.append(Example(record.where, tokens, tags))
    if not any(_is_bio(tag) and tag != OUTSIDE for example in made for tag in example.tags):
        return made
    for example in made:
        for place, tag in enumerate(example.tags, 1):
            if not _is_bio(tag):
                raise DataError(
                    f"{example.where}: tag {place} is {tag!r:.60}, needs O, B-TYPE or I-TYPE as the others"
                )
    return [replace(example, tags=_iob2(example.tags)) for example in made]


def labels_in(examples: Sequence[Example]) -> tuple[str, ...]:
    """O, then the B- and I- tag of each type that occurs; of other tags, those that occur."""
    tags = {tag for example in examples for tag in example.tags}
    if not all(map(_is_bio, tags)):
        return tuple(sorted(tags))
    kinds = sorted({tag[2:] for tag in tags if tag != OUTSIDE})
    return (OUTSIDE, *(f"{prefix}-{kind}" for kind in kinds for prefix in "BI"))


def check_examples(examples: Sequence[Example]) -> None:
    """Refuse training data from which nothing can be learnt."""
    if len(labels_in(examples)) < 2:
        raise DataError(
            f"data: all tags of {len(examples)} sentences are {labels_in(examples)[0]!r}, needs two different ones"
        )


def best(examples: Sequence[Example]) -> tuple[str, bool]:
    """The metric that selects the best model, and whether higher is better."""
    return ("f1" if all(map(_is_bio, labels_in(examples))) else "accuracy"), True


def new_model(
    source: Source, examples: Sequence[Example], options: Options, tokenizer: InputTokenizer | None = None
) -> TaughtTagger:
    """The folder's or preset's encoder with a head for the tags, new or saved as `options.head` says.

    A tokenizer that joins characters of scripts without spaces, where words begin without a space, divides these from
    now on.
    """
    if tokenizer is not None and joins_characters(tokenizer, examples):
        tokenizer.isolate(UNSPACED.pattern)
    labels = chosen_head(source, BertForTokenClassification, labels_in(examples), options.head)
    keep = options.head != "new" and saved_labels(source, BertForTokenClassification) == tuple(labels)
    new = () if keep else ("classifier.*",)
    return load_encoder(TaughtTagger, source, tokenizer, new=new, id2label=dict(enumerate(labels)))


def training_set(
    model: Any,
    tokenizer: InputTokenizer,
    examples: Sequence[Example],
    options: Options,
    *,
    teacher: tuple[Any, InputTokenizer] | None = None,
) -> EncodedTokens:
    """The examples as items: tokens and the label of each, -100 for special tokens and pieces that are not trained.

    Raises:
        DataError: two words are in one token; the teacher, a model with its tokenizer, has other tokens or labels.
    """
    place = {name: number for number, name in enumerate(model.config.labels())}
    rows, words = rows_of(model, tokenizer, examples, options)
    if teacher is not None:
        attach_teacher(model, tokenizer, teacher, options, max((len(row.ids) for row in rows), default=0))
    labels = []
    for example, of_row in zip(examples, words):
        last, row = -1, []
        for held in of_row:
            if held is None or (held[1] == last and options.label_pieces == "first"):
                row.append(IGNORE_INDEX)
                continue
            word = held[1]
            if held[0] != word:
                first, second = example.tokens[word - 1 : word + 1]
                raise DataError(
                    f"{example.where}: a token holds parts of {first!r:.40} and {second!r:.40}, needs a tokenizer "
                    f"that divides words"
                )
            tag = example.tags[word]
            inside = f"I-{tag[2:]}"
            row.append(place[inside if word == last and tag != OUTSIDE and inside in place else tag])
            last = word
        labels.append(row)
    return EncodedTokens(rows, labels, **layout_of(model))


def rows_of(
    model: Any, tokenizer: InputTokenizer, examples: Sequence[Example], options: Options
) -> tuple[list[Row], list[list[tuple[int, int] | None]]]:
    """The tokens of each sentence as one text, as `predict` gets it, and for each token its first and last word."""
    joined = [_joined(example.tokens) for example in examples]
    longest = longest_of(model, tokenizer, options.max_length)
    rows = tokenizer.encode([text for text, _ in joined], longest)
    words: list[list[tuple[int, int] | None]] = []
    for row, (text, starts) in zip(rows, joined):
        of_row: list[tuple[int, int] | None] = []
        for (first, last), sequence in zip(row.offsets, row.sequences):
            if sequence is None or last <= first:
                of_row.append(None)
                continue
            word = bisect_right(starts, last - 1) - 1
            begin, _ = trimmed(text, first, last)  # byte-level pieces may begin with the preceding space
            of_row.append((min(word, bisect_right(starts, begin) - 1), word))
        words.append(of_row)
    return rows, words


def joins_characters(tokenizer: InputTokenizer, examples: Sequence[Example]) -> bool:
    """Whether a token of these sentences holds several characters of a script without spaces."""
    texts = [text for text, _ in map(_joined, (example.tokens for example in examples)) if is_unspaced(text)]
    return any(
        len(UNSPACED.findall(text[first:last])) > 1
        for text, row in zip(texts, tokenizer.encode(texts))
        for first, last in row.offsets
    )


def evaluate(
    model: Any,
    tokenizer: InputTokenizer,
    examples: Sequence[Example],
    *,
    batch_size: int = BATCH_SIZE,
    options: Options | None = None,
) -> Report:
    """Strict entity metrics, see `fastattn.evaluation.spans`; only accuracy for tags that are not B-, I- and O.

    A word has the label of its first piece, O without one. Of several words in one token, the first has its label and
    the others the one that continues it.

    Raises:
        DataError: an example has a tag that the model lacks.
    """
    check_labels(model, examples)
    rows, words = rows_of(model, tokenizer, examples, options or Options())

    def take(outputs: Any, place: int, index: int) -> list[str]:
        tags = [OUTSIDE] * len(examples[index].tokens)
        labels = labels_of(outputs.logits[place, : len(rows[index].ids)], model.config)
        seen = set()
        for (label, _), held in zip(labels, words[index]):
            for word in range(held[0], held[1] + 1) if held is not None else ():
                if word not in seen:
                    seen.add(word)
                    tags[word] = label
                    label = f"I-{label[2:]}" if label.startswith("B-") else label
        return tags

    return report_of(model, examples, run(model, rows, batch_size, take))


def report_of(model: Any, examples: Sequence[Example], found: Sequence[Sequence[str]]) -> Report:
    """The figures of `evaluate` for a tag for each word, of the model's or known from training data."""
    if all(map(_is_bio, (*model.config.labels(), *labels_in(examples)))):
        return entity_f1([example.tags for example in examples], found)
    right = [a == b for example, tags in zip(examples, found) for a, b in zip(example.tags, tags)]
    return Report(metrics={"accuracy": sum(right) / len(right)}, count=len(examples))


def check_labels(model: Any, examples: Sequence[Example]) -> None:
    """Refuse examples whose tags are not the model's; the message names the first."""
    known = {OUTSIDE, *model.config.labels()}
    for example in examples:
        for tag in example.tags:
            if tag not in known:
                listed = ", ".join(sorted(known)[:8])
                raise DataError(f"{example.where}: tag {tag!r} is not one of the model's: {listed}")


def _is_bio(tag: str) -> bool:
    return tag == OUTSIDE or (tag[:2] in ("B-", "I-") and len(tag) > 2)


def _iob2(tags: Sequence[str]) -> tuple[str, ...]:
    """Tags in which every entity begins with B-."""
    begins = [tag[:2] == "I-" and last[2:] != tag[2:] for last, tag in zip((OUTSIDE, *tags), tags)]
    return tuple(f"B-{tag[2:]}" if begin else tag for tag, begin in zip(tags, begins))


def _texts(record: Record, name: str) -> tuple[str, ...]:
    values = required(record, name)
    if not isinstance(values, list) or not values:
        raise DataError(f"{record.where}: {name} is {values!r:.60}, needs a list of texts")
    for place, value in enumerate(values, 1):
        if not isinstance(value, str) or not value.strip() or any("\ud800" <= c <= "\udfff" for c in value):
            raise DataError(f"{record.where}: {name} has {value!r:.60} in place {place}, needs a text")
    return tuple(values)


def _joined(words: Sequence[str]) -> tuple[str, list[int]]:
    """The words joined to one text, with spaces except in scripts that have none, and the start of each."""
    text, starts = "", []
    for word in words:
        if text and not (is_unspaced(text[-1]) and is_unspaced(word[0])):
            text += " "
        starts.append(len(text))
        text += word
    return text, starts


def labels_of(logits: Tensor, config: Any) -> list[tuple[str, float]]:
    """The likeliest label of each token with its probability, of logits (S, num_labels).

    For logits (S,) of a model with one label: that label where its probability is over 0.5, else O.
    """
    logits = wide(logits)
    if logits.dim() == 1:
        each = logits.sigmoid().tolist()
        return [(label_name(config, 0), p) if p > 0.5 else (OUTSIDE, 1 - p) for p in each]
    scores, numbers = logits.softmax(-1).max(-1)
    return [(label_name(config, n), p) for n, p in zip(numbers.tolist(), scores.tolist())]


def decode(labels: Sequence[tuple[str, float]], row: Row, text: str) -> list[dict[str, Any]]:
    """The entities of a text: runs of tokens of one type, each B- starting a new one; score is the mean of the tokens'.

    An I- that does not follow a token of its type also starts an entity. Special tokens are ignored.
    """
    entities: list[dict[str, Any]] = []
    scores: list[list[float]] = []
    last = OUTSIDE
    for (label, score), (start, end), sequence in zip(labels, row.offsets, row.sequences):
        if sequence is None:
            continue
        begins = label.startswith("B-")
        tag = label[2:] if label.startswith(("B-", "I-")) else label
        if tag != OUTSIDE:
            if tag == last and not begins:
                entities[-1]["end"] = end
                scores[-1].append(score)
            else:
                entities.append({"entity": tag, "start": start, "end": end})
                scores.append([score])
        last = tag
    for entity, each in zip(entities, scores):
        entity["start"], entity["end"] = trimmed(text, entity["start"], entity["end"])
        entity |= {"score": sum(each) / len(each), "text": text[entity["start"] : entity["end"]]}
    return [entity for entity in entities if entity["text"]]  # a token may be white space alone


def predict(
    model: Any,
    tokenizer: InputTokenizer,
    examples: Sequence[dict[str, str]],
    *,
    batch_size: int = BATCH_SIZE,
) -> list[dict[str, Any]]:
    """The entities of texts, by place.

    Args:
        model: a `BertForTokenClassification`; it runs in eval mode on its device.
        tokenizer: the model's.
        examples: dicts with "text".
        batch_size: texts at a time.

    Returns:
        For each example {"entities": [{"entity", "start", "end", "score", "text"}, ...], "cut": the number of truncated
        tokens}; start and end (exclusive) count characters.

    Raises:
        ValueError: the model's logits are not finite.
    """
    rows = tokenizer.encode([e["text"] for e in examples], max_tokens(model, tokenizer))

    def take(outputs: Any, place: int, index: int) -> list[dict[str, Any]]:
        row = rows[index]
        labels = labels_of(outputs.logits[place, : len(row.ids)], model.config)
        if not all(math.isfinite(score) for _, score in labels):
            raise ValueError("model: its logits are not finite; look for NaN or infinite weights")
        return decode(labels, row, examples[index]["text"])

    found = run(model, rows, batch_size, take)
    return [{"entities": entities, "cut": row.cut} for entities, row in zip(found, rows)]


def line(prediction: dict[str, Any]) -> str:
    """The entities of a text, separated by tabs; empty without any."""
    return "\t".join(
        f"{e['entity']} {e['score']:.4f} {e['start']}:{e['end']} {on_one_line(e['text'])}"
        for e in prediction["entities"]
    )
