"""Metrics of a model's folder on labelled data, with those of baselines: the work of `fastattn evaluate`."""

from __future__ import annotations

import dataclasses
import math
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, get_args, get_type_hints

import numpy as np

from fastattn.console import InputError, check_folder
from fastattn.data import DataError, Tokenizer
from fastattn.data.encoding import InputTokenizer
from fastattn.data.records import read_records
from fastattn.evaluation import baselines, classification, generation, regression, spans
from fastattn.evaluation.report import MissingPackage, Report
from fastattn.models import GPT, BertForEmbedding, families
from fastattn.tasks import causal_lm, chat, classify, dpo, embed, masked_lm, qa, seq2seq, tag
from fastattn.tasks.batches import max_tokens

# The default task of a folder is the first that its class supports; --task selects another.
TASKS: tuple[ModuleType, ...] = (classify, tag, qa, masked_lm, embed, causal_lm, chat, dpo, seq2seq)
KINDS = {classify.SINGLE: "single", classify.SEVERAL: "several", classify.REGRESSION: "regression"}
OF_CLASSES = ("ece", "log_loss")  # metrics of probabilities, which baselines do not have


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The figures that `fastattn evaluate` prints.

    Attributes:
        task: the name of the task.
        folder: the model's folder.
        report: the model's metrics.
        baselines: name of a baseline -> its metrics.
        seconds: wall time.
    """

    task: str
    folder: str
    report: Report
    baselines: dict[str, Report]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """The report in JSON's types; a metric that is undefined or infinite is null."""
        return {
            "task": self.task,
            "folder": self.folder,
            "count": self.report.count,
            "metrics": finite(self.report.metrics),
            "tables": self.report.tables,
            "signatures": self.report.signatures,
            "baselines": {name: finite(report.metrics) for name, report in self.baselines.items()},
            "seconds": self.seconds,
        }

    def rows(self) -> tuple[list[str], list[list[str]]]:
        """The columns and rows of a table: a row for each metric, a column for the model and each baseline."""
        reports = [self.report, *self.baselines.values()]
        rows = [
            [name, *(f"{r.metrics[name]:.4f}" if name in r.metrics else "" for r in reports)]
            for name in self.report.metrics
        ]
        return ["metric", "model", *self.baselines], rows


def finite(metrics: dict[str, float]) -> dict[str, float | None]:
    """The metrics, with None for those that JSON has no number for."""
    return {name: value if math.isfinite(value) else None for name, value in metrics.items()}


def evaluate(
    folder: Path,
    data: Sequence[str],
    *,
    task: str | None = None,
    baseline: Sequence[str] = (),
    train: Sequence[str] = (),
    columns: Sequence[str] = (),
    options: Sequence[str] = (),
    batch_size: int | None = None,
    plots: Path | None = None,
) -> Evaluation:
    """Evaluate a model's folder on labelled data, on a GPU if there is one: what `fastattn evaluate` does.

    Args:
        folder: of the model, with its tokenizer.
        data: files, folders or data sets with labelled examples, as `read_records` takes them; one at least.
        task: the task's name, as "classify"; None for that of the folder's head.
        baseline: methods to evaluate as well: "majority", "tfidf", "lead" or "copy", as the task has them.
        train: labelled examples to train majority and tfidf on.
        columns: "FIELD=COLUMN", the file's column for a field of the task.
        options: "KEY=VALUE", options of the task, as "max_length=256".
        batch_size: texts at a time, which does not change the metrics; None for the task's.
        plots: folder for the reliability plot and the confusion table of a classifier; None for none.

    Returns:
        An `Evaluation`; docs/evaluation.md says what each metric is.

    Raises:
        InputError: a ValueError whose message is one line: an argument, a file or the folder cannot be used, or a
            package is missing.
    """
    begun = time.monotonic()
    module = task_of(folder, task)
    if not data:
        raise InputError("--data: got none, needs a file with labelled examples")
    settings = options_of(module, options)
    methods = {name: method_of(module, name, bool(train)) for name in dict.fromkeys(baseline)}
    mapping = columns_of(module, columns)
    if train and not methods:
        raise InputError("--train: is only used with --baseline")
    if plots is not None:
        check_plots(module, plots)
    try:
        if module is seq2seq:
            generation.check_installed()
        if "tfidf" in methods:
            baselines.sklearn_package()
        training = read_records(list(train), columns=mapping) if train else []
        records = read_records(list(data), columns=mapping)
        examples, given = (module.examples_of(each, settings) for each in (records, training))
        model, tokenizer = load_folder(folder, module)
        if (changed := settled(module, settings, model, tokenizer)) != settings:
            settings = changed
            examples, given = (module.examples_of(each, settings) for each in (records, training))
        found = {name: method(model, examples, given) for name, method in methods.items()}
        size = {} if batch_size is None else {"batch_size": batch_size}
        report = module.evaluate(model, tokenizer, examples, options=settings, **size)
        if plots is not None:
            draw(report, plots)
    except (DataError, ValueError, MissingPackage) as error:
        raise InputError(" ".join(str(error).split())) from None
    return Evaluation(module.NAME, str(folder), report, found, round(time.monotonic() - begun, 3))


