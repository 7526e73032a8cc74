"""Sequence to sequence, as translation and summaries: an encoder reads the source, a decoder generates the target."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastattn.constants import IGNORE_INDEX
from fastattn.data.corpora import DataError
from fastattn.data.encoding import InputTokenizer, Row
from fastattn.data.records import Record, text_of
from fastattn.data.vocabulary import check_texts_without, check_vocabulary
from fastattn.evaluation.generation import check_installed, check_tokenizer, texts
from fastattn.evaluation.report import MissingPackage, Report
from fastattn.models import BertConfig, EncoderDecoder, EncoderDecoderConfig, bert_decoder
from fastattn.models.embedding import encoder_folder
from fastattn.models.families import class_for
from fastattn.models.fields import one_of, or_none, positive, size
from fastattn.models.fields import text as text_field
from fastattn.nn.modes import evaluating
from fastattn.tasks.batches import max_tokens
from fastattn.tasks.options import CheckedOptions, part
from fastattn.tasks.taught import TaughtEncoderDecoder, attach_teacher
from fastattn.tasks.training import check_room, padded
from fastattn.tasks.training import saved_length as saved_length

NAME = "seq2seq"
MODELS = (EncoderDecoder,)
FIELDS = ("source",)
OPTIONAL: tuple[str, ...] = ()
LABELS = ("target",)
WRITES = True  # the tokenizer's text is the result, so it keeps case and accents
TEXTS = ("source", "target")  # what cleaning reads
NEW_PARTS = ("decoder.h.*.cross_attn.*", "decoder.h.*.ln_cross.*", "enc_to_dec_proj.*")
DEFAULTS = {
    "max_epochs": 3.0,
    "batch_size": 32,
    "lr": 3e-4,
    "min_lr_ratio": 0.0,
    "weight_decay": 0.01,
    "beta2": 0.999,
}
BATCH_SIZE = 32
LOOKED_AT = 1000  # targets
SPECIAL = {"cls": "[CLS]", "sep": "[SEP]", "pad": "[PAD]"}


def sacrebleu_tokenizer(name: str, value: Any) -> str:
    """A tokenizer of sacrebleu, if that is installed; a run without it is refused later, by its name."""
    try:
        return check_tokenizer(name, text_field(name, value))
    except MissingPackage:
        return str(value)


@dataclass(frozen=True)
class Options(CheckedOptions):
    """How pairs are truncated, and how targets are generated.

    Args:
        max_length: most tokens of a source, which is truncated there; None for the model's limit.
        max_target_length: most tokens of a target with its end token: training targets are truncated there, generated
            ones end there; None for 128, or fewer where the decoder has fewer positions.
        num_beams: of beam search in evaluation; 1 is greedy.
        pick: the metric of the dev set that picks the best model: "loss", or "bleu" or "chrf", for which every
            evaluation generates all targets.
        distill_weight: share of the teacher's loss in the whole.
        temperature: of the teacher's and the model's logits in that loss.
        bleu_tokenizer: sacrebleu's tokenizer; None for that of the references' language, see `fastattn.evaluation`.
    """

    max_length: int | None = None
    max_target_length: int | None = None
    num_beams: int = 4
    bleu_tokenizer: str | None = None
    pick: str = "loss"
    distill_weight: float = 0.5
    temperature: float = 2.0

    CHECKS = {  # noqa: RUF012
        "max_length": or_none(size),
        "max_target_length": or_none(size),
        "num_beams": size,
        "bleu_tokenizer": or_none(sacrebleu_tokenizer),
        "pick": one_of(("loss", "bleu", "chrf")),
        "distill_weight": part,
        "temperature": positive,
    }


MAX_TARGET = 128


@dataclass(frozen=True)
class Example:
    """A source and its target."""

    where: str
    source: str
    target: str


def examples_of(records: Sequence[Record], options: Options) -> list[Example]:
    """The examples of records with "source" and "target".

    Raises:
        DataError: a record lacks one of them; with file and line.
    """
    return [Example(r.where, text_of(r, "source"), text_of(r, "target")) for r in records]


def labels_in(examples: Sequence[Example]) -> None:
    """None: the targets are the labels."""


def check_examples(examples: Sequence[Example]) -> None:
    """Refuse a run that could not be evaluated; DataError where sacrebleu is not installed."""
    try:
        check_installed()
    except MissingPackage as error:
        raise DataError(f"seq2seq: {error}") from None


def best(examples: Sequence[Example]) -> tuple[str, bool]:
    """The metric that selects the best model, and whether higher is better."""
    return "loss", False


def picked(options: Options) -> tuple[str, bool]:
    """The same, where options name the figure."""
    return options.pick, options.pick != "loss"


def new_model(
    source: Path | str | BertConfig, examples: Sequence[Example], options: Options, tokenizer: InputTokenizer
) -> TaughtEncoderDecoder:
    """The folder's model; for an encoder's folder, both parts from its weights; for a config, random weights.

    A decoder from an encoder's weights has new cross-attention. Targets begin with [CLS] and end with [SEP].
    """
    tokens = special_tokens(tokenizer)
    if isinstance(source, BertConfig):
        config = replace(source, vocab_size=tokenizer.core.get_vocab_size(), pad_token_id=tokens["pad"])
        model = TaughtEncoderDecoder(EncoderDecoderConfig(config, bert_decoder(config), **_targets(tokens)))
    elif issubclass(class_for(source), EncoderDecoder):
        model = TaughtEncoderDecoder.from_pretrained(source, dtype=torch.float32)
    else:
        folder = encoder_folder(source)
        model = TaughtEncoderDecoder.from_encoder_decoder(
            folder, folder, dtype=torch.float32, **_targets(tokens)
        )
    if model.encoder.pooler is not None:
        # no loss depends on it, so that several processes would wait for its gradient
        model.encoder.pooler.requires_grad_(False)
    return model.train()


def special_tokens(tokenizer: InputTokenizer) -> dict[str, int]:
    """The cls, sep and pad tokens of a tokenizer, by the template for a text; DataError where one is missing."""
    core = tokenizer.core
    plain, whole = core.encode("a", add_special_tokens=False).ids, core.encode("a").ids
    named = {name: core.token_to_id(token) for name, token in SPECIAL.items()}
    if plain and plain[0] in whole and len(whole) > len(plain):
        at = whole.index(plain[0])
        front, back = whole[:at], whole[at + len(plain) :]
        if front and back:
            named.update(cls=front[-1], sep=back[0])
    if named["pad"] is None:
        named["pad"] = core.token_to_id("<pad>")
    lacking = [name for name, token in named.items() if token is None]
    if lacking:
        raise DataError(f"tokenizer: has no {lacking[0]} token, which targets need")
    return {name: int(token) for name, token in named.items() if token is not None}


def lost(tokenizer: InputTokenizer, examples: Sequence[Example]) -> str | None:
    """What the tokenizer drops of the first targets, which the model then never writes; None where it keeps all."""
    normalizer = tokenizer.core.normalizer
    if normalizer is None:
        return None
    targets = [example.target for example in examples[:LOOKED_AT]]
    kept = map(normalizer.normalize_str, targets)
    if any(text != text.lower() for text in targets) and all(text == text.lower() for text in kept):
        return "the tokenizer drops the case of targets: the model writes lower case"
    return None


def _targets(tokens: dict[str, int]) -> dict[str, int]:
    return {
        "decoder_start_token_id": tokens["cls"],
        "bos_token_id": tokens["cls"],
        "eos_token_id": tokens["sep"],
        "pad_token_id": tokens["pad"],
    }


class Pairs:
    """Sources and targets as items; `collate` pads both.

    Attributes:
        cut, cut_rows: the number of truncated tokens of sources and targets, and of examples with any.
    """

    def __init__(self, sources: Sequence[Row], targets: Sequence[Row], *, pad_id: int, typed: bool) -> None:
        self.sources, self.targets = sources, [target.ids for target in targets]
        self.pad_id, self.typed = pad_id, typed
        cuts = [source.cut + target.cut for source, target in zip(sources, targets)]
        self.cut, self.cut_rows = sum(cuts), sum(cut > 0 for cut in cuts)

    def __len__(self) -> int:
        return len(self.sources)

    def __getitem__(self, index: int) -> tuple[Row, list[int]]:
        return self.sources[index], self.targets[index]

    def collate(self, items: Sequence[tuple[Row, list[int]]]) -> dict[str, Tensor]:
        """input_ids, attention_mask and token_type_ids of sources; labels, -100 after a target's end."""
        rows = [row for row, _ in items]
        batch = padded([r.ids for r in rows], self.pad_id, [r.types for r in rows], typed=self.typed)
        longest = max(len(target) for _, target in items)
        batch["labels"] = torch.tensor(
            [[*t, *[IGNORE_INDEX] * (longest - len(t))] for _, t in items], device="cpu"
        )
        return batch


