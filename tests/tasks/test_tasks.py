"""Tasks on folders: the answers of transformers' pipelines, spans of every kind, and what does not fit is counted."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import task_cases
import torch
from task_cases import LABELS, TEXTS

from fastattn.data import DataError, train_bpe
from fastattn.data.encoding import InputTokenizer, Row
from fastattn.models import BertConfig, BertForQuestionAnswering
from fastattn.tasks import classify, embed, fill, qa, tag
from fastattn.tasks import predict as tasks

CLOSE = torch.finfo(torch.float32).eps * 64  # probabilities of logits that differ by rounding


def folder_of(where: Path, head: str, **changes: Any) -> tuple[Any, Any, Any, Any]:
    """(transformers' model, its tokenizer, our model, our tokenizer) of one folder."""
    theirs, tokenizer = task_cases.save_model(where, head, **changes)
    task = tasks.task_of(where)
    return theirs, tokenizer, *tasks.load_folder(where, task)


def texts(*given: str) -> list[dict[str, str]]:
    return [{"text": text} for text in given]


def pipeline(task: str, model: Any, tokenizer: Any, **options: Any) -> Any:
    import transformers

    return transformers.pipeline(task, model=model, tokenizer=tokenizer, device="cpu", **options)


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert"])
@pytest.mark.parametrize(
    "changes",
    [
        {"num_labels": 3},
        {"num_labels": 3, "problem_type": "multi_label_classification"},
        {"num_labels": 1},
        {"num_labels": 2, "problem_type": "regression"},
    ],
    ids=["classes", "several", "one", "regression"],
)
def test_classes_are_those_of_the_pipeline(family: str, changes: dict[str, Any], tmp_path: Path) -> None:
    pad = {"pad_token_id": 0} if family == "roberta" else {}
    model, tokenizer, ours, own = folder_of(
        tmp_path, "ForSequenceClassification", family=family, **pad, **changes
    )
    pipe = pipeline("text-classification", model, tokenizer, top_k=None)
    found = classify.predict(ours, own, texts(*TEXTS), batch_size=2)
    for text, each in zip(TEXTS, found):
        golden = {one["label"]: one["score"] for one in pipe([text])[0]}
        assert {one["label"]: one["score"] for one in each["labels"]} == pytest.approx(
            golden, rel=CLOSE, abs=CLOSE
        )
        scores = [one["score"] for one in each["labels"]]
        assert scores == sorted(scores, reverse=True)
        assert each["cut"] == 0


def test_pairs_of_texts_are_classified(tmp_path: Path) -> None:
    model, tokenizer, ours, own = folder_of(tmp_path, "ForSequenceClassification")
    pipe = pipeline("text-classification", model, tokenizer)
    pairs = [{"text": a, "text_pair": b} for a, b in itertools.pairwise(TEXTS[:3])]
    for pair, each in zip(pairs, classify.predict(ours, own, pairs, top_k=1)):
        golden = pipe(pair)
        golden = golden[0] if isinstance(golden, list) else golden
        assert [one["label"] for one in each["labels"]] == [golden["label"]]
        assert each["labels"][0]["score"] == pytest.approx(golden["score"], rel=CLOSE)


def test_token_types_are_given_where_the_folder_wants_them(tmp_path: Path) -> None:
    assert InputTokenizer(task_cases.core()).typed
    task_cases.save_tokenizer(tmp_path)
    assert InputTokenizer.from_pretrained(tmp_path).typed
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings["model_input_names"] = ["input_ids", "attention_mask"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    untyped = InputTokenizer.from_pretrained(tmp_path)
    (row,) = untyped.encode([("a", "b")])
    assert set(row.types) == {0}
    (row,) = InputTokenizer(task_cases.core()).encode([("a", "b")])
    assert set(row.types) == {0, 1}


def test_entities_are_those_of_the_pipeline(tmp_path: Path) -> None:
    model, tokenizer, ours, own = folder_of(
        tmp_path,
        "ForTokenClassification",
        num_labels=5,
        id2label=LABELS,
        label2id={v: k for k, v in LABELS.items()},
    )
    pipe = pipeline("token-classification", model, tokenizer, aggregation_strategy="simple")
    found = tag.predict(ours, own, texts(*TEXTS), batch_size=4)
    assert sum(len(each["entities"]) for each in found) > 5
    for text, each in zip(TEXTS, found):
        golden = pipe(text)
        assert [(e["entity"], e["start"], e["end"]) for e in each["entities"]] == [
            (e["entity_group"], e["start"], e["end"]) for e in golden
        ]
        assert [e["score"] for e in each["entities"]] == pytest.approx(
            [e["score"] for e in golden], rel=CLOSE
        )
        assert all(e["text"] == text[e["start"] : e["end"]] for e in each["entities"])


@pytest.mark.parametrize(
    ("labels", "spans"),
    [
        ("O O O", []),
        ("B-A I-A O", [("A", 0, 3)]),
        ("B-A B-A I-A", [("A", 0, 1), ("A", 2, 5)]),
        ("I-A I-A I-B", [("A", 0, 3), ("B", 4, 5)]),
        ("B-A O I-A", [("A", 0, 1), ("A", 4, 5)]),
        ("A A O", [("A", 0, 3)]),
    ],
)
def test_labels_in_bio_form_become_spans(labels: str, spans: list[tuple[str, int, int]]) -> None:
    each = [("B-A", 0.1), *((label, 0.5) for label in labels.split()), ("I-A", 0.1)]
    row = Row([0] * 5, [0] * 5, [(0, 0), (0, 1), (2, 3), (4, 5), (0, 0)], [None, 0, 0, 0, None])
    found = tag.decode(each, row, "a b c")
    assert [(e["entity"], e["start"], e["end"]) for e in found] == spans
    assert all(e["score"] == 0.5 for e in found)


@pytest.mark.parametrize("text", ["a river  runs, so the old", " the\u3000tower \n by the river "])
def test_entities_and_answers_have_no_space_around_them(text: str) -> None:
    """Byte-level tokens begin with the space before a word, and their offsets may contain it."""
    own = InputTokenizer(train_bpe([*TEXTS, text] * 2, 300).core)
    (row,) = own.encode([text])
    assert any(text[a].isspace() for a, b in row.offsets if b > a)
    for entity in tag.decode([("B-A", 0.5)] * len(row.ids), row, text):
        assert entity["text"] == text[entity["start"] : entity["end"]]
        assert entity["text"] == entity["text"].strip()
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = BertForQuestionAnswering(BertConfig(vocab_size=300, **sizes)).eval()
    example = {"question": "where", "context": text}
    (found,) = qa.predict(model, own, [example], top_k=50)
    assert len(found["answers"]) > 10
    for answer in found["answers"]:
        assert answer["answer"] == text[answer["start"] : answer["end"]] == answer["answer"].strip()


@pytest.mark.parametrize("label", ["B-A", "I-A"])
def test_a_token_of_white_space_alone_is_no_entity(label: str) -> None:
    row = Row([0] * 3, [0] * 3, [(0, 1), (1, 3), (3, 4)], [0] * 3, 0)
    found = tag.decode([("O", 0.9), (label, 0.8), ("O", 0.9)], row, "a  b")
    assert found == []
    found = tag.decode([("O", 0.9), (label, 0.8), ("I-A", 0.6)], row, "a  b")
    assert [(each["entity"], each["start"], each["end"], each["text"]) for each in found] == [
        ("A", 3, 4, "b")
    ]


def test_one_label_marks_tokens_over_one_half() -> None:
    from types import SimpleNamespace

    config = SimpleNamespace(id2label={0: "replaced"})
    labels = tag.labels_of(torch.tensor([-2.0, 2.0]), config)
    assert [label for label, _ in labels] == ["O", "replaced"]
    assert labels[0][1] == pytest.approx(labels[1][1], rel=CLOSE)


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_words_behind_masks_are_those_of_the_pipeline(family: str, tmp_path: Path) -> None:
    pad = {"pad_token_id": 0} if family == "roberta" else {}
    model, tokenizer, ours, own = folder_of(tmp_path, "ForMaskedLM", family=family, vocab_size=35, **pad)
    pipe = pipeline("fill-mask", model, tokenizer, top_k=4)
    given = ["Anna lives in [MASK].", "the [MASK] tower and [MASK] river in Paris"]
    for text, each in zip(given, fill.predict(ours, own, texts(*given), top_k=4)):
        golden = pipe(text)
        golden = golden if isinstance(golden[0], list) else [golden]
        assert len(each["masks"]) == text.count("[MASK]")
        for mine, their in zip(each["masks"], golden, strict=True):
            assert [(m["token"], m["text"]) for m in mine] == [(t["token"], t["token_str"]) for t in their]
            assert [m["score"] for m in mine] == pytest.approx([t["score"] for t in their], rel=CLOSE)
    other = fill.predict(ours, own, texts("Anna lives in <mask>."), top_k=4)
    assert other == fill.predict(ours, own, texts(given[0]), top_k=4)


def best_span(model: Any, tokenizer: Any, question: str, context: str, longest: int) -> dict[str, Any]:
    """The answer by trying every span, transformers' logits, of a pair that fits."""
    inputs = tokenizer(question, context, return_tensors="pt", return_offsets_mapping=True)
    offsets, ids = inputs.pop("offset_mapping")[0].tolist(), inputs.sequence_ids(0)
    with torch.no_grad():
        out = model(**inputs)
    shown = [i for i, s in enumerate(ids) if s == 1]
    a, b = (logits[0, [0, *shown]].softmax(-1).tolist() for logits in (out.start_logits, out.end_logits))
    spans = [
        (a[i + 1] * b[j + 1], offsets[shown[i]][0], offsets[shown[j]][1])
        for i in range(len(shown))
        for j in range(i, min(len(shown), i + longest))
    ]
    score, first, last = max(spans)
    return {"score": score, "start": first, "end": last, "none": a[0] * b[0]}


QUESTIONS = [
    ("where does Anna live?", TEXTS[0]),
    ("who works for Acme?", TEXTS[3]),
    ("the river", TEXTS[1]),
]


def test_answers_are_the_best_of_all_spans(tmp_path: Path) -> None:
    model, tokenizer, ours, own = folder_of(tmp_path, "ForQuestionAnswering", max_position_embeddings=60)
    examples = [{"question": q, "context": c} for q, c in QUESTIONS]
    found = qa.predict(ours, own, examples, batch_size=2)
    for (question, context), each in zip(QUESTIONS, found):
        golden = best_span(model, tokenizer, question, context, qa.MAX_ANSWER_TOKENS)
        (answer,) = each["answers"]
        assert (answer["start"], answer["end"]) == (golden["start"], golden["end"])
        assert answer["answer"] == context[answer["start"] : answer["end"]]
        assert answer["score"] == pytest.approx(golden["score"], rel=CLOSE)
        assert each["no_answer_score"] == pytest.approx(golden["none"], rel=CLOSE)


def test_no_answer_competes_where_it_may(tmp_path: Path) -> None:
    _, _, ours, own = folder_of(tmp_path, "ForQuestionAnswering", max_position_embeddings=60)
    examples = [{"question": q, "context": c} for q, c in QUESTIONS]
    without = qa.predict(ours, own, examples, top_k=500)
    each_with = qa.predict(ours, own, examples, top_k=500, no_answer=True)
    for plain, both in zip(without, each_with):
        assert all(answer["answer"] is not None for answer in plain["answers"])
        nothing = [answer for answer in both["answers"] if answer["answer"] is None]
        assert [answer["score"] for answer in nothing] == [both["no_answer_score"]]
        assert [answer for answer in both["answers"] if answer["answer"] is not None] == plain["answers"]
        scores = [answer["score"] for answer in both["answers"]]
        assert scores == sorted(scores, reverse=True)


def test_a_long_context_is_read_in_windows(tmp_path: Path) -> None:
    """Every token of the context is in a window, and the answer is the best of all windows' answers."""
    _, _, ours, own = folder_of(tmp_path, "ForQuestionAnswering", max_position_embeddings=24)
    question, context = "who lives in Paris?", " ".join((*TEXTS, *TEXTS[4::-1]))
    example = {"question": question, "context": context}
    room = 24 - len(own.encode([question])[0].ids) - 1
    (windows,) = own.encode_windows([(question, context)], 24, room // 2)
    longer = {"question": f"{question} {question}", "context": "Paris"}  # changes nothing for the first
    assert qa.predict(ours, own, [example, longer])[0] == qa.predict(ours, own, [example])[0]
    assert len(windows) > 3
    shown = {span for row in windows for span, s in zip(row.offsets, row.sequences) if s == 1}
    (whole,) = own.encode([(question, context)])
    assert shown == {span for span, s in zip(whole.offsets, whole.sequences) if s == 1}
    (found,) = qa.predict(ours, own, [example])
    answers = []
    for row in windows:
        with torch.no_grad():
            out = ours(torch.tensor([row.ids]), None, torch.tensor([row.types]))
        answers.append(qa.decode(out.start_logits[0], out.end_logits[0], row, 1))
    score, first, last = max(spans[0] for spans, _ in answers)
    assert found["answers"][0]["score"] == pytest.approx(score, rel=CLOSE)
    assert (found["answers"][0]["start"], found["answers"][0]["end"]) == (first, last)
    assert found["no_answer_score"] == pytest.approx(min(none for _, none in answers), rel=CLOSE)
    with pytest.raises(ValueError, match=r"question 2: has \d+ tokens of the 24 that the model reads"):
        qa.predict(ours, own, [example, {"question": context, "context": question}])


def test_vectors_are_those_of_encode(tmp_path: Path) -> None:
    _, _, ours, own = folder_of(tmp_path, "Model")
    assert tasks.task_of(tmp_path) is embed
    golden = ours.encode(list(TEXTS))
    found = torch.tensor(
        [each["embedding"] for each in embed.predict(ours, own, texts(*TEXTS), batch_size=4)]
    )
    torch.testing.assert_close(found, golden, rtol=CLOSE, atol=CLOSE)
    ours.max_seq_length, ours.lower_case = 5, True
    ours.prompts, ours.default_prompt_name = {"q": "where "}, "q"
    found = embed.predict(ours, own, texts(*TEXTS))
    torch.testing.assert_close(
        torch.tensor([each["embedding"] for each in found]), ours.encode(list(TEXTS)), rtol=CLOSE, atol=CLOSE
    )
    assert [each["cut"] for each in found] == [max(0, len(own.core.encode(t).ids) + 1 - 5) for t in TEXTS]


def test_what_does_not_fit_is_counted(tmp_path: Path) -> None:
    _, _, ours, own = folder_of(tmp_path, "ForTokenClassification", max_position_embeddings=8)
    given = texts(TEXTS[3], TEXTS[5])
    found = tag.predict(ours, own, given)
    assert [each["cut"] for each in found] == [len(own.core.encode(TEXTS[3]).ids) - 8, 0]
    (row,) = own.encode([(TEXTS[3], TEXTS[3])], 9)
    assert len(row.ids) == 9
    assert row.cut == len(own.core.encode(TEXTS[3], TEXTS[3]).ids) - 9


def test_a_vocabulary_alone_gives_the_same_tokens(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds neither tokenizer.json nor vocab.txt"):
        InputTokenizer.from_pretrained(tmp_path)
    (tmp_path / "vocab.txt").write_text("\n".join((*task_cases.SPECIAL, *task_cases.WORDS)))
    ours, golden = InputTokenizer.from_pretrained(tmp_path), InputTokenizer(task_cases.core())
    given: list[Any] = [*TEXTS, "a [MASK] film", (TEXTS[0], TEXTS[1])]
    assert ours.encode(given) == golden.encode(given)
    assert ours.mask_id == 4
    (tmp_path / "vocab.txt").write_text("[UNK]\na")
    with pytest.raises(DataError, match=r"vocab.txt lacks \[SEP\] or \[CLS\]"):
        InputTokenizer.from_pretrained(tmp_path)
