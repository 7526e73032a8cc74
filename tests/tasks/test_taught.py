"""Teachers of tasks with a label for each token: the loss is the labels' and the teacher's by their shares."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import task_cases
import torch
import torch.nn.functional as F
from torch import Tensor
from training_cases import rows, write

from fastattn.constants import IGNORE_INDEX
from fastattn.data.corpora import DataError
from fastattn.data.encoding import InputTokenizer
from fastattn.data.records import Record
from fastattn.models import BertConfig
from fastattn.tasks import classify, masked_lm, qa, seq2seq, tag
from fastattn.train import run

SIZES: dict[str, Any] = {
    "vocab_size": 35, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16,
    "max_position_embeddings": 32, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
CLASSES = {0: "bad!", 1: "good!"}
SHARE, TEMPERATURE = 0.25, 2.0
TASKS = [(tag, {}), (qa, {}), (masked_lm, {}), (masked_lm, {"next_sentence": True}), (seq2seq, {})]
IDS = ["tag", "qa", "masked-lm", "masked-lm-nsp", "seq2seq"]


@pytest.fixture(scope="module")
def tokenizer() -> InputTokenizer:
    return InputTokenizer(task_cases.core(), mask_token="[MASK]")


def _examples(task: ModuleType, options: Any) -> list[Any]:
    fields = rows(task.NAME) if task is not seq2seq else [{"source": "good film", "target": "bad film"}] * 3
    return task.examples_of([Record(f"line {i}", each) for i, each in enumerate(fields[:6], 1)], options)


def _models(task: ModuleType, options: Any, tokenizer: InputTokenizer) -> tuple[Any, Any, list[Any]]:
    """A student, a teacher twice as wide, and the examples."""
    examples = _examples(task, options)
    torch.manual_seed(0)
    student, teacher = (
        task.new_model(BertConfig(**{**SIZES, "hidden_size": width}), examples, options, tokenizer)
        for width in (16, 32)
    )
    return student, teacher, examples


def _logits(task: ModuleType, model: Any, batch: dict[str, Tensor]) -> Tensor:
    """(N, classes) of what the labels count."""
    labels = batch["labels"]
    given = {name: value for name, value in batch.items() if name not in ("labels", "next_sentence_label")}
    if task is qa:
        out = model(**given)
        real = batch["attention_mask"].bool()
        return torch.stack([x.masked_fill(~real, -1e6) for x in (out.start_logits, out.end_logits)]).flatten(
            0, 1
        )
    out = model(
        **given,
        **({"labels": labels} if task is seq2seq else {}),
        **({} if task is tag else {"return_logits": True}),
    )
    return out.logits[labels != IGNORE_INDEX]


@pytest.mark.parametrize(("task", "changes"), TASKS, ids=IDS)
def test_the_loss_is_the_labels_and_the_teachers(
    task: ModuleType, changes: dict[str, Any], tokenizer: InputTokenizer
) -> None:
    options = task.Options(**changes, distill_weight=SHARE, temperature=TEMPERATURE)
    student, teacher, examples = _models(task, options, tokenizer)
    if task is tag:  # its labels in another order
        named = list(reversed(student.config.labels()))
        teacher.config = replace(teacher.config, id2label=dict(enumerate(named)))
    data = task.training_set(student, tokenizer, examples, options, teacher=(teacher, tokenizer))
    torch.manual_seed(1)
    batch = data.collate([data[i] for i in range(min(3, len(data)))])
    mixed = student.train()(**batch).loss
    mixed.backward()
    assert all(p.grad is None for p in teacher.parameters())
    own = {id(p) for p in student.parameters()}
    assert not own & {id(p) for p in teacher.parameters()}
    with torch.no_grad():
        student.eval()
        plain = student(**batch).loss
        ours, theirs = (
            _logits(task, model, batch).double() / TEMPERATURE for model in (student, teacher.eval())
        )
        if task is tag:
            theirs = theirs.flip(-1)
        ours, theirs = ours.log_softmax(-1), theirs.log_softmax(-1)
        soft = TEMPERATURE**2 * (theirs.exp() * (theirs - ours)).sum(-1).mean()
        of_next = 0.0
        if "next_sentence_label" in batch:
            words = {name: value for name, value in batch.items() if name != "next_sentence_label"}
            of_next = float(plain - student(**words).loss)
    expected = (1 - SHARE) * (float(plain) - of_next) + SHARE * float(soft) + of_next
    assert float(mixed.detach()) == pytest.approx(expected, rel=1e-5)
    assert float(soft) > 0


@pytest.mark.parametrize(("task", "changes"), TASKS, ids=IDS)
def test_a_model_without_a_teacher_has_the_labels_loss(
    task: ModuleType, changes: dict[str, Any], tokenizer: InputTokenizer
) -> None:
    """The same bits in both modes of a model without dropout; a teacher without a share changes nothing."""
    options = task.Options(**changes, distill_weight=0.0)
    student, teacher, examples = _models(task, options, tokenizer)
    data = task.training_set(student, tokenizer, examples, options)
    batch = data.collate([data[0]])
    plain = student.train()(**batch).loss
    student.learn_from(teacher, weight=0.0, temperature=1.0)
    assert torch.equal(student(**batch).loss, plain)


@pytest.mark.parametrize(("task", "changes"), TASKS, ids=IDS)
def test_a_teacher_of_other_tokens_is_refused(
    task: ModuleType, changes: dict[str, Any], tokenizer: InputTokenizer
) -> None:
    options = task.Options(**changes)
    student, teacher, examples = _models(task, options, tokenizer)
    core = task_cases.core()
    core.add_tokens(["another"])
    with pytest.raises(DataError, match=r"^--teacher: its tokenizer has other tokens"):
        task.training_set(student, tokenizer, examples, options, teacher=(teacher, InputTokenizer(core)))


@pytest.mark.parametrize(("task", "changes"), TASKS, ids=IDS)
def test_a_teacher_without_positions_or_embeddings_is_refused(
    task: ModuleType, changes: dict[str, Any], tokenizer: InputTokenizer
) -> None:
    """Before any step, in which it would read what it has no position for, or answer over another vocabulary."""
    options = task.Options(**changes)
    student, _, examples = _models(task, options, tokenizer)
    for name, size, complaint in (
        ("max_position_embeddings", 3, "has 3 positions, rows of this run have up to"),
        ("vocab_size", 34, "its vocab_size is 34, the model's tokenizer has ids up to 34"),
        ("vocab_size", 40, "its vocab_size is 40, the model's is 35; soft labels"),
    ):
        teacher = task.new_model(BertConfig(**SIZES), examples, options, tokenizer)
        config = replace(getattr(teacher.config, "encoder", teacher.config), **{name: size})
        if task is seq2seq:
            decoder = replace(
                teacher.config.decoder, **({"vocab_size": size} if name == "vocab_size" else {})
            )
            teacher.config = replace(teacher.config, encoder=config, decoder=decoder)
        else:
            teacher.config = config
        if size == 40 and task in (tag, qa):  # whose logits are of other classes
            task.training_set(student, tokenizer, examples, options, teacher=(teacher, tokenizer))
            continue
        with pytest.raises(DataError, match=rf"^--teacher: {complaint}"):
            task.training_set(student, tokenizer, examples, options, teacher=(teacher, tokenizer))


LABELS: dict[str, list[Any]] = {  # of a classifier's examples, by its kind of labels
    "single": ["x", "y", "z"], "several": [["x"], ["y", "z"], []], "regression": [[0.5, 2.0], [1.5, -1.0], [3.0, 0.0]]
}  # fmt: skip


def _classifiers(kind: str, tokenizer: InputTokenizer, options: Any) -> tuple[Any, Any, list[Any]]:
    records = [
        Record(f"line {i}", {"text": "good film", "label": each}) for i, each in enumerate(LABELS[kind])
    ]
    examples = classify.examples_of(records, options)
    torch.manual_seed(0)
    student, teacher = (
        classify.new_model(BertConfig(**{**SIZES, "hidden_size": width}), examples, options, tokenizer)
        for width in (16, 32)
    )
    return student, teacher, examples


@pytest.mark.parametrize("kind", LABELS)
def test_a_classifiers_teacher_is_learnt_by_the_kind_of_labels(kind: str, tokenizer: InputTokenizer) -> None:
    """Several labels and numbers are no distribution over the labels: their teacher has a loss for each."""
    options = classify.Options(distill_weight=SHARE, temperature=TEMPERATURE)
    student, teacher, examples = _classifiers(kind, tokenizer, options)
    data = classify.training_set(student, tokenizer, examples, options, teacher=(teacher, tokenizer))
    batch = data.collate([data[i] for i in range(len(data))])
    # far from the student, and by the same number for each label, which a softmax does not see
    batch["teacher_logits"] = batch["teacher_logits"] + 5.0
    theirs = batch["teacher_logits"] / TEMPERATURE
    output = student.eval()(**batch)
    ours = output.logits / TEMPERATURE
    if kind == "single":
        soft = F.kl_div(ours.log_softmax(-1), theirs.softmax(-1), reduction="batchmean")
    elif kind == "several":
        targets = theirs.sigmoid()
        least = F.binary_cross_entropy(targets, targets)
        soft = F.binary_cross_entropy_with_logits(ours, targets) - least
    else:
        soft = F.mse_loss(ours, theirs)
    of_a_distribution = F.kl_div(ours.log_softmax(-1), theirs.softmax(-1), reduction="batchmean")
    assert kind == "single" or soft > 2 * of_a_distribution
    labels = student(**{name: value for name, value in batch.items() if name != "teacher_logits"}).loss
    torch.testing.assert_close(output.loss, (1 - SHARE) * labels + SHARE * TEMPERATURE**2 * soft)


@pytest.mark.parametrize("kind", LABELS)
def test_a_classifiers_teacher_of_another_kind_is_refused(kind: str, tokenizer: InputTokenizer) -> None:
    options = classify.Options()
    student, teacher, examples = _classifiers(kind, tokenizer, options)
    for other in {classify.SINGLE, classify.SEVERAL, classify.REGRESSION} - {student.config.problem_type}:
        teacher.config = replace(teacher.config, problem_type=other)
        with pytest.raises(DataError, match=rf"^--teacher: its problem_type is {other}, the labels"):
            classify.training_set(student, tokenizer, examples, options, teacher=(teacher, tokenizer))


def test_a_tagger_with_other_labels_is_refused(tokenizer: InputTokenizer) -> None:
    options = tag.Options()
    student, teacher, examples = _models(tag, options, tokenizer)
    teacher.config = replace(teacher.config, id2label={**teacher.config.id2label, 0: "B-THING"})
    with pytest.raises(DataError, match=r"^--teacher: its labels differ from the data's, as 'B-THING'"):
        tag.training_set(student, tokenizer, examples, options, teacher=(teacher, tokenizer))


@pytest.mark.parametrize(
    ("task", "changes"), [*TASKS[:1], *TASKS[2:3], *TASKS[4:]], ids=[IDS[0], IDS[2], IDS[4]]
)
def test_a_length_without_room_for_text_is_refused(
    task: ModuleType, changes: dict[str, Any], tokenizer: InputTokenizer
) -> None:
    options = task.Options(**changes, max_length=2)
    student, _, examples = _models(task, options, tokenizer)
    with pytest.raises(DataError, match=r"^task.max_length: got 2, of which 2 are special tokens"):
        task.training_set(student, tokenizer, examples, options)
    allowed = replace(options, max_length=3)
    assert len(task.training_set(student, tokenizer, examples, allowed)) >= 1


def test_a_target_needs_more_than_its_end(tokenizer: InputTokenizer) -> None:
    options = seq2seq.Options(max_target_length=1)
    student, _, examples = _models(seq2seq, options, tokenizer)
    with pytest.raises(DataError, match=r"^task.max_target_length: got 1"):
        seq2seq.training_set(student, tokenizer, examples, options)


def test_translations_pick_the_best_model_by_what_is_asked_for() -> None:
    assert seq2seq.picked(seq2seq.Options()) == ("loss", False) == seq2seq.best([])
    assert seq2seq.picked(seq2seq.Options(pick="bleu")) == ("bleu", True)
    assert seq2seq.picked(seq2seq.Options(pick="chrf")) == ("chrf", True)
    with pytest.raises(ValueError, match=r"^pick"):
        seq2seq.Options(pick="rouge")


def test_a_classifier_teacher_runs_on_the_device_of_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "teacher"
    task_cases.save_model(folder, "ForSequenceClassification", vocab_size=35, num_labels=2, id2label=CLASSES)
    data = str(write(tmp_path / "train.jsonl", rows("classify")))
    seen = []

    def logits(teacher: Any, tokenizer: Any, examples: Any, labels: Any) -> list[list[float]]:
        seen.append(next(teacher.parameters()).device.type)
        return [[0.0, 0.0]] * len(examples)

    monkeypatch.setattr(classify, "teacher_logits", logits)
    monkeypatch.setattr(run, "usable_device", lambda name: torch.device("meta"))
    given = (data,), (data,), str(folder), str(tmp_path / "out")
    run.prepare(run.Inputs("classify", *given, teacher=str(folder)))
    assert seen == ["meta"]
