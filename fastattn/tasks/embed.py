"""Texts as vectors; trained from pairs of texts that mean the same."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.data.corpora import DataError
from fastattn.data.encoding import InputTokenizer, Row
from fastattn.data.records import Record, text_of
from fastattn.evaluation.regression import regression, similarities
from fastattn.evaluation.report import Report
from fastattn.models import Bert, BertConfig, BertForEmbedding
from fastattn.models.embedding import POOLINGS
from fastattn.models.families import class_for
from fastattn.models.fields import one_of, or_none, positive, size
from fastattn.models.losses import widened
from fastattn.tasks.batches import BATCH_SIZE, run
from fastattn.tasks.options import CheckedOptions
from fastattn.tasks.training import (
    FINE_TUNING,
    Batch,
    Source,
    layout_of,
    load_encoder,
    longest_of,
    padded,
)

NAME = "embed"
MODELS = (BertForEmbedding, Bert)
FIELDS = ("text",)
OPTIONAL: tuple[str, ...] = ()
LABELS = ("positive",)
EXTRA = ("negative", "score")
TEXTS = ("text", "positive", "negative")  # what cleaning reads
NEW_PARTS: tuple[str, ...] = ()
SAME = 1e-6  # difference of cosines that rounding in float32 makes
DEFAULTS = {**FINE_TUNING, "max_epochs": 1.0, "batch_size": 64, "lr": 2e-5}


@dataclass(frozen=True)
class Options(CheckedOptions):
    """Options of sentence embeddings.

    Args:
        max_length: most tokens of a text, which is truncated there; None for the limit of the model's folder.
        scale: factor of the cosines in the contrastive loss, 1 / temperature.
        pooling: "mean", "cls" or "max"; None for the folder's.
    """

    max_length: int | None = None
    scale: float = 20.0
    pooling: str | None = None

    CHECKS = {  # noqa: RUF012
        "max_length": or_none(size),
        "scale": positive,
        "pooling": or_none(one_of(POOLINGS)),
    }


@dataclass(frozen=True)
class Example:
    """A text, a positive (a text that means the same) and optional negatives; or two texts and their similarity."""

    where: str
    text: str
    positive: str
    negatives: tuple[str, ...]
    score: float | None


class ContrastiveOutput(NamedTuple):
    """The loss of a batch of pairs, and the vectors of its texts; loss is None without labels."""

    loss: Tensor | None  # ()
    embeddings: Tensor  # (N, E)


def examples_of(records: Sequence[Record], options: Options) -> list[Example]:
    """The examples of records with "text", "positive", and perhaps "negative" (a text or a list) or "score".

    A score is the similarity of both texts, on any scale, for evaluations. Either all records have one or none.

    Raises:
        DataError: a record lacks a column, or has another number of negatives than the first; with file and line.
    """
    made: list[Example] = []
    for record in records:
        score = record.fields.get("score")
        if isinstance(score, str):
            try:
                score = float(score)
            except ValueError:
                raise DataError(f"{record.where}: score is {score!r:.40}, needs a number") from None
        if score is not None and (
            isinstance(score, bool) or not isinstance(score, (int, float)) or not math.isfinite(score)
        ):
            raise DataError(f"{record.where}: score is {score!r:.40}, needs a finite number")
        texts = text_of(record, "text"), text_of(record, "positive")
        made.append(
            Example(record.where, *texts, _negatives(record), None if score is None else float(score))
        )
        if len(made[-1].negatives) != len(made[0].negatives):
            raise DataError(
                f"{record.where}: has {len(made[-1].negatives)} negatives, {made[0].where} has {len(made[0].negatives)}"
            )
        if (made[-1].score is None) != (made[0].score is None):
            raise DataError(
                f"{record.where}: has {'a' if made[0].score is None else 'no'} score, unlike the others"
            )
    return made


def labels_in(examples: Sequence[Example]) -> None:
    """None: vectors have no labels."""


def check_examples(examples: Sequence[Example]) -> None:
    """Refuse training data from which nothing can be learnt."""
    if examples[0].score is not None:
        raise DataError(
            f"{examples[0].where}: has a score, training needs pairs that mean the same, without a score"
        )
    if len({example.positive for example in examples}) < 2:
        raise DataError(f"data: all {len(examples)} examples have the same positive, needs two")


def least_batch(examples: Sequence[Example]) -> int:
    """The smallest batch size: without negatives of its own, a pair needs another pair in its batch as its negative."""
    return 1 if examples[0].negatives else 2


def best(examples: Sequence[Example]) -> tuple[str, bool]:
    """The metric that selects the best model, and whether higher is better."""
    return ("spearman" if examples and examples[0].score is not None else "accuracy"), True


class ContrastiveEmbedding(BertForEmbedding):
    """Vectors, and with `labels` the contrastive loss of a batch: every other positive is a negative.

    The batch holds N anchors, their N positives and then k times N negatives. loss = mean over anchors i of
    -log softmax(scale * cos(a_i, .))[i] over all positives and negatives: sentence-transformers'
    MultipleNegativesRankingLoss (Henderson et al. 2017). Texts equal to the positive of i are left out for i.
    """

    scale = 20.0

    def forward(
        self, *args: Any, labels: Tensor | None = None, same: Tensor | None = None, **kwargs: Any
    ) -> Any:
        """labels (N,): the column of each anchor's positive; same: (N, (1 + k) N) bool, columns that are left out."""
        output = super().forward(*args, **kwargs)
        if labels is None:
            return output
        vectors = F.normalize(widened(output.embeddings), dim=-1)  # ((2 + k) N, E)
        scores = self.scale * vectors[: len(labels)] @ vectors[len(labels) :].T  # (N, (1 + k) N)
        if same is not None:
            scores = scores.masked_fill(same, -torch.inf)
        return ContrastiveOutput(F.cross_entropy(scores, labels), output.embeddings)


