"""Training batches of encoder tasks: labels where they belong, losses of single examples and of transformers' heads."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import task_cases
import tokenizers
import torch
import torch.nn.functional as F
import training_cases
from tokenizers import models, pre_tokenizers
from torch import Tensor
from training_cases import rows

from fastattn.constants import IGNORE_INDEX
from fastattn.data import DataError
from fastattn.data.encoding import InputTokenizer
from fastattn.data.input_tokenizers import train_input_tokenizer
from fastattn.data.records import Record
from fastattn.evaluation import baselines
from fastattn.models import BertConfig
from fastattn.tasks import classify, embed, masked_lm, qa, tag
from fastattn.tasks.answers import positions_of
from fastattn.tasks.passages import SENTENCES
from fastattn.train.metrics import count_targets

TASKS: dict[str, ModuleType] = {
    "classify": classify, "tag": tag, "qa": qa, "masked-lm": masked_lm, "embed": embed
}  # fmt: skip
EXTRA: dict[str, list[dict[str, Any]]] = {  # of another length than the rest
    "classify": [{"text": "so good a film, " * 4, "label": "good!"}],
    "tag": [{"tokens": ["new", "acmes", ",", "anna"] * 3, "tags": ["B-LOC", "I-LOC", "O", "B-PER"] * 3}],
    "qa": [
        {"question": "who?", "context": "the old tower . " * 12 + "maria", "answers": [{"text": "maria"}]}
    ],
    "masked-lm": [{"text": "the old tower, the new river. " * 4}],
    "embed": [{"text": "so good a film, " * 4, "positive": "bad"}],
}


def records(given: list[dict[str, Any]]) -> list[Record]:
    return [Record(f"x: line {number}", row) for number, row in enumerate(given, 1)]


def tokenizer() -> InputTokenizer:
    return InputTokenizer(task_cases.core(), mask_token="[MASK]")


def made(task: str, folder: Path, given: list[dict[str, Any]], **options: Any) -> tuple[Any, Any]:
    """(model in float64, training set) of a task's rows from a folder."""
    module = TASKS[task]
    settings = module.Options(**options)
    examples = module.examples_of(records(given), settings)
    torch.manual_seed(0)
    model = module.new_model(folder, examples, settings, tokenizer())
    return model.double(), module.training_set(model, tokenizer(), examples, settings)


def plain(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.double() if value.is_floating_point() else value for name, value in batch.items()}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return training_cases.save_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.mark.parametrize("task", [name for name in TASKS if name != "embed"])
def test_the_loss_of_a_batch_is_that_of_its_examples(task: str, encoder: Path) -> None:
    """A batch without padding's work gives the loss and gradient that examples give one at a time."""
    model, data = made(task, encoder, [*rows(task)[:5], *EXTRA[task]])
    items = [data[i] for i in range(len(data))]
    torch.manual_seed(1)
    batch = plain(data.collate(items))
    assert not batch["attention_mask"].all()
    model(**batch).loss.backward()
    together = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    total, targets, loss = count_targets(batch["labels"], shifted=False), [], 0.0
    for i in range(len(items)):
        length = int(batch["attention_mask"][i].sum())
        one = {}
        for name, value in batch.items():
            of_tokens = value.dim() == 2 and value.shape[1] == batch["input_ids"].shape[1]
            one[name] = value[i : i + 1, :length] if of_tokens else value[i : i + 1]
        del one["attention_mask"]
        targets.append(count_targets(one["labels"], shifted=False))
        weighted = model(**one).loss * targets[-1] / total
        weighted.backward()
        loss += float(weighted.detach())
    assert sum(targets) == total
    torch.testing.assert_close(torch.tensor(loss).double(), model(**batch).loss.detach())
    for before, parameter in zip(together, model.parameters()):
        if before is not None:
            torch.testing.assert_close(parameter.grad, before)