def training_set(
    model: EncoderDecoder,
    tokenizer: InputTokenizer,
    examples: Sequence[Example],
    options: Options,
    *,
    teacher: tuple[EncoderDecoder, InputTokenizer] | None = None,
) -> Pairs:
    """The examples as items: the source with its special tokens, and the target with its end token.

    The decoder's input is the target shifted by one token, so each token is predicted from the true ones before it.

    Raises:
        DataError: an option does not fit the model, or the teacher, a model with its tokenizer, has other tokens.
    """
    sources = source_rows(model, tokenizer, examples, options)
    end = end_of(model)
    limit = target_length(model, options)
    targets = []
    for example in examples:
        ids = tokenizer.core.encode(example.target, add_special_tokens=False).ids
        kept = ids[: limit - 1]
        targets.append(Row([*kept, end], [], [], [], len(ids) - len(kept)))
    if teacher is not None:
        lengths = (max((len(row.ids) for row in rows), default=0) for rows in (sources, targets))
        attach_teacher(model, tokenizer, teacher, options, *lengths)
    config = model.config.encoder
    return Pairs(sources, targets, pad_id=config.pad_token_id or 0, typed=config.type_vocab_size > 1)


def source_rows(
    model: EncoderDecoder, tokenizer: InputTokenizer, examples: Sequence[Example], options: Options
) -> list[Row]:
    """The tokens of each source; DataError where max_length is more than the encoder has positions for."""
    sizes = {"encoder": model.config.encoder.vocab_size, "decoder": model.config.decoder.vocab_size}
    beyond = check_vocabulary("tokenizer", tokenizer.core, sizes)
    check_texts_without(beyond, (text for example in examples for text in (example.source, example.target)))
    limit = max_tokens(model.encoder, tokenizer)
    if options.max_length is not None:
        config = model.config.encoder
        positions = config.max_position_embeddings - config.position_offset
        if options.max_length > positions:
            raise DataError(
                f"task.max_length: got {options.max_length}, the encoder has {positions} positions"
            )
        limit = options.max_length
    check_room(tokenizer, limit)
    return tokenizer.encode([example.source for example in examples], limit)


