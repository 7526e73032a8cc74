"""Conversations, rendered by the tokenizer's chat template; the loss is on the assistant's tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastattn.constants import IGNORE_INDEX
from fastattn.data.best_fit import BestFitDataset, packed_sequences
from fastattn.data.chat import ASSISTANT, DEFAULT_TEMPLATE, ChatTemplate, encode_dialogue
from fastattn.data.corpora import DataError
from fastattn.data.records import Record, conversation_of
from fastattn.data.tokenization import Tokenizer
from fastattn.evaluation.report import Report
from fastattn.models import GPT, GPTConfig
from fastattn.models.fields import or_none, positive, size
from fastattn.nn.modes import evaluating
from fastattn.tasks import causal_lm
from fastattn.tasks.distill import Student
from fastattn.tasks.logprobs import logits_of, next_targets
from fastattn.tasks.options import CheckedOptions, part
from fastattn.tasks.perplexity import template_front

NAME = "chat"
MODELS = (GPT,)
FIELDS = ("messages",)
OPTIONAL = ("prompt", "completion")
LABELS: tuple[str, ...] = ()
INPUTS = ("messages", "prompt")
NEW_PARTS: tuple[str, ...] = ()
CHANGES_TOKENIZER = True  # one without a chat template gets one
DEFAULTS = {"max_epochs": 3.0, "batch_size": 8, "lr": 1e-4, "min_lr_ratio": 0.0, "weight_decay": 0.01}
BATCH_SIZE = 8


@dataclass(frozen=True)
class Options(CheckedOptions):
    """How conversations are truncated.

    Args:
        max_length: tokens of a row, and the most of a conversation, which is truncated there; None for 1024, or fewer
            where the model has fewer positions.
        distill_weight: share of the teacher's loss in the total loss.
        temperature: divides the teacher's and the model's logits in the teacher's loss.
    """

    max_length: int | None = None
    distill_weight: float = 0.5
    temperature: float = 2.0

    CHECKS = {  # noqa: RUF012
        "max_length": or_none(size),
        "distill_weight": part,
        "temperature": positive,
    }


@dataclass(frozen=True)
class Example:
    """A conversation: messages with "role" and "content"."""

    where: str
    messages: tuple[dict[str, Any], ...]


def examples_of(records: Sequence[Record], options: Options) -> list[Example]:
    """The examples of records with "messages", or with "prompt" and "completion".

    Raises:
        DataError: a record has neither, or no message of an assistant; with file and line.
    """
    made = []
    for record in records:
        messages = conversation_of(record)
        if not any(message["role"] == ASSISTANT and message["content"].strip() for message in messages):
            raise DataError(f"{record.where}: has no message of the assistant, needs at least one")
        made.append(Example(record.where, tuple(messages)))
    return made


def labels_in(examples: Sequence[Example]) -> None:
    """None: the labels are the assistant's tokens."""


def check_examples(examples: Sequence[Example]) -> None:
    """Accept all examples; `training_set` checks the rendered conversations."""


def best(examples: Sequence[Example]) -> tuple[str, bool]:
    """The metric that selects the best model, and whether higher is better."""
    return "loss", False


def new_model(
    source: Path | str | GPTConfig, examples: Sequence[Example], options: Options, tokenizer: Tokenizer
) -> Student:
    """The folder's model, or one of a config with random weights. A tokenizer without a chat template gets one."""
    if tokenizer.chat_template is None:
        tokenizer.chat_template = DEFAULT_TEMPLATE
    return causal_lm.new_model(source, (), options, tokenizer)


def training_set(
    model: Any,
    tokenizer: Tokenizer,
    examples: Sequence[Example],
    options: Options,
    *,
    teacher: tuple[GPT, Tokenizer] | None = None,
) -> BestFitDataset:
    """The conversations packed by best fit, each a segment of its own; only the assistant's tokens are labels.

    Raises:
        DataError: the template raises an error for a conversation, or no label is a token that ends a turn.
    """
    ends = ends_of(model, tokenizer)
    data = packed(model, tokenizer, examples, options, ends)
    check_ends(data, tokenizer, ends)
    if teacher is not None:
        causal_lm.attach_teacher(model, tokenizer, teacher, options)
    return data


def dev_set(
    model: Any, tokenizer: Tokenizer, examples: Sequence[Example], options: Options
) -> BestFitDataset:
    """The same for the dev set, whose truncated conversations may all lack the token that ends a turn."""
    return packed(model, tokenizer, examples, options, ends_of(model, tokenizer))


def sample(model: Any, tokenizer: Tokenizer, examples: Sequence[Example], options: Options) -> str:
    """The first conversation up to an answer of the assistant, and the model's greedy answer."""
    asked = next((before for example in examples for before in [_asked(example.messages)] if before), None)
    if asked is None:
        return "no sample: no conversation has a message before one of the assistant"
    prompt = ChatTemplate.of(tokenizer).render(asked, add_generation_prompt=True)
    front = template_front(tokenizer)
    ids = tokenizer.encode(prompt)
    ids = ids if ids[: len(front)] == front else [*front, *ids]
    return f"{asked[-1]['content']} -> {causal_lm.written(model, tokenizer, ids, prompt=False).strip()}"


def _asked(messages: Sequence[dict[str, Any]]) -> Sequence[dict[str, Any]]:
    """The messages before the first answer of the assistant that follows another message; empty without one."""
    places = (number for number, message in enumerate(messages) if number and message["role"] == ASSISTANT)
    return messages[: next(places, 0)]


