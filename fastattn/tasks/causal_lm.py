"""Next-token prediction on plain text: documents packed into blocks, without attention between documents."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fastattn.data.best_fit import BestFitDataset
from fastattn.data.corpora import DataError
from fastattn.data.packing import PackedDataset, TokenStream
from fastattn.data.tokenization import Tokenizer
from fastattn.evaluation.report import Report
from fastattn.models import GPT, GPTConfig
from fastattn.models.fields import one_of, or_none, positive, size
from fastattn.tasks.distill import Student
from fastattn.tasks.documents import Example as Example
from fastattn.tasks.documents import best as best
from fastattn.tasks.documents import check_examples as check_examples
from fastattn.tasks.documents import examples_of as examples_of
from fastattn.tasks.documents import labels_in as labels_in
from fastattn.tasks.options import CheckedOptions, part
from fastattn.tasks.perplexity import BATCH_SIZE, bos_of, evaluate_documents

NAME = "causal-lm"
MODELS = (GPT,)
FIELDS = ("text",)
OPTIONAL: tuple[str, ...] = ()
LABELS: tuple[str, ...] = ()
NEW_PARTS: tuple[str, ...] = ()
DEFAULTS = {"max_epochs": 1.0, "batch_size": 16, "lr": 3e-4}
MAX_LENGTH = 1024  # default tokens of a block
PROMPT, NEW_TOKENS = 8, 32  # of a sample
BEST_FIT, BLOCKS, STREAM = "best-fit", "blocks", "stream"


@dataclass(frozen=True)
class Options(CheckedOptions):
    """How text is divided into blocks.

    Args:
        max_length: tokens of a block, and of a window in evaluation; None for 1024, or fewer where the model has fewer
            positions.
        packing: "best-fit" keeps documents whole where they fit into a block, each after the BOS that the model
            expects; "blocks" fills every block and splits documents at its end, without attention between documents;
            "stream" does the same with attention between them, for one long text.
        stride: tokens that each further window of a long document predicts in evaluation; None for half of max_length.
        distill_weight: share of the teacher's loss in the total loss.
        temperature: divides the teacher's and the model's logits in the teacher's loss.
    """

    max_length: int | None = None
    packing: str = BEST_FIT
    stride: int | None = None
    distill_weight: float = 0.5
    temperature: float = 2.0

    CHECKS = {  # noqa: RUF012
        "max_length": or_none(size),
        "packing": one_of((BEST_FIT, BLOCKS, STREAM)),
        "stride": or_none(size),
        "distill_weight": part,
        "temperature": positive,
    }


def new_model(
    source: Path | str | GPTConfig, examples: Sequence[Example], options: Any, tokenizer: Tokenizer
) -> Student:
    """The folder's model, or one of a config with random weights and the tokenizer's vocabulary."""
    if isinstance(source, GPTConfig):
        eos = tokenizer.eos_id
        sized: dict[str, Any] = {"vocab_size": tokenizer.vocab_size, "eos_token_id": eos, "bos_token_id": eos}
        return Student(replace(source, pad_token_id=None, **sized)).train()
    return Student.from_pretrained(source, dtype=torch.float32).train()


def attach_teacher(
    model: Student, tokenizer: Tokenizer, teacher: tuple[GPT, Tokenizer], options: Any
) -> None:
    """Give the model a teacher, which must have the same tokens and a position for each of a block.

    Raises:
        DataError: the teacher's tokens differ, or it has fewer positions.
    """
    theirs, their_tokenizer = teacher
    if their_tokenizer.core.get_vocab() != tokenizer.core.get_vocab():
        raise DataError(
            "--teacher: its tokenizer has other tokens than the model's; soft labels need the same ones"
        )
    length, positions = block_length(model, options), theirs.max_positions
    if positions is not None and positions < length:
        raise DataError(
            f"--teacher: has {positions} positions, rows of this run have {length} tokens; "
            f"task.max_length={positions} fits"
        )
    model.learn_from(theirs, weight=options.distill_weight, temperature=options.temperature)


def block_length(model: Any, options: Any) -> int:
    """Tokens of a block; DataError where the model has fewer positions."""
    positions = model.config.n_positions - model.config.position_offset
    if options.max_length is None:
        return min(MAX_LENGTH, positions)
    if options.max_length > positions:
        raise DataError(f"task.max_length: got {options.max_length}, the model has {positions} positions")
    return options.max_length


def check_stride(options: Options, length: int) -> int:
    """The length of a window; DataError where the stride of an evaluation is not less."""
    if options.stride is not None and options.stride >= length:
        raise DataError(f"task.stride: got {options.stride}, needs less than the {length} tokens of a window")
    return length


def training_set(
    model: Any,
    tokenizer: Tokenizer,
    examples: Iterable[Example],
    options: Options,
    folder: Path | None = None,
    *,
    reuse: bool = False,
    teacher: tuple[GPT, Tokenizer] | None = None,
) -> PackedDataset | BestFitDataset:
    """The examples as blocks of tokens; with a folder, in memory-mapped files there.

    reuse: the folder holds the files of an earlier call with the same arguments, and no example is read.

    Raises:
        DataError: the text has fewer than two tokens, an option does not fit the model, or the teacher's tokens differ.
    """
    length = check_stride(options, block_length(model, options))
    if reuse and folder is not None:
        stream = TokenStream.load(folder)
    else:
        stream = TokenStream.build((example.text for example in examples), tokenizer, folder)
    data: PackedDataset | BestFitDataset
    try:
        if options.packing == BEST_FIT:
            bos_id = bos_of(model, tokenizer)
            data = BestFitDataset.of_stream(stream, length, bos_id=bos_id, pad_id=tokenizer.pad_id)
        else:
            segments = options.packing == BLOCKS
            data = PackedDataset(stream, length, pad_id=tokenizer.pad_id, segments=segments)
    except ValueError as error:
        raise DataError(f"data: {error}") from None
    if teacher is not None:
        attach_teacher(model, tokenizer, teacher, options)
    return data


def sample(model: Any, tokenizer: Tokenizer, examples: Sequence[Example], options: Any) -> str:
    """The beginning of the first document and the model's greedy continuation."""
    ids = tokenizer.encode(examples[0].text)[:PROMPT]
    bos_id = bos_of(model, tokenizer)
    return written(model, tokenizer, ids if bos_id is None else [bos_id, *ids])


def written(model: Any, tokenizer: Tokenizer, ids: Sequence[int], *, prompt: bool = True) -> str:
    """The text of a prompt, truncated on the left, and its greedy continuation, or of the continuation alone."""
    positions = model.max_positions
    room = NEW_TOKENS if positions is None else min(NEW_TOKENS, positions - 1)
    kept = list(ids) if positions is None else list(ids)[room - positions :]
    given = torch.tensor([kept], device=next(model.parameters()).device)
    made = model.generate(given, max_new_tokens=room, do_sample=False, num_beams=1, num_return_sequences=1)
    return tokenizer.decode(made[0, 0 if prompt else len(kept) :])


def evaluate(
    model: Any,
    tokenizer: Tokenizer,
    examples: Sequence[Example],
    *,
    batch_size: int = BATCH_SIZE,
    options: Options | None = None,
) -> Report:
    """Loss per token, perplexity and bits per byte of the documents, see `perplexity.evaluate_documents`."""
    options = options or Options()
    length = check_stride(options, block_length(model, options))
    return evaluate_documents(
        model,
        tokenizer,
        (example.text for example in examples),
        batch_size=batch_size,
        max_length=length,
        stride=options.stride,
    )
