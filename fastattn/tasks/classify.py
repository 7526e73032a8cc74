"""Classes of texts with scores, or numbers from a regression; trained from labelled texts."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastattn.data.corpora import DataError
from fastattn.data.encoding import InputTokenizer, Row
from fastattn.data.records import Record, check_unicode, required, text_of
from fastattn.evaluation.classification import multi_label, single_label
from fastattn.evaluation.regression import regression
from fastattn.evaluation.report import Report
from fastattn.models import BertForSequenceClassification
from fastattn.models.fields import one_of, or_none, positive, size, text
from fastattn.tasks.batches import BATCH_SIZE, label_name, max_tokens, run, wide
from fastattn.tasks.options import CheckedOptions, part
from fastattn.tasks.taught import TaughtClassifier
from fastattn.tasks.training import (
    FINE_TUNING,
    HEADS,
    Encoded,
    Source,
    chosen_head,
    layout_of,
    load_encoder,
    longest_of,
    saved_labels,
)
from fastattn.tasks.training import REGRESSION as REGRESSION
from fastattn.tasks.training import SEVERAL as SEVERAL
from fastattn.tasks.training import SINGLE as SINGLE
from fastattn.tasks.training import saved_length as saved_length

NAME = "classify"
MODELS = (BertForSequenceClassification,)
FIELDS = ("text",)
OPTIONAL = ("text_pair",)
LABELS = ("label",)
NEW_PARTS = ("head.*", "classifier.*")  # parameters outside of the encoder
DEFAULTS = FINE_TUNING
KINDS = ("auto", "single", "several", "regression")

Label = str | tuple[str, ...] | tuple[float, ...]  # one label, several labels, or the numbers of a regression


@dataclass(frozen=True)
class Options(CheckedOptions):
    """How texts are classified.

    Args:
        max_length: most tokens of a text, which is truncated there; None for the model's limit.
        kind: "single", one label; "several" labels at once (a list in each example); "regression", a number or a list
            of numbers; "auto" decides by the values: where one has a fraction, all are a regression, else lists are
            several and everything else is single.
        separator: separates labels in a text, because CSV has no lists.
        head: "new", "saved" for the head of the model's folder, or "auto" for the saved one if it has all labels.
        distill_weight: share of the teacher's loss in the total loss.
        temperature: divides the teacher's and the model's logits in the teacher's loss.
    """

    max_length: int | None = None
    kind: str = "auto"
    separator: str | None = None
    head: str = "auto"
    distill_weight: float = 0.5
    temperature: float = 2.0

    CHECKS = {  # noqa: RUF012
        "max_length": or_none(size),
        "kind": one_of(KINDS),
        "separator": or_none(text),
        "head": one_of(HEADS),
        "distill_weight": part,
        "temperature": positive,
    }


@dataclass(frozen=True)
class Example:
    """A text, or two, and its label."""

    where: str
    text: str
    text_pair: str | None
    label: Label


def examples_of(records: Sequence[Record], options: Options) -> list[Example]:
    """The examples of records with "text", "label" and perhaps "text_pair".

    Raises:
        DataError: a record lacks a column, or its label is of another kind than the others; with file and line.
    """
    values = [_label_value(record, options) for record in records]
    kind = settled(options, records).kind
    made = []
    for record, value in zip(records, values):
        pair = text_of(record, "text_pair") if record.fields.get("text_pair") is not None else None
        made.append(Example(record.where, text_of(record, "text"), pair, _label(record.where, value, kind)))
    widths = Counter(len(e.label) for e in made if kind == "regression")
    for example in made if len(widths) > 1 else ():
        most = widths.most_common(1)[0][0]
        if len(example.label) != most:
            raise DataError(f"{example.where}: label has {len(example.label)} numbers, others have {most}")
    return made


def labels_in(examples: Sequence[Example]) -> tuple[str, ...] | None:
    """The labels, sorted, integers by their value; None for a regression."""
    if kind_of(examples) == REGRESSION:
        return None
    each = {name for e in examples for name in ((e.label,) if isinstance(e.label, str) else e.label)}
    names = [str(name) for name in each]
    return tuple(sorted(names, key=lambda name: (0, int(name), name) if _is_integer(name) else (1, 0, name)))


def kind_of(examples: Sequence[Example]) -> str:
    """The problem_type of examples, as configs have it."""
    labels = [example.label for example in examples]
    if labels and all(isinstance(label, str) for label in labels):
        return SINGLE
    numbers = any(isinstance(value, float) for label in labels for value in label)
    return REGRESSION if numbers else SEVERAL


def check_examples(examples: Sequence[Example]) -> None:
    """Refuse training data from which nothing can be learnt."""
    if kind_of(examples) == SINGLE and len(labels := labels_in(examples) or ()) < 2:
        raise DataError(f"data: all {len(examples)} examples have the label {labels[0]!r}, needs two labels")
    if kind_of(examples) == SEVERAL and not labels_in(examples):
        raise DataError(f"data: none of {len(examples)} examples has a label")
    if kind_of(examples) == REGRESSION and len({example.label for example in examples}) < 2:
        raise DataError(f"data: all {len(examples)} examples have the same number, needs two")


def settled(options: Options, records: Sequence[Record]) -> Options:
    """The options with the kind of labels that all of these records have, for any part of them.

    Raises:
        DataError: a record has no label; with file and line.
    """
    if options.kind != "auto":
        return options
    values = [_label_value(record, options) for record in records]
    lists = any(isinstance(value, list) for value in values)
    numbers = [each for value in values for each in (value if isinstance(value, list) else [value])]
    fractions = any(isinstance(each, float) for each in numbers)
    return replace(options, kind="regression" if fractions else "several" if lists else "single")


def best(examples: Sequence[Example]) -> tuple[str, bool]:
    """The metric that selects the best model, and whether higher is better."""
    return {SINGLE: ("accuracy", True), SEVERAL: ("micro_f1", True), REGRESSION: ("mse", False)}[
        kind_of(examples)
    ]


def new_model(
    source: Source, examples: Sequence[Example], options: Options, tokenizer: InputTokenizer | None = None
) -> TaughtClassifier:
    """The folder's or preset's encoder with a head for the labels, new or saved as `options.head` says."""
    labels = labels_in(examples)
    if labels is None:
        width = len(examples[0].label)
        fields: dict[str, Any] = {"num_labels": width, "problem_type": REGRESSION}
        new = _new_parts(source, options, [f"LABEL_{i}" for i in range(width)])
    else:
        chosen = chosen_head(source, BertForSequenceClassification, labels, options.head)
        fields = {"id2label": dict(enumerate(chosen)), "problem_type": kind_of(examples)}
        new = _new_parts(source, options, chosen)
    model = load_encoder(TaughtClassifier, source, tokenizer, new=new, **fields)
    model.distill_weight, model.temperature = options.distill_weight, options.temperature
    return model


def training_set(
    model: Any,
    tokenizer: InputTokenizer,
    examples: Sequence[Example],
    options: Options,
    *,
    teacher: tuple[Any, InputTokenizer] | None = None,
) -> Encoded:
    """The examples as items: tokens, label, and with a teacher (a model and its tokenizer) the teacher's logits."""
    rows = rows_of(model, tokenizer, examples, options)
    others = {}
    if teacher is not None:
        check_kind(teacher[0], examples)
        others["teacher_logits"] = teacher_logits(*teacher, examples, model.config.labels())
    return Encoded(rows, targets_of(model, examples), others=others, **layout_of(model))