def task_of(folder: Path, name: str | None) -> ModuleType:
    """The named task, or the first that the folder's class supports; no weight is read."""
    names = [task.NAME for task in TASKS]
    if name is not None and name not in names:
        raise InputError(f"--task: got {name!r}, needs one of {', '.join(names)}")
    check_folder(folder)
    try:
        cls = families.class_for(folder)
    except ValueError as error:
        raise InputError(str(error)) from None
    able = [task for task in TASKS if cls in task.MODELS]
    for task in able:
        if name is None or name == task.NAME:
            return task
    can = f", which supports {', '.join(task.NAME for task in able)}" if able else ", which no task evaluates"
    raise InputError(f"{'--task ' + name if name else folder}: the folder holds a {cls.__name__}{can}")


def options_of(task: ModuleType, words: Sequence[str]) -> Any:
    """The task's options of words as KEY=VALUE."""
    known = {field.name for field in dataclasses.fields(task.Options)}
    hints = get_type_hints(task.Options)
    values: dict[str, Any] = {}
    for word in words:
        key, equals, written = word.partition("=")
        if not equals or key not in known:
            raise InputError(
                f"--option {word[:100]}: needs KEY=VALUE with a key of {task.NAME}: {', '.join(sorted(known))}"
            )
        values[key] = _value(written, hints[key])
    try:
        return task.Options(**values)
    except (TypeError, ValueError) as error:
        raise InputError(f"--option {error}") from None


def _value(written: str, hint: Any) -> Any:
    """A word as an option's type; as it is where it is none of that type, which the option's check says."""
    kinds = get_args(hint) or (hint,)
    if type(None) in kinds and written.lower() in ("none", "null"):
        return None
    for kind in (int, float):
        if kind in kinds:
            try:
                return kind(written)
            except ValueError:
                continue
    return {"true": True, "false": False}.get(written.lower(), written) if bool in kinds else written


def columns_of(task: ModuleType, words: Sequence[str]) -> dict[str, str]:
    """The task's field -> the file's column, of words as FIELD=COLUMN."""
    known = {*task.FIELDS, *task.OPTIONAL, *task.LABELS, *getattr(task, "EXTRA", ())}
    found = {}
    for word in words:
        field, equals, column = word.partition("=")
        if field not in known or not (equals and column):
            fields = ", ".join(sorted(known))
            raise InputError(
                f"--column {word[:100]!r}: needs FIELD=COLUMN with a field of {task.NAME}: {fields}"
            )
        found[field] = column
    return found


def check_plots(task: ModuleType, folder: Path) -> None:
    """Refuse plots of a task that has none, and a folder that cannot be made."""
    from fastattn import plot

    if task is not classify:
        raise InputError(f"--plots: the task {task.NAME} has none, needs a folder for classify")
    if not plot.is_available():
        raise InputError(f"--plots: needs matplotlib: {plot.INSTALL}")
    there = folder
    while not os.path.lexists(there) and there != there.parent:
        there = there.parent
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise InputError(f"--plots {str(folder)[:200]}: is not a folder that can be created")


def load_folder(folder: Path, task: ModuleType) -> tuple[Any, Any]:
    """The model, on a GPU if there is one, and its tokenizer, which is read first if the folder has it."""
    import torch

    kind: Any = Tokenizer if GPT in task.MODELS else InputTokenizer
    tokenizer = kind.from_pretrained(folder) if (folder / "config.json").is_file() else None
    model: Any = BertForEmbedding.from_pretrained(folder) if task is embed else families.load(folder)
    tokenizer = tokenizer or kind.from_pretrained(model.loaded_from)
    return (model.to("cuda") if torch.cuda.is_available() else model), tokenizer


def settled(task: ModuleType, options: Any, model: Any, tokenizer: Any) -> Any:
    """The options with the folder's kind of a classifier's labels, and its length of windows, unless they say."""
    if task is qa and options.max_length is None and tokenizer.max_length is not None:
        return dataclasses.replace(options, max_length=max_tokens(model, tokenizer))
    if task is classify and options.kind == "auto" and model.config.problem_type in KINDS:
        return dataclasses.replace(options, kind=KINDS[model.config.problem_type])
    return options


