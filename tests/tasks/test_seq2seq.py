"""Encoder-decoders: the loss of a batch is that of its pairs, targets end, and evaluation writes what beams find."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import task_cases
import torch
from generative_cases import assert_adapters_alone_change

from fastattn.constants import IGNORE_INDEX
from fastattn.data.corpora import DataError
from fastattn.data.encoding import InputTokenizer
from fastattn.data.records import Record
from fastattn.models import (
    Bert,
    BertConfig,
    BertForPreTraining,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    EncoderDecoder,
)
from fastattn.models.presets import FAMILY_FIELDS
from fastattn.tasks import masked_lm, seq2seq
from fastattn.train.task_config import DataConfig
from fastattn.train.tokenizing import Texts, learnt_tokenizer

SIZES: dict[str, Any] = {
    "vocab_size": 35, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 24, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
PAIRS = (
    ("Anna lives in Paris.", "Paris"),
    ("so good a film", "good film"),
    ("bad film?", "bad , bad film"),
    ("Maria works for the old river", "the river works for Maria in Berlin and in Paris"),
)
CLS, SEP, PAD = 2, 3, 0


@pytest.fixture(scope="module")
def tokenizer() -> InputTokenizer:
    return InputTokenizer(task_cases.core(), mask_token="[MASK]")


def examples(options: seq2seq.Options) -> list[seq2seq.Example]:
    records = [Record(f"data: line {i}", {"source": a, "target": b}) for i, (a, b) in enumerate(PAIRS, 1)]
    return seq2seq.examples_of(records, options)


def new_model(tokenizer: InputTokenizer, options: seq2seq.Options) -> EncoderDecoder:
    torch.manual_seed(0)
    return seq2seq.new_model(BertConfig(**SIZES), examples(options), options, tokenizer)


def test_the_loss_of_a_batch_is_that_of_its_pairs(tokenizer: InputTokenizer) -> None:
    options = seq2seq.Options(max_target_length=8)
    model = new_model(tokenizer, options).eval()
    data = seq2seq.training_set(model, tokenizer, examples(options), options)
    assert (data.cut, data.cut_rows) == (4, 1)  # the last target has 11 tokens, 7 fit before its end
    items = [data[i] for i in range(4)]
    batch = data.collate(items)
    assert all(row[row != IGNORE_INDEX][-1] == SEP for row in batch["labels"])
    total, count = 0.0, 0
    for item in items:
        alone = data.collate([item])
        assert "labels" in alone
        number = alone["labels"].numel()
        total, count = total + model(**alone).loss.item() * number, count + number
    assert count == int((batch["labels"] != IGNORE_INDEX).sum())
    assert model(**batch).loss.item() == pytest.approx(total / count, rel=8 * torch.finfo(torch.float32).eps)


def test_pairs_are_learnt_and_written_by_beams(tokenizer: InputTokenizer, tmp_path: Path) -> None:
    options = seq2seq.Options(num_beams=2)
    model = new_model(tokenizer, options)
    given = examples(options)
    data = seq2seq.training_set(model, tokenizer, given, options)
    batch = data.collate([data[i] for i in range(len(data))])
    optimizer = torch.optim.AdamW(model.parameters(), 5e-3)
    for _ in range(40):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(tmp_path)
    loaded = EncoderDecoder.from_pretrained(tmp_path)
    expected = [
        tokenizer.core.decode(tokenizer.core.encode(b, add_special_tokens=False).ids) for _, b in PAIRS
    ]
    for size in (1, 4):
        assert seq2seq.predict(loaded, tokenizer, given, batch_size=size, options=options) == expected
    pytest.importorskip("sacrebleu")
    report = seq2seq.evaluate(loaded, tokenizer, given, options=options)
    assert report.metrics["rouge1"] == 1.0  # in lower case
    assert report.count == len(PAIRS)


def test_an_encoders_folder_is_both_parts_start(tokenizer: InputTokenizer, tmp_path: Path) -> None:
    torch.manual_seed(1)
    Bert(BertConfig(**SIZES)).save_pretrained(tmp_path)
    options = seq2seq.Options()
    model = seq2seq.new_model(tmp_path, examples(options), options, tokenizer)
    words = model.encoder.embeddings.word_embeddings.weight
    assert torch.equal(words, model.decoder.wte.weight)
    config = model.config
    assert (config.decoder_start_token_id, config.eos_token_id, config.pad_token_id) == (CLS, SEP, PAD)
    assert model.decoder.lm_head.bias is not None
    assert not model.decoder.lm_head.bias.any()
    assert {"decoder.lm_head.bias", "decoder.lm_transform.dense.weight"} <= set(model.load_report.new)


@pytest.mark.parametrize(
    "head",
    [BertForSequenceClassification, BertForTokenClassification, BertForQuestionAnswering, BertForPreTraining],
)
@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_the_head_of_an_encoders_folder_is_dropped(
    kind: str, head: Any, tokenizer: InputTokenizer, tmp_path: Path
) -> None:
    more: dict[str, Any] = {} if kind == "bert" else {"model_type": kind, **FAMILY_FIELDS[kind]}
    if kind == "roberta" and head is BertForPreTraining:
        return  # RoBERTa has no such head
    head(BertConfig(**{**more, **SIZES, "type_vocab_size": 1 if more else 2})).save_pretrained(tmp_path)
    options = seq2seq.Options()
    model = seq2seq.new_model(tmp_path, examples(options), options, tokenizer)
    assert torch.equal(model.encoder.embeddings.word_embeddings.weight, model.decoder.wte.weight)


def test_adapters_alone_are_trained(tokenizer: InputTokenizer) -> None:
    options = seq2seq.Options()
    model = new_model(tokenizer, options)
    data = seq2seq.training_set(model, tokenizer, examples(options), options)
    assert_adapters_alone_change(model, data.collate([data[0], data[1]]))


def test_what_does_not_fit_is_named(tokenizer: InputTokenizer) -> None:
    options = seq2seq.Options()
    model = new_model(tokenizer, options)
    for changed, message in (
        (seq2seq.Options(max_length=25), r"^task.max_length: got 25, the encoder has 24 positions"),
        (
            seq2seq.Options(max_target_length=25),
            r"^task.max_target_length: got 25, the decoder has 24 positions",
        ),
    ):
        with pytest.raises(DataError, match=message):
            seq2seq.training_set(model, tokenizer, examples(options), changed)
    with pytest.raises(DataError, match=r"^data: line 1 has no 'target'"):
        seq2seq.examples_of([Record("data: line 1", {"source": "x"})], options)
    model.config.eos_token_id = None
    with pytest.raises(DataError, match=r"^model: its config has no eos_token_id"):
        seq2seq.training_set(model, tokenizer, examples(options), options)
    small = seq2seq.new_model(BertConfig(**SIZES), [], options, tokenizer)
    small.config.encoder.vocab_size = 20
    with pytest.raises(DataError, match=r"^tokenizer: has ids up to 34, the encoder's vocab_size is 20"):
        seq2seq.training_set(small, tokenizer, examples(options), options)
    with pytest.raises(ValueError, match=r"^num_beams"):
        seq2seq.Options(num_beams=0)


@pytest.mark.parametrize("kind", ["wordpiece", "characters", "bpe"])
def test_a_tokenizer_that_is_learnt_for_targets_keeps_their_case(kind: str) -> None:
    texts = Texts(examples(seq2seq.Options()))
    for lowercase, kept in ((None, True), (False, True), (True, kind == "bpe")):
        options = DataConfig(tokenizer=kind, vocab_size=400, lowercase=lowercase)
        learnt = learnt_tokenizer(seq2seq, options, "minilm-l6", texts, None)
        ids = learnt.core.encode("Maria in Paris", add_special_tokens=False).ids
        assert ("M" in learnt.core.decode(ids)) is kept
        said = seq2seq.lost(learnt, texts.examples)
        assert said == (
            None if kept else "the tokenizer drops the case of targets: the model writes lower case"
        )
    without = [replace(example, target=example.target.lower()) for example in texts.examples]
    assert seq2seq.lost(learnt, without) is None
    masked = learnt_tokenizer(masked_lm, DataConfig(tokenizer="characters"), "minilm-l6", texts, None)
    assert masked.core.encode("M").tokens[1] == "m"
