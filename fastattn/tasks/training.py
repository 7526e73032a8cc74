"""Training code that encoder tasks share: loading or creating the model, encoding, and batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, mse_loss

from fastattn.constants import IGNORE_INDEX
from fastattn.data.corpora import DataError
from fastattn.data.encoding import InputTokenizer, Row
from fastattn.models import BertConfig
from fastattn.models.bert_config import PROBLEM_TYPES
from fastattn.models.checkpoint import Pretrained
from fastattn.models.checkpoint.folder import CONFIG, read_json
from fastattn.models.checkpoint.load import family_of, naming_file
from fastattn.models.embedding import encoder_folder
from fastattn.models.families import class_for
from fastattn.models.losses import widened
from fastattn.models.pretrained import PretrainedEncoder
from fastattn.tasks.batches import max_tokens

Encoder = TypeVar("Encoder", bound=PretrainedEncoder)
Batch = dict[str, Tensor]
Source = Path | str | BertConfig  # a model's folder, or a config for random weights
FINE_TUNING: Mapping[
    str, Any
] = {  # of TrainConfig, unless a task has others; the learning rate follows from the width
    "max_epochs": 3.0,
    "batch_size": 16,
    "min_lr_ratio": 0.0,
    "weight_decay": 0.01,
    "beta2": 0.999,
}
HEADS = ("auto", "new", "saved")
REGRESSION, SINGLE, SEVERAL = PROBLEM_TYPES


def learning_rate(width: int) -> float:
    """The peak learning rate of fine-tuning a model of this width: 2e-4 at 384, 5e-5 at 768, as 1 / width**2."""
    return min(3e-4, 30.0 / width**2)


class Encoded:
    """Rows of tokens with their labels, as items; `collate` makes a batch of items.

    Args:
        rows: the tokens of each item.
        labels: of each item: a number, or a list as long as its tokens, or of the same length for all.
        pad_id: fills short rows; the model computes nothing for padding.
        typed: whether the model takes token types.
        others: further tensors of each item, by their name in the model's forward.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        labels: Sequence[Any],
        *,
        pad_id: int,
        typed: bool,
        others: Mapping[str, Sequence[Any]] | None = None,
    ) -> None:
        self.rows = [(row.ids, row.types) for row in rows]  # offsets, most of a row's memory, are dropped
        self.labels = labels
        self.pad_id, self.typed = pad_id, typed
        self.others = others or {}
        self.cut = sum(row.cut for row in rows)
        self.cut_rows = sum(row.cut > 0 for row in rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[list[int], list[int], Any, dict[str, Any]]:
        others = {name: values[index] for name, values in self.others.items()}
        return (*self.rows[index], self.labels[index], others)

    def collate(self, items: Sequence[tuple[list[int], list[int], Any, dict[str, Any]]]) -> Batch:
        """input_ids, attention_mask, token_type_ids where the model has them, labels and the others."""
        batch = padded(
            [item[0] for item in items], self.pad_id, [item[1] for item in items], typed=self.typed
        )
        batch["labels"] = self.label_tensor([item[2] for item in items], batch["input_ids"].shape[1])
        for name in items[0][3]:
            batch[name] = torch.tensor([item[3][name] for item in items], device="cpu")
        return batch

    def label_tensor(self, labels: Sequence[Any], longest: int) -> Tensor:
        """The labels of a batch."""
        return torch.tensor(labels, device="cpu")


class EncodedTokens(Encoded):
    """The same with a label for each token, -100 after the last."""

    def label_tensor(self, labels: Sequence[Any], longest: int) -> Tensor:
        return torch.tensor([[*row, *[IGNORE_INDEX] * (longest - len(row))] for row in labels], device="cpu")


def padded(
    rows: Sequence[Sequence[int]], pad_id: int, types: Sequence[Sequence[int]] | None, *, typed: bool
) -> Batch:
    """input_ids (B, S), attention_mask (B, S) bool, and token_type_ids (B, S) if `typed`."""
    longest = max(map(len, rows))
    lengths = torch.tensor([len(row) for row in rows], device="cpu")
    batch = {
        "input_ids": torch.tensor([[*row, *[pad_id] * (longest - len(row))] for row in rows], device="cpu"),
        "attention_mask": torch.arange(longest, device="cpu") < lengths[:, None],
    }
    if typed and types is not None:
        batch["token_type_ids"] = torch.tensor(
            [[*row, *[0] * (longest - len(row))] for row in types], device="cpu"
        )
    return batch


def layout_of(model: Any) -> dict[str, Any]:
    """The attributes of a model that `Encoded` needs."""
    return {"pad_id": model.config.pad_token_id or 0, "typed": model.config.type_vocab_size > 1}


def longest_of(model: Any, tokenizer: InputTokenizer, max_length: int | None, *, pairs: bool = False) -> int:
    """Most tokens of a row: `max_length`, or the limit of model and tokenizer; with `pairs`, a row may be of two texts.

    Raises:
        DataError: the model has fewer positions, or special tokens take all of the row.
    """
    limit = max_tokens(model, tokenizer)
    if max_length is None:
        return limit
    check_room(tokenizer, max_length, pairs=pairs)
    config = model.config
    positions = config.max_position_embeddings - config.position_offset
    if config.positions == "learned" and max_length > positions:
        raise DataError(f"task.max_length: got {max_length}, the model has {positions} positions")
    return max_length


def saved_length(model: Any, tokenizer: InputTokenizer, options: Any, *, new: bool) -> int | None:
    """Most tokens of a row, for the tokenizer's files of the trained folder; None where they are right as they are.

    new: whether all weights are trained from the start.
    """
    length: int | None = options.max_length
    return length


def check_room(tokenizer: InputTokenizer, max_length: int, *, pairs: bool = False) -> None:
    """Refuse a length that leaves no token of a text, or with `pairs` of each of two, beside the special tokens."""
    around = tokenizer.special_counts[pairs]
    if max_length < around + 1 + pairs:
        left = "a token of each text is not" if pairs else "no token of a text is"
        raise DataError(
            f"task.max_length: got {max_length}, of which {around} are special tokens: {left} left"
        )


def load_encoder(
    cls: type[Encoder], source: Source, tokenizer: InputTokenizer | None = None, **options: Any
) -> Encoder:
    """A model of a class in float32 and training mode, from a folder or with random weights of a config.

    Args:
        cls: the class.
        source: a folder, or a config for a model with random weights.
        tokenizer: sets the vocabulary size of a model with random weights.
        options: fields of the config; `new`, patterns of parameters that are initialised even if the folder has them.

    Raises:
        ValueError: the folder holds another kind of model.
    """
    if isinstance(source, BertConfig):
        options.pop("new", None)
        assert tokenizer is not None
        core = tokenizer.core
        ids = {
            f"{name}_token_id": core.token_to_id(f"[{name.upper()}]")
            for name in ("pad", "cls", "sep")
            if getattr(source, f"{name}_token_id") is not None  # some families' folders cannot hold them
        }
        if source.position_offset:  # RoBERTa's positions begin after the pad token's
            ids["position_offset"] = (ids["pad_token_id"] or 0) + 1
        config = replace(source, vocab_size=core.get_vocab_size(), **{"num_labels": None, **ids, **options})
        fresh: Any = cls
        made: Encoder = fresh(config).train()
        return made
    model: Any = cls.from_pretrained(encoder_folder(source), dtype=torch.float32, **options)
    trained: Encoder = model.train()
    return trained


def saved_labels(source: Source, cls: type[PretrainedEncoder]) -> tuple[str, ...] | None:
    """The labels of a folder's head if it is of the class and names them, else None; no weight is read."""
    if isinstance(source, BertConfig) or not issubclass(class_for(source), cls):
        return None
    config, _ = config_of(source, cls)
    return None if config.id2label is None else tuple(config.labels())


def chosen_head(source: Source, cls: type[PretrainedEncoder], labels: Sequence[str], head: str) -> list[str]:
    """The labels of the model to make: those of the saved head if it has all of `labels`, else `labels`.

    head: "new" for a new head in any case, "saved" to require the saved one, or "auto".

    Raises:
        DataError: "saved" is given, and there is no saved head or it lacks a label.
    """
    saved = None if head == "new" else saved_labels(source, cls)
    missing = [label for label in labels if saved is None or label not in saved]
    if saved is not None and not missing:
        return list(saved)
    if head == "saved":
        lacks = "has no head of this task" if saved is None else f"has a head without {missing[0]!r}"
        raise DataError(f"task.head: got 'saved', but the model {lacks}")
    return list(labels)


def config_of(source: Path | str, cls: type[Pretrained]) -> tuple[BertConfig, Path]:
    """The configuration of a folder's encoder, and the folder in it that holds it."""
    folder = encoder_folder(source)
    try:
        entries = read_json(folder / CONFIG)
        return family_of(entries, cls.families).read_config(entries), folder
    except ValueError as error:
        raise ValueError(naming_file(error, folder / CONFIG)) from None


def soft_loss(logits: Tensor, teacher: Tensor, temperature: float, problem_type: str | None) -> Tensor:
    """A teacher's part of a classifier's loss, of logits (B, L) and the teacher's (B, L), by the kind of labels.

    One label: `soft_cross_entropy`. Several labels at once: the mean over examples and labels of T^2 times the
    divergence of each label's two probabilities, the sigmoids of logits / T. A regression: the mean squared error,
    which T does not change.
    """
    if problem_type == REGRESSION:
        return mse_loss(widened(logits), widened(teacher))
    if problem_type != SEVERAL:
        return soft_cross_entropy(logits, teacher, temperature)
    given, target = widened(logits) / temperature, widened(teacher) / temperature
    wanted = target.sigmoid()
    yes = wanted * (logsigmoid(target) - logsigmoid(given))
    no = (1 - wanted) * (logsigmoid(-target) - logsigmoid(-given))
    return (yes + no).mean() * temperature**2


def soft_cross_entropy(logits: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Mean over examples of T^2 KL(softmax(teacher / T) || softmax(logits / T)), both (B, L). Hinton et al. 2015."""
    target = (widened(teacher) / temperature).log_softmax(-1)
    given = (widened(logits) / temperature).log_softmax(-1)
    divergence = (target.exp() * (target - given)).sum(-1).mean()
    return divergence * temperature**2