def test_the_contrastive_loss_is_that_of_single_texts(encoder: Path) -> None:
    """Of vectors made one text at a time: cross-entropy of scaled cosines, the texts of other examples as negatives."""
    given = [
        {**row, "negative": f"{row['text']} {word}"}
        for row, word in zip(rows("embed")[::6], ("old", "new", "so"))
    ]
    model, data = made("embed", encoder, [*given, {**EXTRA["embed"][0], "negative": "river"}], scale=7.0)
    items = [data[i] for i in range(len(data))]
    batch = plain(data.collate(items))
    found = model(**batch)
    single = []
    for ids, mask, types in zip(batch["input_ids"], batch["attention_mask"], batch["token_type_ids"]):
        length = int(mask.sum())
        hidden = model.bert(ids[None, :length], None, types[None, :length]).last_hidden_state
        single.append(hidden[0].mean(0))
    count = len(items)
    vectors = F.normalize(torch.stack(single), dim=-1)
    scores = 7.0 * vectors[:count] @ vectors[count:].T
    assert scores.shape == (count, 2 * count)
    torch.testing.assert_close(found.loss, F.cross_entropy(scores, torch.arange(count)))
    torch.testing.assert_close(F.normalize(found.embeddings, dim=-1), vectors)


def test_equal_positives_are_no_negatives(encoder: Path) -> None:
    model, data = made(
        "embed", encoder, [*rows("embed")[:2], {"text": "so", "positive": rows("embed")[0]["positive"]}]
    )
    batch = data.collate([data[i] for i in range(3)])
    assert batch["same"].tolist() == [[False, False, True], [False, False, False], [True, False, False]]
    scores = model(**plain({k: v for k, v in batch.items() if k != "same"})).loss
    assert model(**plain(batch)).loss.item() < scores.item()


def test_pairs_of_texts_need_room_for_both(encoder: Path) -> None:
    given = [{**row, "text_pair": "a film"} for row in rows("classify")[:6]]
    _, data = made("classify", encoder, given, max_length=5)
    assert {len(data[i][0]) for i in range(len(data))} == {5}
    assert len(made("classify", encoder, rows("classify")[:6], max_length=3)[1][0][0]) == 3
    with pytest.raises(
        DataError, match=r"task.max_length: got 4, of which 3 are special tokens: a token of each"
    ):
        made("classify", encoder, given, max_length=4)


HEADS: dict[str, tuple[str, dict[str, Any]]] = {
    "classify": ("ForSequenceClassification", {"num_labels": 2, "id2label": {0: "bad!", 1: "good!"}}),
    "several": (
        "ForSequenceClassification",
        {"num_labels": 3, "id2label": dict(enumerate("abc")), "problem_type": "multi_label_classification"},
    ),
    "regression": ("ForSequenceClassification", {"num_labels": 1, "problem_type": "regression"}),
    "tag": ("ForTokenClassification", {"num_labels": 5, "id2label": task_cases.LABELS}),
    "qa": ("ForQuestionAnswering", {}),
    "masked-lm": ("ForMaskedLM", {}),
    "next-sentence": ("ForPreTraining", {}),
}