def rows_of(
    model: Any, tokenizer: InputTokenizer, examples: Sequence[Example], options: Options
) -> list[Row]:
    """The tokens of each example."""
    texts = [e.text if e.text_pair is None else (e.text, e.text_pair) for e in examples]
    pairs = any(e.text_pair is not None for e in examples)
    return tokenizer.encode(texts, longest_of(model, tokenizer, options.max_length, pairs=pairs))


def targets_of(model: Any, examples: Sequence[Example]) -> list[Any]:
    """The label of each example as the model's loss takes it: a number, 0 and 1 for each label, or numbers."""
    kind = kind_of(examples)
    if kind == REGRESSION:
        return [list(example.label) for example in examples]
    place = {name: number for number, name in enumerate(model.config.labels())}
    if kind == SINGLE:
        return [place[str(example.label)] for example in examples]
    rows = []
    for example in examples:
        row = [0.0] * len(place)
        for name in example.label:
            row[place[str(name)]] = 1.0
        rows.append(row)
    return rows


def evaluate(
    model: Any,
    tokenizer: InputTokenizer,
    examples: Sequence[Example],
    *,
    batch_size: int = BATCH_SIZE,
    options: Options | None = None,
) -> Report:
    """Metrics of a model's classes or numbers, see `fastattn.evaluation`.

    Raises:
        DataError: an example has a label that the model lacks, or of another kind than the model's.
    """
    check_labels(model, examples)
    rows = rows_of(model, tokenizer, examples, options or Options())
    logits = run(model, rows, batch_size, lambda out, i, _: wide(out.logits[i]).cpu())
    kind, targets = kind_of(examples), targets_of(model, examples)
    if kind == REGRESSION:
        return regression(targets, torch.stack(logits).tolist())
    if kind == SINGLE:
        return single_label(targets, torch.stack(logits).softmax(-1).tolist(), model.config.labels())
    return multi_label(targets, torch.stack(logits).sigmoid().tolist(), model.config.labels())


def check_labels(model: Any, examples: Sequence[Example]) -> None:
    """Refuse examples whose labels are not the model's; the message names the first."""
    known = set(model.config.labels())
    numbers = kind_of(examples) == REGRESSION
    if numbers != (model.config.problem_type == REGRESSION) and model.config.problem_type is not None:
        raise DataError(
            f"{examples[0].where}: label is of another kind than the model's, needs {model.config.problem_type}"
        )
    for example in examples:
        if numbers:
            if len(example.label) != model.config.num_labels:
                got, need = len(example.label), model.config.num_labels
                raise DataError(f"{example.where}: label has {got} numbers, the model needs {need}")
            continue
        for name in (example.label,) if isinstance(example.label, str) else example.label:
            if name not in known:
                listed = ", ".join(sorted(known)[:8])
                raise DataError(f"{example.where}: label {name!r} is not one of the model's: {listed}")