def draw(report: Report, folder: Path) -> None:
    """Write reliability.png, and confusion.png where labels are one of several."""
    from fastattn.evaluation.plots import plot_confusion, plot_reliability

    plot_reliability(report, folder / "reliability.png")
    if "confusion" in report.tables:
        plot_confusion(report, folder / "confusion.png")


Method = Callable[
    [Any, Sequence[Any], Sequence[Any]], Report
]  # of the model, the examples and training examples


def method_of(task: ModuleType, name: str, trained: bool) -> Method:
    """A baseline by its name; InputError where the task does not have it, or where it needs training data."""
    methods = METHODS.get(task.NAME, {})
    if name not in {each for group in METHODS.values() for each in group}:
        raise InputError(f"--baseline: got {name!r}, needs one of majority, tfidf, lead, copy")
    if name not in methods:
        has = f"has {', '.join(methods)}" if methods else "has none"
        raise InputError(f"--baseline {name}: is not a method for {task.NAME}, which {has}")
    if (task.NAME, name) in NEED_TRAINING and not trained:
        raise InputError(
            f"--baseline {name}: is trained on labelled data for {task.NAME}, needs --train FILE"
        )
    return methods[name]


def _majority_class(model: Any, examples: Sequence[Any], training: Sequence[Any]) -> Report:
    """The most frequent label of the training data, or else of the data itself; of numbers their mean."""
    seen = [example.label for example in training or examples]
    if classify.kind_of(examples) == classify.REGRESSION:
        mean = np.mean(np.array(seen, float), axis=0)
        return regression.regression([e.label for e in examples], [mean.tolist() for _ in examples])
    if classify.kind_of(examples) == classify.SEVERAL:
        raise ValueError("--baseline majority: needs examples with one label each")
    label = baselines.majority(seen)
    return _one_label(model, examples, [label] * len(examples))


def _tfidf_class(model: Any, examples: Sequence[Any], training: Sequence[Any]) -> Report:
    if classify.kind_of(examples) != classify.SINGLE:
        raise ValueError("--baseline tfidf: needs examples with one label each")
    labels = [str(example.label) for example in training]
    names = sorted(set(labels))
    if len(names) < 2:
        raise ValueError(f"--train: all examples have the label {names[0]!r}, tfidf needs two labels")
    rows = baselines.tfidf_classifier(
        [_whole(e) for e in training], labels, [_whole(e) for e in examples], names
    )
    return _one_label(model, examples, [names[i] for i in rows.argmax(1)])


def _one_label(model: Any, examples: Sequence[Any], predicted: Sequence[str]) -> Report:
    names = list(dict.fromkeys([*model.config.labels(), *(e.label for e in examples), *predicted]))
    place = {name: number for number, name in enumerate(names)}
    rows = np.zeros((len(examples), len(names)))
    rows[np.arange(len(examples)), [place[label] for label in predicted]] = 1.0
    report = classification.single_label([place[e.label] for e in examples], rows, names)
    kept = {name: value for name, value in report.metrics.items() if name not in OF_CLASSES}
    return Report(kept, report.count)


def _whole(example: Any) -> str:
    return example.text if example.text_pair is None else f"{example.text}\n{example.text_pair}"


def _majority_tags(model: Any, examples: Sequence[Any], training: Sequence[Any]) -> Report:
    """Each word gets its most frequent tag in the training data, or O if it does not occur there."""
    tag.check_labels(model, [*training, *examples])
    tags = baselines.tags_by_word([e.tokens for e in training], [e.tags for e in training])
    found = [[tags.get(word, spans.OUTSIDE) for word in e.tokens] for e in examples]
    return tag.report_of(model, examples, found)


def _texts(write: Callable[[str], str]) -> Method:
    def method(model: Any, examples: Sequence[Any], training: Sequence[Any]) -> Report:
        return generation.texts([[e.target] for e in examples], [write(e.source) for e in examples])

    return method


def _tfidf_pairs(model: Any, examples: Sequence[Any], training: Sequence[Any]) -> Report:
    if examples[0].score is None:
        raise ValueError("--baseline tfidf: needs pairs with a score")
    scores = baselines.tfidf_similarity([e.text for e in examples], [e.positive for e in examples])
    report = regression.regression([e.score for e in examples], scores)
    return Report({name: report.metrics[name] for name in ("spearman", "pearson")}, report.count)


METHODS: dict[str, dict[str, Method]] = {
    classify.NAME: {"majority": _majority_class, "tfidf": _tfidf_class},
    tag.NAME: {"majority": _majority_tags},
    embed.NAME: {"tfidf": _tfidf_pairs},
    seq2seq.NAME: {"lead": _texts(baselines.lead), "copy": _texts(str)},
}
NEED_TRAINING = {(classify.NAME, "tfidf"), (tag.NAME, "majority")}