@pytest.mark.parametrize("case", HEADS)
def test_losses_and_gradients_are_those_of_transformers(case: str, tmp_path: Path) -> None:
    """The saved head on the same batch, in float64: the loss, and gradients of the head and the embeddings."""
    head, changes = HEADS[case]
    task = {"several": "classify", "regression": "classify", "next-sentence": "masked-lm"}.get(case, case)
    given: list[dict[str, Any]] = [*rows(task)[:: 1 if task == "qa" else 5], *EXTRA[task]]
    if case == "several":
        labels = itertools.cycle((["a", "b"], [], ["c"]))
        given = [{**row, "label": next(labels)} for row in given]
    if case == "regression":
        given = [{**row, "label": number / 2} for number, row in enumerate(given)]
    theirs, _ = task_cases.save_model(tmp_path, head, vocab_size=35, **changes)
    if task == "tag":  # the labels in the folder's order are kept
        given = [{**row, "tags": [t if t != "I-LOC" else "B-LOC" for t in row["tags"]]} for row in given]
    options: dict[str, Any] = {"next_sentence": True, "max_length": 20} if case == "next-sentence" else {}
    model, data = made(task, tmp_path, given, **options)
    torch.manual_seed(3)
    items = [data[i] for i in range(len(data))]
    if task == "qa":  # transformers' softmax of positions is over padding too
        items = [item for item in items if len(item[0]) == len(items[0][0])]
        assert len(items) > 1
    batch = plain(data.collate(items))
    theirs = theirs.double().train()
    inputs = dict(batch)
    if task == "qa":
        positions = inputs.pop("labels")
        inputs.update(start_positions=positions[:, 0], end_positions=positions[:, 1])
    golden = theirs(**inputs).loss
    found = model(**batch).loss
    torch.testing.assert_close(found, golden)
    golden.backward()
    found.backward()
    own = model.bert.embeddings.word_embeddings.weight.grad
    torch.testing.assert_close(own, theirs.base_model.embeddings.word_embeddings.weight.grad)
    last = {"classify": "classifier", "tag": "classifier", "qa": "qa_outputs"}.get(task)
    if last is not None:
        torch.testing.assert_close(getattr(model, last).weight.grad, getattr(theirs, last).weight.grad)
    if case == "next-sentence":
        torch.testing.assert_close(
            model.seq_relationship.weight.grad, theirs.cls.seq_relationship.weight.grad
        )


def test_pieces_of_words_have_their_labels(encoder: Path) -> None:
    given = [{"tokens": ["Anna", "Berlin", "newer", "."], "tags": ["B-PER", "B-LOC", "O", "O"]}]
    model, data = made("tag", encoder, given)
    names = model.config.labels()
    assert names == ["O", "B-LOC", "I-LOC", "B-PER", "I-PER"]
    pieces = [tokenizer().core.id_to_token(i) for i in data[0][0]]
    assert pieces == ["[CLS]", "anna", "ber", "##lin", "new", "##er", ".", "[SEP]"]
    assert [n if n < 0 else names[n] for n in data[0][2]] == [
        IGNORE_INDEX, "B-PER", "B-LOC", "I-LOC", "O", "O", "O", IGNORE_INDEX,
    ]  # fmt: skip
    _, data = made("tag", encoder, given, label_pieces="first")
    assert [n if n < 0 else names[n] for n in data[0][2]] == [
        IGNORE_INDEX, "B-PER", "B-LOC", IGNORE_INDEX, "O", IGNORE_INDEX, "O", IGNORE_INDEX,
    ]  # fmt: skip
    with pytest.raises(DataError, match=r"task.max_length: got 41, the model has 40 positions"):
        made("tag", encoder, given, max_length=41)
    _, data = made("tag", encoder, given, max_length=5)
    assert (len(data[0][0]), len(data[0][2]), data.cut, data.cut_rows) == (5, 5, 3, 1)


def test_words_without_spaces_are_joined_as_they_are_written() -> None:
    assert tag._joined(["我", "在", "Berlin", "住", "a", "b"]) == (
        "我在 Berlin 住 a b",
        [0, 1, 3, 10, 12, 14],
    )


@pytest.mark.parametrize("kind", ["bpe", "characters"])
def test_each_word_of_scripts_without_spaces_has_its_label(kind: str, encoder: Path) -> None:
    texts = ["我在北京工作", "他在北京上学", "北京很大 hello", "去北京 2008年"] * 20
    given = [{"tokens": [*"我在北京工作", "hello"], "tags": ["O", "O", "B-LOC", "I-LOC", "O", "O", "B-LOC"]}]
    settings = tag.Options(label_pieces="first")
    examples = tag.examples_of(records(given), settings)
    learnt = train_input_tokenizer(kind, texts, 400)
    assert tag.joins_characters(learnt, examples) == (kind == "bpe")
    source = BertConfig(hidden_size=8, num_attention_heads=2, num_hidden_layers=1, intermediate_size=8)
    model = tag.new_model(source, examples, settings, learnt)
    names = model.config.labels()
    data = tag.training_set(model, learnt, examples, settings)
    assert [names[n] for n in data.labels[0] if n >= 0] == given[0]["tags"]
    rows, words = tag.rows_of(model, learnt, examples, settings)
    assert {word for held in words[0] if held for word in held} == set(range(7))
    copy = InputTokenizer(
        tokenizers.Tokenizer.from_str(learnt.core.to_str())
    )  # as the folder of the run holds it
    assert copy.encode(["我在北京工作 hello"]) == rows
    (found,) = tag.predict(model, copy, [{"text": "我在北京"}])
    assert all(entity["text"] == "我在北京"[entity["start"] : entity["end"]] for entity in found["entities"])