def check_kind(teacher: Any, examples: Sequence[Example]) -> None:
    """Refuse a teacher of another kind of labels, whose logits mean something else; DataError names both."""
    theirs, needed = teacher.config.problem_type, kind_of(examples)
    if theirs not in (None, needed):
        raise DataError(f"--teacher: its problem_type is {theirs}, the labels of the data need {needed}")


def teacher_logits(
    teacher: Any, tokenizer: InputTokenizer, examples: Sequence[Example], labels: Sequence[str]
) -> list[list[float]]:
    """A teacher's logits of each example, in the order of `labels`.

    Raises:
        DataError: its labels differ.
    """
    theirs = teacher.config.labels()
    if sorted(theirs) != sorted(labels):
        odd = sorted(set(theirs) ^ set(labels))
        raise DataError(f"--teacher: its labels differ from the data's, as {odd[0]!r}")
    order = torch.tensor([theirs.index(label) for label in labels], device="cpu")
    texts = [e.text if e.text_pair is None else (e.text, e.text_pair) for e in examples]
    rows = tokenizer.encode(texts, max_tokens(teacher, tokenizer))
    return run(teacher, rows, BATCH_SIZE, lambda out, i, _: out.logits[i].float().cpu()[order].tolist())


def _new_parts(source: Source, options: Options, labels: Sequence[str]) -> tuple[str, ...]:
    saved = saved_labels(source, BertForSequenceClassification)
    keep = options.head != "new" and saved is not None and list(saved) == list(labels)
    return () if keep else ("classifier.*",)


def _label_value(record: Record, options: Options) -> Any:
    value = required(record, "label")
    if options.separator is not None and isinstance(value, str):
        return [part.strip() for part in value.split(options.separator) if part.strip()]
    return value


def _label(where: str, value: Any, kind: str) -> Label:
    if kind == "regression":
        values = value if isinstance(value, list) else [value]
        try:
            numbers = tuple(float(each) for each in values if not isinstance(each, bool))
        except (TypeError, ValueError, OverflowError):
            numbers = ()
        if not numbers or len(numbers) != len(values) or not all(map(math.isfinite, numbers)):
            raise DataError(f"{where}: label is {value!r:.60}, needs a finite number for a regression")
        return numbers
    if kind == "several":
        if not isinstance(value, list):
            raise DataError(f"{where}: label is {value!r:.60}, needs a list of labels as others have")
        return tuple(_name(where, each) for each in value)
    return _name(where, value)


def _name(where: str, value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{where}: label is {value!r:.60}, needs a name or an integer")
    check_unicode(where, "label", value)
    return value.strip()


def _is_integer(name: str) -> bool:
    return name.removeprefix("-").isdecimal()


def scores_of(logits: Tensor, config: Any) -> Tensor:
    """Scores (..., num_labels) of logits: their softmax; with several labels at once or a single one, their sigmoid;
    for a regression, the logits themselves."""
    logits = wide(logits)
    if config.problem_type == "regression":
        return logits
    if config.problem_type == "multi_label_classification" or config.num_labels == 1:
        return logits.sigmoid()
    return logits.softmax(-1)


def decode(logits: Tensor, config: Any, top_k: int | None = None) -> list[dict[str, Any]]:
    """The labels of logits (num_labels,) by falling score, `top_k` of them or all."""
    scores = scores_of(logits, config).tolist()
    order = sorted(range(len(scores)), key=lambda i: -scores[i])[:top_k]
    return [{"label": label_name(config, i), "score": scores[i]} for i in order]


def predict(
    model: Any,
    tokenizer: InputTokenizer,
    examples: Sequence[dict[str, str]],
    *,
    batch_size: int = BATCH_SIZE,
    top_k: int | None = None,
    max_length: int | None = None,
) -> list[dict[str, Any]]:
    """The labels of texts, likeliest first.

    Args:
        model: a `BertForSequenceClassification`; it runs in eval mode on its device.
        tokenizer: the model's.
        examples: dicts with "text" and, for pairs, "text_pair".
        batch_size: texts at a time.
        top_k: most labels of a text; None for all.
        max_length: most tokens of a text or pair, which is truncated there; None for the limit of the folder.

    Returns:
        For each example {"labels": [{"label", "score"}, ...], "cut": the number of tokens that did not fit}; score is a
        probability, for a regression the number itself.
    """
    texts = [(e["text"], e["text_pair"]) if "text_pair" in e else e["text"] for e in examples]
    longest = max_tokens(model, tokenizer)
    rows = tokenizer.encode(texts, longest if max_length is None else min(longest, max_length))
    found = run(model, rows, batch_size, lambda out, i, _: decode(out.logits[i], model.config, top_k))
    return [{"labels": labels, "cut": row.cut} for labels, row in zip(found, rows)]


def line(prediction: dict[str, Any]) -> str:
    """The labels and their scores, separated by tabs."""
    return "\t".join(f"{label['label']} {label['score']:.4f}" for label in prediction["labels"])