def target_length(model: EncoderDecoder, options: Options) -> int:
    """Most tokens of a target with its end token; DataError where the decoder has fewer positions."""
    positions = model.decoder.max_positions
    if options.max_target_length == 1:
        raise DataError("task.max_target_length: got 1, which its end takes: no token of a target is left")
    if options.max_target_length is None:
        return MAX_TARGET if positions is None else min(MAX_TARGET, positions)
    if positions is not None and options.max_target_length > positions:
        raise DataError(
            f"task.max_target_length: got {options.max_target_length}, the decoder has {positions} positions"
        )
    return options.max_target_length


def end_of(model: EncoderDecoder) -> int:
    """The token that ends a target; DataError where the config has none, because generation would never stop."""
    given = model.config.eos_token_id
    first = given[0] if isinstance(given, (list, tuple)) and given else given
    if not isinstance(first, int):
        raise DataError("model: its config has no eos_token_id, needs one to end a target")
    return first


@torch.no_grad()
def predict(
    model: EncoderDecoder,
    tokenizer: InputTokenizer,
    examples: Sequence[Example],
    *,
    batch_size: int = BATCH_SIZE,
    options: Options | None = None,
) -> list[str]:
    """The target that beam search generates for each source, in their order."""
    options = options or Options()
    rows = source_rows(model, tokenizer, examples, options)
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i].ids))
    device = next(model.parameters()).device
    config = model.config.encoder
    written = [""] * len(rows)
    limit = target_length(model, options)
    room = limit if model.decoder.max_positions is None else min(limit, model.decoder.max_positions - 1)
    with evaluating(model):
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            batch = padded(
                [rows[i].ids for i in chosen],
                config.pad_token_id or 0,
                [rows[i].types for i in chosen],
                typed=config.type_vocab_size > 1,
            )
            batch = {name: value.to(device) for name, value in batch.items()}
            made = model.generate(
                **batch,
                max_new_tokens=room,
                num_beams=options.num_beams,
                do_sample=False,
                num_return_sequences=1,
            )
            for index, ids in zip(chosen, made[:, 1:].tolist()):
                written[index] = tokenizer.core.decode(ids, skip_special_tokens=True)
    return written


def sample(
    model: EncoderDecoder, tokenizer: InputTokenizer, examples: Sequence[Example], options: Options
) -> str:
    """The first source, and its target by greedy decoding."""
    (target,) = predict(model, tokenizer, examples[:1], options=replace(options, num_beams=1))
    return f"{examples[0].source} -> {target}"


def evaluate(
    model: EncoderDecoder,
    tokenizer: InputTokenizer,
    examples: Sequence[Example],
    *,
    batch_size: int = BATCH_SIZE,
    options: Options | None = None,
) -> Report:
    """bleu, chrf, rouge1, rouge2, rougeL and exact_match of the targets from beam search."""
    options = options or Options()
    written = predict(model, tokenizer, examples, batch_size=batch_size, options=options)
    return texts([[example.target] for example in examples], written, tokenize=options.bleu_tokenizer)