def test_words_in_one_token_are_refused_in_training_and_share_its_label(encoder: Path) -> None:
    core = tokenizers.Tokenizer(models.WordLevel({"[UNK]": 0, "new york": 1, "in": 2}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex("in|new york"), "removed", invert=True)
    joined = InputTokenizer(core)
    given = [{"tokens": ["in", "new", "york"], "tags": ["O", "B-LOC", "I-LOC"]}]
    settings = tag.Options()
    examples = tag.examples_of(records(given), settings)
    source = BertConfig(hidden_size=8, num_attention_heads=2, num_hidden_layers=1, intermediate_size=8)
    model = tag.new_model(source, examples, settings, joined)
    with pytest.raises(DataError, match=r"x: line 1: a token holds parts of 'new' and 'york'"):
        tag.training_set(model, joined, examples, settings)
    with torch.no_grad():
        model.classifier.weight.zero_()
        model.classifier.bias.copy_(torch.tensor([0.0, 1.0, 0.0]))  # B-LOC
    metrics = tag.evaluate(model, joined, examples).metrics
    assert (metrics["recall"], metrics["accuracy"]) == (1.0, 2 / 3)


def test_tags_that_are_no_entities_are_classes(encoder: Path) -> None:
    given = [{"tokens": ["anna", "lives"], "tags": ["NNP", "VBZ"]}]
    model, _ = made("tag", encoder, given)
    assert model.config.labels() == ["NNP", "VBZ"]
    examples = tag.examples_of(records(given), tag.Options())
    assert tag.best(examples) == ("accuracy", True)
    assert 0.0 <= tag.evaluate(model.float(), tokenizer(), examples).metrics["accuracy"] <= 1.0


def test_entities_of_iob1_begin_with_b() -> None:
    """An I- that continues nothing begins an entity; tags in IOB2 stay as they are."""
    given = [
        ("I-PER O O I-LOC", "B-PER O O B-LOC"),
        ("I-PER I-PER B-PER I-LOC O I-LOC I-LOC", "B-PER I-PER B-PER B-LOC O B-LOC I-LOC"),
        ("B-PER I-PER O B-LOC B-LOC I-LOC", "B-PER I-PER O B-LOC B-LOC I-LOC"),
    ]
    examples = tag.examples_of(
        records([{"tokens": tags.split(), "tags": tags.split()} for tags, _ in given]), tag.Options()
    )
    assert [" ".join(example.tags) for example in examples] == [tags for _, tags in given]


def test_equally_near_positives_share_their_ranks(encoder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Vectors that are all the same, or not finite, find nothing; one of two equal ones is right half the time."""
    given = [{"text": f"anna {i}", "positive": f"maria {i}"} for i in range(4)]
    examples = embed.examples_of(records(given), embed.Options())
    axes = torch.eye(4)

    def metrics(vector: Callable[[int], Tensor]) -> dict[str, float]:
        vectors = [vector(i // 2) for i in range(8)]  # of text and positive in turn
        monkeypatch.setattr(embed, "run", lambda *_: vectors)
        model, _ = made("embed", encoder, rows("embed"))
        return embed.evaluate(model, tokenizer(), examples).metrics

    assert metrics(lambda i: axes[i]) == {"accuracy": 1.0, "mrr": 1.0}
    assert metrics(lambda i: axes[0] * (i + 1)) == {"accuracy": 0.25, "mrr": 0.4}
    assert metrics(lambda i: axes[0] * torch.nan) == {"accuracy": 0.25, "mrr": 0.4}
    assert metrics(lambda i: axes[i // 2]) == {"accuracy": 0.5, "mrr": 2 / 3}


def test_answers_stand_where_their_labels_say(encoder: Path) -> None:
    """In every window that has a label, its tokens are the answer; every answer is in a window."""
    words = ("the", "old", "tower", "river", "berlin", "works", ",", "newer")
    context = " ".join(itertools.islice(itertools.cycle(words), 50))
    given = []
    for start, end in ((0, 1), (4, 6), (20, 23), (48, 50)):
        parts = context.split()
        first = len(" ".join(parts[:start])) + (start > 0)
        text = " ".join(parts[start:end])
        given.append(
            {"question": "where?", "context": context, "answers": [{"text": text, "answer_start": first}]}
        )
    given.append({"question": "where?", "context": context, "answers": []})
    settings = qa.Options(max_length=30, stride=10)
    examples = qa.examples_of(records(given), settings)
    model = qa.new_model(encoder, examples, settings, tokenizer())
    windows = qa.windows_of(model, tokenizer(), examples, settings)
    for example, of_example in zip(examples, windows):
        assert len(of_example) > 1
        assert all(len(row.ids) <= 30 for row in of_example)
        found = [(row, positions_of(row, example.context, example.answers)) for row in of_example]
        held = [(row, place) for row, place in found if place != (0, 0)]
        assert bool(held) == bool(example.answers)
        for row, (first, last) in held:
            assert example.context[row.offsets[first][0] : row.offsets[last][1]] == example.answers[0][0]
    data = qa.training_set(model, tokenizer(), examples, settings)
    assert len(data) == sum(map(len, windows))


def test_windows_are_of_the_first_answer_that_they_hold_whole(encoder: Path) -> None:
    """A part of an answer, or none, is no answer."""
    context = " ".join(["berlin", *["the old tower"] * 8, "berlin", *["a new river"] * 8, "anna works"])
    places = [(text, context.index(text)) for text in ("anna works", "tower berlin a", "berlin")]
    answers = [{"text": text, "answer_start": start} for text, start in places]
    settings = qa.Options(max_length=16, stride=2)
    examples = qa.examples_of(
        records([{"question": "who?", "context": context, "answers": answers}]), settings
    )
    model = qa.new_model(encoder, examples, settings, tokenizer())
    (windows,) = qa.windows_of(model, tokenizer(), examples, settings)
    labels = qa.training_set(model, tokenizer(), examples, settings).labels
    found = []
    for row, (first, last) in zip(windows, labels):
        held = [a for a, b in (offset for offset, kind in zip(row.offsets, row.sequences) if kind == 1)]
        ends = [b for a, b in (offset for offset, kind in zip(row.offsets, row.sequences) if kind == 1)]
        whole = [text for text, at in places if held[0] <= at and at + len(text) <= ends[-1]]
        found.append(context[row.offsets[first][0] : row.offsets[last][1]])
        assert found[-1] == (whole[0] if whole else "")
    assert {"", "anna works", "tower berlin a", "berlin"} == set(found)


def test_a_long_question_changes_the_windows_of_no_other(encoder: Path) -> None:
    context = "the old tower , " * 12
    given = [{"question": "who?", "context": context, "answers": [{"text": "old"}]}]
    given.append({"question": "who? " * 8, "context": context, "answers": [{"text": "old"}]})
    settings = qa.Options(max_length=30, stride=10)
    examples = qa.examples_of(records(given), settings)
    model = qa.new_model(encoder, examples, settings, tokenizer())
    first, second = qa.windows_of(model, tokenizer(), examples, settings)
    assert first == qa.windows_of(model, tokenizer(), examples[:1], settings)[0]
    assert len(second) > len(first)


def passages(given: list[str], **options: Any) -> tuple[Any, masked_lm.Passages]:
    settings = masked_lm.Options(**options)
    examples = masked_lm.examples_of(records([{"text": text} for text in given]), settings)
    config = task_cases.encoder_models.models.BertConfig(
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        max_position_embeddings=64,
    )
    model = masked_lm.new_model(config, examples, settings, tokenizer())
    return model, masked_lm.training_set(model, tokenizer(), examples, settings)


@pytest.mark.parametrize("whole_words", [False, True])
def test_masks_fall_as_often_as_they_should(whole_words: bool) -> None:
    """Shares of chosen, masked, random and unchanged tokens within five standard deviations; special tokens never."""
    _, data = passages(
        ["berlin newer acmes the old tower . " * 7] * 40, max_length=64, whole_words=whole_words
    )
    torch.manual_seed(0)
    items = [data[i] for i in range(len(data))]
    chosen = masked = changed = tokens = 0
    for _ in range(8):
        batch = data.collate(items)
        plain_ids = torch.where(batch["labels"] == IGNORE_INDEX, batch["input_ids"], batch["labels"])
        words = torch.full_like(plain_ids, -1)
        for row, item in enumerate(items):
            words[row, : len(item.words)] = torch.tensor(item.words)
            assert plain_ids[row, : len(item.ids)].tolist() == item.ids
        is_chosen = batch["labels"] != IGNORE_INDEX
        assert not (is_chosen & (words < 0)).any()
        if whole_words:
            for row in range(len(items)):
                for word in range(int(words[row].max()) + 1):
                    assert is_chosen[row][words[row] == word].unique().numel() == 1
        chosen += int(is_chosen.sum())
        tokens += int((words >= 0).sum())
        masked += int((batch["input_ids"][is_chosen] == data.mask_id).sum())
        changed += int((batch["input_ids"] != plain_ids)[is_chosen].sum())
    spread = 5 * (2.0 if whole_words else 1.0)  # words of two tokens double the variance at most

    def near(count: int, total: int, share: float) -> bool:
        return abs(count - share * total) <= spread * (total * share * (1 - share)) ** 0.5

    vocab = data.vocab_size
    assert near(chosen, tokens, 0.15)
    assert near(masked, chosen, 0.8 + 0.1 / vocab)
    assert near(changed, chosen, 0.8 + 0.1 * (vocab - 1) / vocab)


def test_every_passage_has_something_to_find() -> None:
    _, data = passages(["anna", "the"], mask_share=0.01)
    for _ in range(20):
        assert ((data.collate([data[0], data[1]])["labels"] != IGNORE_INDEX).sum(1) == 1).all()


def test_no_token_of_a_document_is_lost() -> None:
    text = "the old tower, the new river. " * 9
    _, data = passages([text, "anna"], max_length=16)
    ids = [token for i in range(len(data)) for token, word in zip(data[i].ids, data[i].words) if word >= 0]
    assert ids == [
        *task_cases.core().encode(text, add_special_tokens=False).ids,
        *task_cases.core().encode("anna").ids[1:-1],
    ]
    assert max(len(data[i].ids) for i in range(len(data))) == 16


@pytest.mark.parametrize("end", [" ", ". ", " \u0964 ", "\u061f "])
def test_no_token_of_a_document_is_lost_in_pairs(end: str) -> None:
    """Also of text without marks, or with those of other scripts than ASCII's: first passages and what follows them."""
    words = [w for w in task_cases.WORDS if w.isalpha()]
    documents = [end.join(" ".join(words[i % 7 :][:5]) for i in range(n)) for n in (40, 9, 1, 30)]
    _, data = passages(documents, max_length=32, next_sentence=True)
    found: list[int] = []
    for item in (data[i] for i in range(len(data))):
        middle = item.ids.index(3)
        found += item.ids[1:middle] + (item.ids[middle + 1 : -1] if item.follows == 0 else [])
        assert len(item.ids) <= 32
    joined = [task_cases.core().encode(text, add_special_tokens=False).ids for text in documents]
    assert found == [token for ids in joined for token in ids]


def test_sentences_end_at_the_marks_of_their_script() -> None:
    for text, parts in {
        "a. b? c 3.5! d": ["a.", "b?", "c 3.5!", "d"],
        "\u0905\u0964\u0905 \u0964 \u0905": ["\u0905\u0964", "\u0905 \u0964", "\u0905"],
        "\u4f60\u3002\u6211\uff01": ["\u4f60\u3002", "\u6211\uff01"],
        "\u0645\u061f \u0645": ["\u0645\u061f", "\u0645"],
    }.items():
        assert [part for part in SENTENCES.split(text) if part] == parts
        assert baselines.lead(text) == parts[0]


def test_second_passages_follow_or_come_from_elsewhere() -> None:
    """Half follow: those are the next tokens of their document; all sides have tokens and fit."""
    words = [w for w in task_cases.WORDS if w.isalpha()]
    documents = [
        ". ".join(" ".join((w, *words[i : i + 4])) for w in words[i : i + 12]) for i in range(12)
    ] * 4
    _, data = passages(documents, max_length=32, next_sentence=True)
    joined = [task_cases.core().encode(text, add_special_tokens=False).ids for text in documents]
    counts = Counter(data[i].follows for i in range(len(data)))
    assert set(counts) == {0, 1}
    assert abs(counts[0] - counts[1]) <= 5 * len(data) ** 0.5
    for item in (data[i] for i in range(len(data))):
        assert len(item.ids) <= 32
        middle = item.ids.index(3)
        first, second = item.ids[1:middle], item.ids[middle + 1 : -1]
        assert first
        assert second
        assert item.types == [0] * (middle + 1) + [1] * (len(second) + 1)
        if item.follows == 0:
            both = " ".join(map(str, first + second)) + " "
            assert any(both in " ".join(map(str, ids)) + " " for ids in joined)
    batch = data.collate([data[0], data[1]])
    assert batch["next_sentence_label"].tolist() == [data[0].follows, data[1].follows]
    with pytest.raises(DataError, match="holds 1 document with a token, next_sentence needs at least two"):
        passages(["anna. maria."], next_sentence=True)


@pytest.mark.parametrize(
    ("task", "row", "complaint"),
    [
        ("classify", {"text": "a"}, "has no 'label', it has 'text'"),
        ("classify", {"text": 3, "label": "a"}, "text is a int, needs a text"),
        ("classify", {"text": "a", "label": None}, "label is None, needs a name or an integer"),
        ("classify", {"text": "a", "label": "\ud800"}, "label has characters that are not valid Unicode"),
        ("classify", {"text": "a", "label": ["a"]}, "label is 'bad!', needs a list of labels as others have"),
        ("classify", {"text": "a", "label": 0.5}, "label is 'bad!', needs a finite number"),
        ("tag", {"tokens": ["a"], "tags": ["O", "O"]}, "has 1 tokens and 2 tags, needs one for each"),
        ("tag", {"tokens": [], "tags": []}, "tokens is [], needs a list of texts"),
        ("tag", {"tokens": ["a", " "], "tags": ["O", "O"]}, "tokens has ' ' in place 2, needs a text"),
        ("tag", {"tokens": ["a"], "tags": ["PER"]}, "tag 1 is 'PER', needs O, B-TYPE or I-TYPE"),
        ("qa", {"question": "a", "context": "b"}, "has no 'answers'"),
        ("qa", {"question": "a", "context": "b c", "answers": [{"text": "c", "answer_start": 1}]},
         "answer 1, 'c', is not at character 1 of its context, ' ' is"),
        ("qa", {"question": "a", "context": "b", "answers": ["c"]}, "answer 1 has no text"),
        ("qa", {"question": "a", "context": "b", "answers": [{"text": "c"}]}, "answer 1, 'c', is not at character -1"),
        ("qa", {"question": "a", "context": "b", "answers": [], "is_impossible": False}, "answers is empty"),
        ("embed", {"text": "a"}, "has no 'positive'"),
        ("embed", {"text": "a", "positive": "b", "negative": "c"}, "has 1 negatives, x: line 1 has 0"),
        ("embed", {"text": "a", "positive": "b", "score": "high"}, "score is 'high', needs a number"),
        ("embed", {"text": "a", "positive": "b", "score": 1}, "has a score, unlike the others"),
        ("masked-lm", {"text": " "}, "text is empty"),
    ],
)  # fmt: skip
def test_what_is_no_example_is_named(task: str, row: dict[str, Any], complaint: str) -> None:
    module = TASKS[task]
    with pytest.raises(DataError) as caught:
        module.examples_of(records([rows(task)[-1], row]), module.Options())
    assert complaint in str(caught.value)
    assert str(caught.value).startswith("x: line ")


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("value", [-1, "x", True, float("nan")])
def test_options_are_checked_by_name(task: str, value: Any) -> None:
    for name in TASKS[task].Options.CHECKS:
        if name == "separator" and value == "x":
            continue
        if value is True and isinstance(getattr(TASKS[task].Options(), name), bool):
            continue
        with pytest.raises(ValueError, match=name):
            TASKS[task].Options(**{name: value})


def test_labels_are_of_one_kind() -> None:
    def examples(*labels: Any, **options: Any) -> list[classify.Example]:
        given = [{"text": "a", "label": label} for label in labels]
        return classify.examples_of(records(given), classify.Options(**options))

    assert classify.labels_in(examples("b", "a", True)) == ("a", "b", "true")
    assert classify.labels_in(examples(10, 9, 0)) == ("0", "9", "10")
    assert classify.labels_in(examples(["b", "a"], [])) == ("a", "b")
    assert classify.labels_in(examples("b;a", "", separator=";")) == ("a", "b")
    assert classify.kind_of(examples("b;a", "", separator=";")) == classify.SEVERAL
    assert classify.kind_of(examples(1, 0.5)) == classify.REGRESSION
    assert classify.kind_of(examples("1", "2.5", kind="regression")) == classify.REGRESSION
    assert classify.labels_in(examples(1, 0.5)) is None
    assert classify.kind_of(examples([1, 0.5], [1, 2])) == classify.REGRESSION
    given = records([{"text": "a", "label": label} for label in (1, 0.5)])
    settled = classify.settled(classify.Options(), given)
    assert (
        classify.kind_of(classify.examples_of(records([{"text": "a", "label": 1}]), settled))
        == classify.REGRESSION
    )
    for few in (examples("a", "a"), examples([], []), examples(0.5, 0.5)):
        with pytest.raises(DataError, match="data: "):
            classify.check_examples(few)
    with pytest.raises(DataError, match=r"x: line 2: label has 1 numbers, others have 2"):
        examples([0.5, 1], [0.5], [1, 2], kind="regression")


def test_saved_heads_stay_where_they_fit(tmp_path: Path) -> None:
    folder = training_cases.save_encoder(
        tmp_path, "ForSequenceClassification", num_labels=3, id2label={0: "good!", 1: "bad!", 2: "so"}
    )
    given = records(rows("classify"))

    def weight(**options: Any) -> tuple[list[str], Tensor]:
        settings = classify.Options(**options)
        model = classify.new_model(folder, classify.examples_of(given, settings), settings)
        return model.config.labels(), model.classifier.weight

    labels, saved = weight()
    assert labels == ["good!", "bad!", "so"]
    assert torch.equal(weight(head="saved")[1], saved)
    labels, new = weight(head="new")
    assert (labels, tuple(new.shape)) == (["bad!", "good!"], (2, 32))
    given = [*given, Record("x", {"text": "a", "label": "other"})]
    assert weight()[0] == ["bad!", "good!", "other"]
    with pytest.raises(DataError, match=r"task.head: got 'saved', but the model has a head without 'other'"):
        weight(head="saved")
