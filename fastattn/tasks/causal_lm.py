"""The next token of plain text: documents packed into blocks in which they do not see each other."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastattn.constants import IGNORE_INDEX
from fastattn.data.corpora import DataError
from fastattn.data.packing import PackedDataset, TokenStream
from fastattn.data.records import Record, text_of
from fastattn.data.tokenization import Tokenizer
from fastattn.evaluation.language import language
from fastattn.evaluation.report import Report
from fastattn.models import GPT, GPTConfig
from fastattn.models.config import PRESETS
from fastattn.models.fields import flag, or_none, size
from fastattn.tasks.options import CheckedOptions

NAME = "causal-lm"
MODELS = (GPT,)
FIELDS = ("text",)
OPTIONAL: tuple[str, ...] = ()
LABELS: tuple[str, ...] = ()
NEW_PARTS: tuple[str, ...] = ()
DEFAULTS = {"max_epochs": 1.0, "batch_size": 16, "lr": 3e-4}
MAX_LENGTH = 1024  # tokens of a block, where nothing else is asked for
BATCH_SIZE = 8


@dataclass(frozen=True)
class Options(CheckedOptions):
    """How text is cut.

    Args:
        max_length: tokens of a block; None for 1024, or fewer where the model has fewer positions.
        segments: whether documents that share a block are hidden from each other.
    """

    max_length: int | None = None
    segments: bool = True

    CHECKS = {"max_length": or_none(size), "segments": flag}  # noqa: RUF012


@dataclass(frozen=True)
class Example:
    """A document."""

    where: str
    text: str


def examples_of(records: Sequence[Record], options: Options) -> list[Example]:
    """The examples of records with "text".

    Raises:
        DataError: a record lacks it; with file and line.
    """
    return [Example(record.where, text_of(record, "text")) for record in records]


def labels_in(examples: Sequence[Example]) -> None:
    """None: the next tokens are the labels."""


def check_examples(examples: Sequence[Example]) -> None:
    """Nothing to refuse: any text will do."""


def best(examples: Sequence[Example]) -> tuple[str, bool]:
    """The figure that picks the best model, and whether more of it is better."""
    return "loss", False


def new_model(
    source: Path | str, examples: Sequence[Example], options: Options, tokenizer: Tokenizer, **fields: Any
) -> GPT:
    """The folder's model, or a preset's with random weights and the tokenizer's vocabulary.

    fields: of a preset's `GPTConfig`, in place of its own.
    """
    if str(source) in PRESETS and not Path(source).is_dir():
        eos = tokenizer.eos_id
        sized = {"vocab_size": tokenizer.vocab_size, "eos_token_id": eos, "bos_token_id": eos, **fields}
        return GPT(GPTConfig.preset(str(source), **sized)).train()
    return GPT.from_pretrained(source, dtype=torch.float32).train()


def block_length(model: Any, options: Options) -> int:
    """Tokens of a block; DataError where the model has fewer positions."""
    positions = model.config.n_positions
    if options.max_length is None:
        return min(MAX_LENGTH, positions)
    if options.max_length > positions:
        raise DataError(f"task.max_length: got {options.max_length}, the model has {positions} positions")
    return options.max_length


def training_set(
    model: Any, tokenizer: Tokenizer, examples: Iterable[Example], options: Options, folder: Path | None = None
) -> PackedDataset:
    """The examples as blocks of tokens; with a folder they are in files there, memory-mapped.

    Raises:
        DataError: the text has fewer than two tokens.
    """
    stream = TokenStream.build((example.text for example in examples), tokenizer, folder)
    try:
        return PackedDataset(
            stream, block_length(model, options), pad_id=tokenizer.pad_id, segments=options.segments
        )
    except ValueError as error:
        raise DataError(f"data: {error}") from None


@torch.no_grad()
def evaluate(
    model: Any,
    tokenizer: Tokenizer,
    examples: Sequence[Example],
    *,
    batch_size: int = BATCH_SIZE,
    options: Options | None = None,
) -> Report:
    """Loss per token and bits per byte of the documents, cut into blocks as in training."""
    data = training_set(model, tokenizer, examples, options or Options())
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    loss_sum, count = 0.0, 0
    try:
        for start in range(0, len(data), batch_size):
            items = [data[i] for i in range(start, min(start + batch_size, len(data)))]
            batch = {name: torch.stack([item[name] for item in items]).to(device) for name in items[0]}
            targets = int((batch["labels"][:, 1:] != IGNORE_INDEX).sum())
            if targets:
                loss_sum += float(model(**batch, return_logits=False).loss) * targets
                count += targets
    finally:
        model.train(was_training)
    return language(loss_sum, count, sum(len(e.text.encode()) for e in examples), documents=len(examples))