class Pairs:
    """Rows of tokens of each example's texts as items, and the batches that `ContrastiveEmbedding` takes."""

    def __init__(
        self, rows: Sequence[Sequence[Row]], texts: Sequence[Sequence[str]], *, pad_id: int, typed: bool
    ):
        self.rows = [[(row.ids, row.types) for row in each] for each in rows]
        numbers: dict[str, int] = {}
        self.texts = [[numbers.setdefault(text, len(numbers)) for text in each] for each in texts]
        self.pad_id, self.typed = pad_id, typed
        every = [row for each in rows for row in each]
        self.cut, self.cut_rows = sum(row.cut for row in every), sum(row.cut > 0 for row in every)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[list[Any], list[int]]:
        return self.rows[index], self.texts[index]

    def collate(self, items: Sequence[tuple[list[Any], list[int]]]) -> Batch:
        """All anchors, then all positives, then all first negatives and so on, with labels and `same`."""
        rows = [row for column in zip(*(rows for rows, _ in items)) for row in column]
        texts = torch.tensor([texts for _, texts in items], device="cpu").T  # (2 + k, N)
        count = len(items)
        batch = padded([row[0] for row in rows], self.pad_id, [row[1] for row in rows], typed=self.typed)
        candidates = texts[1:].flatten()  # ((1 + k) N,)
        same = candidates[:count, None] == candidates[None]
        same[torch.arange(count, device="cpu"), torch.arange(count, device="cpu")] = False
        return {**batch, "labels": torch.arange(count, device="cpu"), "same": same}


def new_model(
    source: Source, examples: Sequence[Example], options: Options, tokenizer: InputTokenizer | None = None
) -> ContrastiveEmbedding:
    """The folder's model, or a preset's; any other head is dropped."""
    if isinstance(source, BertConfig):
        model = load_encoder(ContrastiveEmbedding, source, tokenizer)
        model.pooling = options.pooling or "mean"
    else:
        cls = class_for(source)
        keeps = issubclass(cls, BertForEmbedding)
        made = ContrastiveEmbedding.from_pretrained(source, pooling=options.pooling, dtype=torch.float32)
        model = made.train()
        if not keeps and options.pooling is None:
            model.pooling = "mean"
    model.scale = options.scale
    if options.max_length is not None:
        model.max_seq_length = options.max_length
    return model


def training_set(
    model: Any, tokenizer: InputTokenizer, examples: Sequence[Example], options: Options
) -> Pairs:
    """The examples as items: the tokens of text, positive and negatives."""
    texts = [[e.text, e.positive, *e.negatives] for e in examples]
    flat = rows_of(model, tokenizer, [text for each in texts for text in each], options)
    width = len(texts[0])
    rows = [flat[start : start + width] for start in range(0, len(flat), width)]
    return Pairs(rows, texts, **layout_of(model))


def longest_read(model: Any, tokenizer: InputTokenizer, asked: int | None = None) -> int:
    """Most tokens of a text that are read: the folder's limit, and `asked`."""
    longest = longest_of(model, tokenizer, asked)
    return longest if model.max_seq_length is None else min(longest, model.max_seq_length)


