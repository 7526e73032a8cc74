"""Masked language modelling and next-sentence prediction on plain text: BERT's two objectives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, pad

from fastattn.constants import IGNORE_INDEX
from fastattn.data.corpora import DataError
from fastattn.data.encoding import InputTokenizer
from fastattn.evaluation.report import Report
from fastattn.models import BertConfig, BertForMaskedLM, BertForPreTraining
from fastattn.models.families import class_for
from fastattn.models.fields import flag, or_none, positive, size
from fastattn.nn.modes import evaluating
from fastattn.tasks.batches import BATCH_SIZE, wide
from fastattn.tasks.documents import Example as Example
from fastattn.tasks.documents import best as best
from fastattn.tasks.documents import check_examples as check_examples
from fastattn.tasks.documents import examples_of as examples_of
from fastattn.tasks.documents import labels_in as labels_in
from fastattn.tasks.options import CheckedOptions, part, share
from fastattn.tasks.passages import Around, Passage, pairs, sentences_of, singles
from fastattn.tasks.stored_passages import StoredPassages, stored_passages
from fastattn.tasks.taught import TaughtMaskedLM, TaughtPreTraining, attach_teacher
from fastattn.tasks.training import Batch, Source, config_of, layout_of, load_encoder, longest_of, padded

NAME = "masked-lm"
MODELS = (BertForMaskedLM, BertForPreTraining)
FIELDS = ("text",)
OPTIONAL: tuple[str, ...] = ()
LABELS: tuple[str, ...] = ()
NEW_PARTS: tuple[str, ...] = ()  # with adapters, only heads that are new are trained
DEFAULTS = {
    "max_epochs": 3.0,
    "batch_size": 32,
    "lr": 1e-4,
    "min_lr_ratio": 0.0,
    "weight_decay": 0.01,
    "beta2": 0.98,
}
MASKED, RANDOM = 0.8, 0.1  # shares of the chosen tokens; the rest are kept. Devlin et al. 2019
MAX_LENGTH = 128  # default tokens of a passage
SEED = 0  # of the masks of an evaluation


@dataclass(frozen=True)
class Options(CheckedOptions):
    """How words are masked.

    Args:
        max_length: tokens of a passage, special ones included; None for 128, or fewer where the model has fewer.
        mask_share: share of the tokens that are predicted.
        whole_words: whether all pieces of a word are chosen together.
        next_sentence: whether an example is two passages, and the model also predicts whether the second follows.
        distill_weight: share of the teacher's loss in the whole.
        temperature: of the teacher's and the model's logits in that loss.
    """

    max_length: int | None = None
    mask_share: float = 0.15
    whole_words: bool = False
    next_sentence: bool = False
    distill_weight: float = 0.5
    temperature: float = 2.0

    CHECKS = {  # noqa: RUF012
        "max_length": or_none(size),
        "mask_share": share,
        "whole_words": flag,
        "next_sentence": flag,
        "distill_weight": part,
        "temperature": positive,
    }


def least_documents(options: Options) -> int:
    """The fewest documents of a set: the second of two passages may have to come from another one."""
    return 2 if options.next_sentence else 1


def new_model(
    source: Source, examples: Sequence[Example], options: Options, tokenizer: InputTokenizer | None = None
) -> TaughtMaskedLM | TaughtPreTraining:
    """The folder's or preset's encoder with its masked LM head, or a new one."""
    cls: Any = TaughtPreTraining if options.next_sentence else TaughtMaskedLM
    return load_encoder(cls, source, tokenizer, new=_new_parts(source, options))


def _new_parts(source: Source, options: Options) -> tuple[str, ...]:
    """The parts of the heads that a folder lacks, by the class that wrote it."""
    if isinstance(source, BertConfig):
        return ()
    cls = class_for(source)
    config, _ = config_of(source, cls)
    new = []
    if not issubclass(cls, (BertForMaskedLM, BertForPreTraining)):
        new += ["head.*", *(["decoder.bias"] if config.decoder_bias else [])]
        new += [] if config.tie_word_embeddings else ["decoder.weight"]
    if options.next_sentence and not issubclass(cls, BertForPreTraining):
        new += ["pooler.*", "seq_relationship.*"]
    return tuple(new)


class Passages:
    """Passages as items; each batch draws new masks from torch's global generator.

    Of the chosen tokens 80 % become the mask token, 10 % a random token and 10 % are kept; other labels are -100.
    """

    def __init__(
        self,
        passages: Sequence[Passage],
        options: Options,
        *,
        mask_id: int,
        vocab_size: int,
        pad_id: int,
        typed: bool,
    ) -> None:
        self.passages, self.options = passages, options
        self.mask_id, self.vocab_size = mask_id, vocab_size
        self.pad_id, self.typed = pad_id, typed
        self.cut = self.cut_rows = 0

    def __len__(self) -> int:
        return len(self.passages)

    def __getitem__(self, index: int) -> Passage:
        return self.passages[index]

    def collate(self, items: Sequence[Passage]) -> Batch:
        """input_ids with masks, attention_mask, token_type_ids, labels, and next_sentence_label for pairs."""
        batch = padded(
            [item.ids for item in items], self.pad_id, [item.types for item in items], typed=self.typed
        )
        ids = batch["input_ids"]
        words = torch.full_like(ids, -1)
        for row, item in enumerate(items):
            words[row, : len(item.words)] = torch.tensor(item.words, device="cpu")
        masked, labels = mask_tokens(
            ids,
            words,
            share=self.options.mask_share,
            whole_words=self.options.whole_words,
            mask_id=self.mask_id,
            vocab_size=self.vocab_size,
        )
        batch.update(input_ids=masked, labels=labels)
        if items[0].follows is not None:
            batch["next_sentence_label"] = torch.tensor([item.follows for item in items], device="cpu")
        return batch


def mask_tokens(
    ids: Tensor, words: Tensor, *, share: float, whole_words: bool, mask_id: int, vocab_size: int
) -> tuple[Tensor, Tensor]:
    """(masked ids, labels) of ids (B, S); each word, or each token of a word, is chosen with probability `share`.

    words: (B, S), the number of each token's word within its row; tokens below 0 are never chosen. A row with words
    always has a chosen one.
    """
    may = words >= 0
    if whole_words:  # a number for each word
        drawn = torch.rand(ids.shape[0], int(words.max()) + 2, device="cpu").gather(1, words + 1)
    else:
        drawn = torch.rand(ids.shape, device="cpu")
    drawn = drawn.masked_fill(~may, 2.0)
    least = drawn.amin(1, keepdim=True)
    chosen = may & ((drawn < share) | (drawn == least))
    labels = ids.masked_fill(~chosen, IGNORE_INDEX)
    fate = torch.rand(ids.shape, device="cpu")
    others = torch.randint(vocab_size, ids.shape, device="cpu")
    masked = torch.where(chosen & (fate < MASKED), mask_id, ids)
    masked = torch.where(chosen & (fate >= MASKED) & (fate < MASKED + RANDOM), others, masked)
    return masked, labels


def passage_length(model: Any, tokenizer: InputTokenizer, options: Options) -> int:
    """Most tokens of a passage; DataError where the model has fewer positions."""
    limit = options.max_length
    if limit is None:
        limit = min(MAX_LENGTH, longest_of(model, tokenizer, None))
    return longest_of(model, tokenizer, limit)


def saved_length(model: Any, tokenizer: InputTokenizer, options: Options, *, new: bool) -> int | None:
    """Most tokens of a passage, for the tokenizer's files of the trained folder.

    None for a model that is trained further: it keeps what it learnt of later positions.
    """
    return passage_length(model, tokenizer, options) if new else None


def training_set(
    model: Any,
    tokenizer: InputTokenizer,
    examples: Sequence[Example],
    options: Options,
    folder: Path | None = None,
    *,
    reuse: bool = False,
    teacher: tuple[Any, InputTokenizer] | None = None,
) -> Passages:
    """The examples' text in passages as items; with a folder, in memory-mapped files there.

    reuse: the folder holds the files of an earlier call with the same arguments, and no example is read.

    Raises:
        DataError: the tokenizer has no mask token, there are fewer than two documents for pairs, or the teacher, a
            model with its tokenizer, has other tokens.
    """
    if tokenizer.mask_id is None:
        raise DataError("tokenizer: has no mask token, which masked-lm needs")
    longest = passage_length(model, tokenizer, options)
    if teacher is not None:
        attach_teacher(model, tokenizer, teacher, options, longest)
    around = Around.of(tokenizer)
    texts = (example.text for example in examples)
    passages: Sequence[Passage]
    if folder is None:
        passages = list(
            pairs(list(sentences_of(tokenizer, texts, longest, around)), longest, around)
            if options.next_sentence
            else singles(tokenizer, texts, longest, around)
        )
    elif reuse:
        passages = StoredPassages(folder)
    else:
        passages = stored_passages(tokenizer, texts, longest, around, folder, two=options.next_sentence)
    if not passages:
        raise DataError("data: has no token, needs some text")
    vocab_size = min(tokenizer.core.get_vocab_size(), model.config.vocab_size)
    return Passages(passages, options, mask_id=tokenizer.mask_id, vocab_size=vocab_size, **layout_of(model))


def evaluate(
    model: Any,
    tokenizer: InputTokenizer,
    examples: Sequence[Example],
    *,
    batch_size: int = BATCH_SIZE,
    options: Options | None = None,
) -> Report:
    """loss (nats) and accuracy of the masked tokens, with the same masks at every call; and next_sentence_accuracy.

    perplexity is exp(loss). Random generators are restored.
    """
    options = options or Options()
    return evaluate_set(model, training_set(model, tokenizer, examples, options), batch_size=batch_size)


@torch.no_grad()
def evaluate_set(model: Any, data: Passages, *, batch_size: int = BATCH_SIZE) -> Report:
    """The same of a set that `training_set` made."""
    device = next(model.parameters()).device
    loss_sum = right = count = follows = 0.0
    with evaluating(model), torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        for start in range(0, len(data), batch_size):
            some = range(start, min(start + batch_size, len(data)))
            # one by one: masks do not depend on batches
            batch = joined([data.collate([data[i]]) for i in some], data.pad_id)
            batch = {name: value.to(device) for name, value in batch.items()}
            nexts, labels = batch.pop("next_sentence_label", None), batch.pop("labels")
            encoded = model.bert.encode_tokens(**batch)
            targets = encoded.tokens.pack(labels)
            chosen = (targets != IGNORE_INDEX).nonzero().squeeze(1)
            x, first = (encoded.at(chosen), None) if nexts is None else encoded.at_and_first(chosen)
            logits, targets = wide(model.decoder(model.head(x))), targets[chosen]
            loss_sum += float(cross_entropy(logits, targets, reduction="sum"))
            right += int((logits.argmax(-1) == targets).sum())
            count += len(targets)
            if nexts is not None:
                logits = model.seq_relationship(torch.tanh(model.pooler(first)))
                follows += int((logits.argmax(-1) == nexts).sum())
    loss = loss_sum / count
    metrics = {"loss": loss, "perplexity": float(np.exp(min(loss, 700.0))), "accuracy": right / count}
    if data.options.next_sentence:
        metrics["next_sentence_accuracy"] = follows / len(data)
    return Report(metrics=metrics, count=int(count))


def joined(batches: Sequence[Batch], pad_id: int) -> Batch:
    """Batches of single passages as one."""
    fill = {"input_ids": pad_id, "labels": IGNORE_INDEX}
    longest = max(each["input_ids"].shape[1] for each in batches)
    return {
        name: torch.cat(
            [
                pad(each[name], (0, longest - each[name].shape[1]), value=fill.get(name, 0))
                if each[name].dim() == 2
                else each[name]
                for each in batches
            ]
        )
        for name in batches[0]
    }