def packed(
    model: Any, tokenizer: Tokenizer, examples: Sequence[Example], options: Options, ends: Sequence[int]
) -> BestFitDataset:
    """The conversations in rows; DataError where no row has a token of the assistant."""
    limit = causal_lm.block_length(model, options)
    sequences, dropped, cut_rows = dialogues(tokenizer, examples, limit, ends)
    try:
        data = packed_sequences(sequences, limit, pad_id=tokenizer.pad_id, dropped=dropped)
    except ValueError:
        raise DataError(
            f"data: no conversation has a token of the assistant within its first {limit} tokens"
        ) from None
    data.cut_rows = cut_rows
    return data


def dialogues(
    tokenizer: Tokenizer, examples: Sequence[Example], limit: int, ends: Sequence[int]
) -> tuple[list[tuple[list[int], list[bool]]], int, int]:
    """The first `limit` tokens of each conversation, and whether each is the assistant's; the tokens and texts cut."""
    template = ChatTemplate.of(tokenizer)
    front = template_front(tokenizer)
    sequences = []
    dropped = cut_rows = 0
    for example in examples:
        try:
            dialogue = encode_dialogue(tokenizer, template, example.messages, ends)
        except DataError as error:
            raise DataError(f"{example.where}: {error}") from None
        ids, said = dialogue.ids, dialogue.said
        if front and ids[: len(front)] != front:  # the chat template leaves the BOS to the tokenizer
            ids, said = [*front, *ids], [False] * len(front) + said
        dropped += max(0, len(ids) - limit)
        cut_rows += len(ids) > limit
        sequences.append((ids[:limit], said[:limit]))
    return sequences, dropped, cut_rows


def ends_of(model: Any, tokenizer: Tokenizer) -> list[int]:
    """The tokens that end generation: those of generation_config, else of config, and the tokenizer's."""
    named = (model.generation_config or {}).get("eos_token_id")
    named = getattr(model.config, "eos_token_id", None) if named is None else named
    ids = named if isinstance(named, (list, tuple)) else [named]
    vocab_size = min(tokenizer.vocab_size, model.config.vocab_size)
    return list(
        dict.fromkeys([tokenizer.eos_id, *(i for i in ids if isinstance(i, int) and 0 <= i < vocab_size)])
    )


def check_ends(data: Any, tokenizer: Tokenizer, ends: Sequence[int]) -> None:
    """Refuse data in which no label is a token that ends a turn: the model would never learn to stop.

    Raises:
        DataError: says whether the template does not write the token, or the token is outside of the labels.
    """
    written = False
    wanted = torch.tensor(list(ends), device="cpu")
    for i in range(len(data)):
        row = data[i]
        if bool(torch.isin(next_targets(row["labels"][None]), wanted).any()):
            return
        written |= bool(((row["segment_ids"] >= 0) & torch.isin(row["input_ids"], wanted)).any())
    names = " or ".join(repr(tokenizer.core.id_to_token(i)) for i in ends)
    why = "the chat template does not write it after the assistant's text, or every conversation is truncated before it"
    if written:
        why = "it is outside of the assistant's part, or labels are masked at its positions"
    if written and tokenizer.pad_id in ends:
        why += f" (the padding token is {tokenizer.pad_token!r} too: labels must not be masked by it)"
    raise DataError(f"chat: the token that ends a turn, {names}, is never a label: {why}")


@torch.no_grad()
def evaluate(
    model: Any,
    tokenizer: Tokenizer,
    examples: Sequence[Example],
    *,
    batch_size: int = BATCH_SIZE,
    options: Options | None = None,
) -> Report:
    """loss (nats), perplexity and accuracy of the assistant's tokens, and end_accuracy of the tokens that end a turn.

    Accuracies are shares of the tokens that are the likeliest at their position. count: tokens of the assistant.
    """
    options = options or Options()
    ends = ends_of(model, tokenizer)
    data = packed(model, tokenizer, examples, options, ends)
    device = next(model.parameters()).device
    wanted = torch.tensor(ends, device=device)
    loss_sum = 0.0
    right = count = ended = turns = 0
    with evaluating(model):
        for start in range(0, len(data), batch_size):
            items = [data[i] for i in range(start, min(start + batch_size, len(data)))]
            batch = {name: torch.stack([item[name] for item in items]).to(device) for name in items[0]}
            targets = next_targets(batch["labels"], batch["segment_ids"])
            counted = targets != IGNORE_INDEX
            hidden = model(batch["input_ids"], segment_ids=batch["segment_ids"], return_logits=False)
            for x, y in zip(hidden.last_hidden_state[counted].split(512), targets[counted].split(512)):
                logits = logits_of(model, x)
                loss_sum += float(torch.nn.functional.cross_entropy(logits, y, reduction="sum"))
                hit = logits.argmax(-1) == y
                of_end = torch.isin(y, wanted)
                right, count = right + int(hit.sum()), count + len(y)
                ended, turns = ended + int((hit & of_end).sum()), turns + int(of_end.sum())
    loss = loss_sum / count
    return Report(
        metrics={
            "loss": loss,
            "perplexity": float(torch.tensor(loss, dtype=torch.float64, device="cpu").exp()),
            "accuracy": right / count,
            "end_accuracy": ended / turns if turns else float("nan"),
        },
        count=count,
    )