def _row(ids: list[int]) -> Row:
    return Row(ids, [0] * len(ids), [(0, 0)] * len(ids), [0] * len(ids))


def rows_of(model: Any, tokenizer: InputTokenizer, texts: Sequence[str], options: Options) -> list[Row]:
    """The tokens of texts, prepared as `BertForEmbedding.encode` does."""
    return tokenizer.encode(model.prepared(texts), longest_read(model, tokenizer, options.max_length))


def evaluate(
    model: Any,
    tokenizer: InputTokenizer,
    examples: Sequence[Example],
    *,
    batch_size: int = BATCH_SIZE,
    options: Options | None = None,
) -> Report:
    """With scores, their correlation with the cosines of the pairs; without, how often the positive is the nearest.

    accuracy is the share of texts whose own positive is the nearest of all different positives of the set, and mrr the
    mean of 1 / its rank. Of n positives that are equally near each is the nearest to a share of 1 / n, and has the mean
    of their ranks.
    """
    options = options or Options()
    texts = list(dict.fromkeys(text for e in examples for text in (e.text, e.positive)))
    rows = rows_of(model, tokenizer, texts, options)
    vectors = run(model, rows, batch_size, lambda out, i, _: out.embeddings[i].float().cpu())
    of_text = dict(zip(texts, vectors))
    first = torch.stack([of_text[e.text] for e in examples])
    if examples[0].score is not None:
        second = torch.stack([of_text[e.positive] for e in examples])
        found = regression([e.score or 0.0 for e in examples], similarities(first.numpy(), second.numpy()))
        return Report({name: found.metrics[name] for name in ("spearman", "pearson")}, found.count)
    positives = list(dict.fromkeys(e.positive for e in examples))
    place = {text: number for number, text in enumerate(positives)}
    matrix = F.normalize(torch.stack([of_text[text] for text in positives]), dim=-1)  # (P, E)
    ranks, first_of = [], []
    for start in range(0, len(examples), 1024):
        scores = F.normalize(first[start : start + 1024], dim=-1) @ matrix.T
        own = torch.tensor([place[e.positive] for e in examples[start : start + 1024]], device="cpu")
        mine = scores.gather(1, own[:, None])
        nearer = (scores > mine + SAME).sum(1)
        # its own is among them; all are where vectors are not finite
        tied = (~(scores < mine - SAME)).sum(1) - nearer
        ranks += (nearer + (tied + 1) / 2).tolist()
        first_of += torch.where(nearer == 0, 1 / tied, 0.0).tolist()
    metrics = {
        "accuracy": sum(first_of) / len(first_of),
        "mrr": sum(1 / rank for rank in ranks) / len(ranks),
    }
    return Report(metrics=metrics, count=len(ranks))


def predict(
    model: BertForEmbedding,
    tokenizer: InputTokenizer,
    examples: Sequence[dict[str, Any]],
    *,
    batch_size: int = BATCH_SIZE,
    max_length: int | None = None,
) -> list[dict[str, Any]]:
    """The vectors of texts, as lists.

    Texts are prepared as in `BertForEmbedding.encode`: in lower case and with the default prompt where the folder
    asks for these.

    Args:
        model, tokenizer: the model, run in eval mode on its device, and its tokenizer.
        examples: dicts with "text"; or with "ids", token ids that are read as they are, special tokens and all, at most
            `longest_read` of them.
        batch_size: texts at a time.
        max_length: most tokens of a text, which is truncated there; None for the limit of the folder.

    Returns:
        For each example {"embedding": E numbers, "cut": the number of truncated tokens}.
    """
    texts = [e["text"] for e in examples if "ids" not in e]
    made = iter(rows_of(model, tokenizer, texts, Options(max_length=max_length)) if texts else ())
    rows = [_row(e["ids"]) if "ids" in e else next(made) for e in examples]
    found = run(model, rows, batch_size, lambda out, i, _: out.embeddings[i].tolist())
    return [{"embedding": vector, "cut": row.cut} for vector, row in zip(found, rows)]


def line(prediction: dict[str, Any]) -> str:
    """The vector's numbers, separated by spaces."""
    return " ".join(f"{number:.6g}" for number in prediction["embedding"])


def _negatives(record: Record) -> tuple[str, ...]:
    given = record.fields.get("negative")
    if given is None or isinstance(given, str):
        return () if given is None else (text_of(record, "negative"),)
    if not isinstance(given, list):
        raise DataError(
            f"{record.where}: negative is a {type(given).__name__}, needs a text or a list of texts"
        )
    return tuple(text_of(Record(record.where, {"negative": each}), "negative") for each in given)
