"""Language models: every token is predicted once, packed text as documents alone, and a teacher's soft labels."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from generative_cases import (
    EPS,
    TEXTS,
    assert_adapters_alone_change,
    batch_of,
    loss_by_hand,
    make_tokenizer,
    model_of,
    records,
)

from fastattn.constants import IGNORE_INDEX
from fastattn.data.corpora import DataError
from fastattn.data.tokenization import Tokenizer, train_characters
from fastattn.tasks import causal_lm
from fastattn.tasks.distill import Student
from fastattn.tasks.logprobs import logits_of, next_targets, token_losses
from fastattn.tasks.perplexity import evaluate_documents, windows_of
from fastattn.train.tokenizing import check_fits


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return make_tokenizer()


def test_added_tokens_beyond_the_vocabulary_are_refused_in_texts_only(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    model = model_of(tokenizer)
    model.save_pretrained(tmp_path)
    tokenizer.core.add_special_tokens(["<image>"])
    assert tokenizer.core.token_to_id("<image>") == model.config.vocab_size
    with pytest.warns(UserWarning, match=r"^tokenizer: has the added token '<image>' beyond"):
        check_fits(str(tmp_path), causal_lm, tokenizer, ["a river"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(DataError, match=r"^data: a text holds '<image>', a token that the model has no"):
            check_fits(str(tmp_path), causal_lm, tokenizer, ["a river", "an <image>"])
        padded = Tokenizer(tokenizer.core, eos_token=tokenizer.eos_token, pad_token="<image>")
        with pytest.raises(DataError, match=r"^tokenizer: its pad_token has the id"):
            check_fits(str(tmp_path), causal_lm, padded, ["a river"])


@pytest.mark.parametrize(("length", "stride"), [(8, 3), (8, 7), (9, 1), (64, 32)])
@pytest.mark.parametrize("bos", [None, 0])
def test_windows_predict_every_token_once(length: int, stride: int, bos: int | None) -> None:
    for size in range(40):
        ids = list(range(1, size + 1))
        found: list[int] = []
        for window in windows_of(ids, bos, length, stride):
            assert len(window.ids) <= length
            assert window.scored >= 1
            assert bos is None or window.ids[0] == bos
            body = window.ids[bos is not None :]
            assert body == list(range(body[0], body[0] + len(body)))
            found += window.ids[window.scored :]
            before = window.scored - (bos is not None)
            assert not found[: -len(window.ids[window.scored :])] or before >= length - stride - (
                bos is not None
            )
        assert found == (ids if bos is not None else ids[1:])


@pytest.mark.parametrize("named", [True, False])
def test_perplexity_is_that_of_each_document_alone(tokenizer: Tokenizer, named: bool) -> None:
    model = model_of(tokenizer, kind="rotary", bos_token_id=tokenizer.eos_id if named else 10**6)
    front = [tokenizer.eos_id] if named else []
    total, count, size = 0.0, 0, 0
    for text in TEXTS:
        ids = [*front, *tokenizer.encode(text)]
        loss, number = loss_by_hand(model, ids, [True] * len(ids))
        first = b"" if named else tokenizer.decode(ids[:1]).encode()
        total, count, size = (
            total + loss,
            count + number,
            size + (len(text.encode()) - len(first) if number else 0),
        )
    reports = [
        evaluate_documents(model, tokenizer, TEXTS, batch_size=batch, max_length=256) for batch in (1, 2, 8)
    ]
    for report in reports:
        assert report.count == count
        assert report.metrics["loss"] == pytest.approx(total / count, rel=8 * EPS)
        assert report.metrics["bits_per_byte"] == pytest.approx(total / math.log(2) / size, rel=8 * EPS)
    assert reports[0].metrics["perplexity"] == pytest.approx(math.exp(total / count), rel=64 * EPS)


def test_unknown_characters_are_counted() -> None:
    characters = train_characters(["ab ab"], 20)
    report = evaluate_documents(model_of(characters), characters, ["abz"], max_length=8)
    assert report.metrics["unknown"] == pytest.approx(1 / 3)


@pytest.mark.parametrize("packing", ["best-fit", "blocks"])
def test_the_loss_of_packed_text_is_that_of_documents(tokenizer: Tokenizer, packing: str) -> None:
    model = model_of(tokenizer)
    options = causal_lm.Options(max_length=64, packing=packing)
    examples = causal_lm.examples_of(records(*({"text": text} for text in TEXTS)), options)
    data = causal_lm.training_set(model, tokenizer, examples, options)
    packed = batch_of(data)
    total, count = 0.0, 0
    for row in range(len(data)):
        segments = packed["segment_ids"][row]
        for segment in range(int(segments.max()) + 1):
            ids = packed["input_ids"][row][segments == segment].tolist()
            assert packing != "best-fit" or ids[0] == tokenizer.eos_id
            loss, number = loss_by_hand(model, ids, [True] * len(ids))
            total, count = total + loss, count + number
    assert model(**packed).loss.item() == pytest.approx(total / count, rel=8 * EPS)


@pytest.mark.parametrize("kind", ["learned", "gemma"])
def test_a_students_loss_is_the_formula(tokenizer: Tokenizer, kind: str) -> None:
    student, teacher = (
        model_of(tokenizer, Student, kind),
        model_of(tokenizer, kind=kind, initializer_range=0.2),
    )
    student.train().learn_from(teacher, weight=0.25, temperature=2.0)
    options = causal_lm.Options(max_length=48)
    examples = causal_lm.examples_of(records(*({"text": text} for text in TEXTS)), options)
    batch = batch_of(causal_lm.training_set(student, tokenizer, examples, options))
    targets = next_targets(batch["labels"], batch["segment_ids"])
    counted = targets != IGNORE_INDEX

    def logits_alone(model: Any) -> torch.Tensor:
        """Of every target, each document being read by itself."""
        found = []
        for ids, segments in zip(batch["input_ids"], batch["segment_ids"]):
            for segment in range(int(segments.max()) + 1):
                found.append(model(ids[segments == segment][None]).logits[0, :-1])
        return torch.cat(found).double()

    with torch.no_grad():
        ours, theirs = logits_alone(student.eval()), logits_alone(teacher)
    student.train()
    hard = F.cross_entropy(ours, targets[counted])
    soft = F.kl_div((ours / 2).log_softmax(-1), (theirs / 2).softmax(-1), reduction="batchmean") * 4
    loss = student(**batch).loss
    assert loss.item() == pytest.approx(float(0.75 * hard + 0.25 * soft), rel=64 * EPS)
    loss.backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert len(list(student.parameters())) == len(
        list(teacher.parameters())
    )  # the teacher's are not among them
    assert student.eval()(**batch).loss.item() == pytest.approx(float(hard), rel=64 * EPS)


@pytest.mark.parametrize("counted", ["real tokens", "the first token too", "padding too"])
@pytest.mark.parametrize("left", [False, True])
def test_a_student_of_itself_has_nothing_to_learn_in_a_padded_batch(
    tokenizer: Tokenizer, left: bool, counted: str
) -> None:
    student, teacher = model_of(tokenizer, Student), model_of(tokenizer)
    teacher.load_state_dict(student.state_dict())
    student.train().learn_from(teacher, weight=1.0, temperature=1.0)
    ids = torch.randint(1, 20, (2, 8))
    mask = torch.ones(2, 8, dtype=torch.int64)
    mask[1, slice(0, 4) if left else slice(4, 8)] = 0
    labels = ids if counted == "padding too" else ids.masked_fill(mask == 0, -100)
    if counted == "real tokens" and left:
        labels[1, 4] = -100  # which padding would predict
    loss = student(ids, mask, labels).loss
    assert loss.item() == pytest.approx(0.0, abs=64 * EPS)


def test_adapters_of_a_student_alone_change(tokenizer: Tokenizer) -> None:
    student = model_of(tokenizer, Student)
    student.learn_from(model_of(tokenizer), weight=0.5, temperature=1.0)
    options = causal_lm.Options()
    examples = causal_lm.examples_of(records(*({"text": text} for text in TEXTS)), options)
    assert_adapters_alone_change(
        student, batch_of(causal_lm.training_set(student, tokenizer, examples, options))
    )


def test_losses_of_tokens_are_those_of_their_logits(tokenizer: Tokenizer) -> None:
    for kind in ("learned", "gemma"):
        model = model_of(tokenizer, kind=kind)
        hidden, targets = torch.randn(9, 16), torch.arange(9)
        expected = F.cross_entropy(logits_of(model, hidden), targets, reduction="none")
        torch.testing.assert_close(token_losses(model, hidden, targets), expected)


def test_what_does_not_fit_is_named(tokenizer: Tokenizer) -> None:
    model = model_of(tokenizer)
    with pytest.raises(DataError, match=r"^task.max_length: got 65, the model has 64 positions"):
        causal_lm.training_set(model, tokenizer, [], causal_lm.Options(max_length=65))
    with pytest.raises(DataError, match=r"^task.stride: got 64"):
        causal_lm.evaluate(model, tokenizer, [], options=causal_lm.Options(stride=64))
    with pytest.raises(
        DataError, match=r"^task.stride: got 64"
    ):  # before the training whose evaluation needs it
        causal_lm.training_set(model, tokenizer, [], causal_lm.Options(stride=64))
    student, short = model_of(tokenizer, Student), model_of(tokenizer, n_positions=16)
    with pytest.raises(DataError, match=r"^--teacher: has 16 positions, rows of this run have 64 tokens"):
        causal_lm.attach_teacher(student, tokenizer, (short, tokenizer), causal_lm.Options())
    causal_lm.attach_teacher(student, tokenizer, (short, tokenizer), causal_lm.Options(max_length=16))
    with pytest.raises(DataError, match=r"^--teacher: its tokenizer has other tokens"):
        causal_lm.attach_teacher(
            model_of(tokenizer, Student), tokenizer, (model, train_characters(["ab"])), causal_lm.Options()
        )
