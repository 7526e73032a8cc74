"""The examples of labelled tasks: what is held out of them, cleaned, and decided before the split."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fastattn.data import DataError
from fastattn.data.records import Record
from fastattn.train import run as work
from fastattn.train.corpus import Corpus
from fastattn.train.task_config import Sections, read_sections
from fastattn.train.task_data import TaskData, key_of, read_data, texts_of

WORDS = ["anna", "maria", "paris", "berlin", "lives", "works", "good", "bad", "film", "river", "tower", "old"]
USER, ASSISTANT = "user", "assistant"


def row_of(task: str, word: str, label: str) -> dict[str, Any]:
    """A row of a task about a word; its label decides what the model has to find."""
    chat = [{"role": USER, "content": word}]
    return {
        "classify": {"text": word, "label": label},
        "tag": {"tokens": [word], "tags": [label]},
        "qa": {"question": "who?", "context": f"{word} {label}", "answers": [{"text": label}]},
        "seq2seq": {"source": word, "target": label},
        "embed": {"text": word, "positive": f"{word} {label}"},
        "chat": {"messages": [*chat, {"role": ASSISTANT, "content": word}]},
        "dpo": {"prompt": chat, "chosen": f"{word} {label}", "rejected": word},
        "causal-lm": {"text": word},
        "masked-lm": {"text": word},
    }[task]


def sections_of(task: str, folder: Path, *more: str) -> Sections:
    overrides = (f"--train.output_dir={folder / 'out'}", f"--data.cache={folder / 'cache'}", *more)
    module = work.task_named(task)
    return read_sections(module, preset=None, file=None, overrides=overrides, defaults=module.DEFAULTS)


def read(task: str, folder: Path, rows: list[dict[str, Any]], *more: str) -> TaskData:
    path = folder / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_data(work.task_named(task), [str(path)], [], sections_of(task, folder, *more))


def words_of(example: Any) -> set[str]:
    return {word for word in WORDS if any(word in text.split() for text in texts_of(example))}


@pytest.mark.parametrize("task", work.TASKS)
def test_equal_examples_are_not_apart_whatever_else_their_rows_have(task: str, tmp_path: Path) -> None:
    """A column that a task does not read, such as an id, divides no equal examples and makes none differ."""
    rows = [{"note": i, **row_of(task, WORDS[i % 8], "ab"[i % 8 // 4])} for i in range(64)]
    data = read(task, tmp_path, rows, "--train.seed=3")
    train = {word for example in data.train for word in words_of(example)}
    dev = {word for example in data.dev for word in words_of(example)}
    assert train
    assert dev
    assert not train & dev
    data = read(task, tmp_path, rows, "--train.seed=3", "--clean.exact_duplicates=true")
    assert len(data.train) == len(train)
    assert data.cleaning == {"exact_duplicates": 64 - len(rows) // 8 * len(dev) - len(train)}


@pytest.mark.parametrize("task", ["causal-lm", "masked-lm"])
def test_documents_in_files_are_divided_by_their_texts(task: str, tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps({"id": i, "text": WORDS[i % 8]}) + "\n" for i in range(64)))
    sections = sections_of(task, tmp_path, "--clean.exact_duplicates=true")
    data = Corpus(work.task_named(task), [str(path)], [], sections).read()
    assert not {example.text for example in data.train} & {example.text for example in data.dev}
    assert len(data.train) == len({example.text for example in data.train})


EDITED = [task for task in work.TASKS if getattr(work.TASKS[task], "EDITABLE", True)]


def reads(task: str, folder: Path, rows: list[dict[str, Any]], *more: str) -> list[TaskData]:
    """The data held in memory, and for tasks on plain text from files too."""
    found = [read(task, folder, rows, *more)]
    if task in ("causal-lm", "masked-lm"):
        paths = [str(folder / "train.jsonl")]
        found.append(Corpus(work.task_named(task), paths, [], sections_of(task, folder, *more)).read())
    return found


@pytest.mark.parametrize("task", EDITED)
def test_texts_that_cleaning_makes_equal_are_not_apart(task: str, tmp_path: Path) -> None:
    rows = [
        row_of(task, f"{word} met {mark}@mail.org", "ab"[i % 2])
        for i, word in enumerate(WORDS)
        for mark in ("x", "y", "z")
    ]
    steps = ("--clean.emails=true", "--clean.exact_duplicates=true")
    for seed in range(3):
        for data in reads(task, tmp_path, rows, *steps, "--data.dev_fraction=0.3", f"--train.seed={seed}"):
            train, dev = ({w for each in part for w in words_of(each)} for part in (data.train, data.dev))
            assert train
            assert dev
            assert train.isdisjoint(dev)
            assert data.cleaning["exact_duplicates"] == 2 * len(data.train)
            assert all("@mail.org" in text for each in data.dev for text in texts_of(each)[:1])


@pytest.mark.parametrize("task", ["classify", "seq2seq", "causal-lm", "masked-lm"])
def test_training_examples_like_a_held_out_one_are_dropped(task: str, tmp_path: Path) -> None:
    pytest.importorskip("datasketch")
    begin = [" ".join(f"{word}{i}" for i in range(30)) for word in WORDS]
    rows = [row_of(task, f"{text} {end}", "a") for text in begin for end in ("one", "two", "three")]
    rows += [row_of(task, "another text", "b"), row_of(task, "a further text", "b")]
    for seed in range(3):
        more = ("--clean.near_duplicates=0.7", "--data.dev_fraction=0.3", f"--train.seed={seed}")
        found = []
        for data in reads(task, tmp_path, rows, *more):
            train, dev = ({texts_of(each)[0].split()[0] for each in part} for part in (data.train, data.dev))
            assert dev
            assert train.isdisjoint(dev - {"a", "another"})
            assert len(data.train) + len(data.dev) + data.cleaning["near_duplicates"] == len(rows)
            found.append([texts_of(each) for part in (data.train, data.dev) for each in part])
        assert found[0] == found[-1]


def test_labels_of_dropped_duplicates_go_back_to_training(tmp_path: Path) -> None:
    pytest.importorskip("datasketch")
    begin = " ".join(f"word{i}" for i in range(30))
    rows = [{"text": f"{begin} {end}", "label": "only"} for end in ("one", "two")]
    rows += [{"text": f"{word} says {i}", "label": "ab"[i % 2]} for i, word in enumerate(WORDS)]
    for seed in range(10):
        more = ("--clean.near_duplicates=0.7", "--data.dev_fraction=0.3", f"--train.seed={seed}")
        data = read("classify", tmp_path, rows, *more)
        assert [example.label for example in data.train].count("only") == 1
        assert "only" not in {example.label for example in data.dev}
        assert data.cleaning == {"near_duplicates": 1}


@pytest.mark.parametrize("task", ["classify", "tag", "seq2seq", "causal-lm", "masked-lm"])
def test_lengths_drop_examples_before_they_are_checked_and_divided(task: str, tmp_path: Path) -> None:
    field = work.task_named(task).FIELDS[0] if task != "tag" else "tokens"
    rows = [row_of(task, f"{word} and more", "ab"[i % 2]) for i, word in enumerate(WORDS)]
    rows += [{**row_of(task, "x", "a"), field: [] if task == "tag" else blank} for blank in ("", " ", "  ")]
    for seed in range(4):
        more = ("--clean.min_chars=5", f"--train.seed={seed}", "--data.dev_fraction=0.4")
        for data in reads(task, tmp_path, rows, *more):
            assert data.cleaning == {"min_chars": 3}
            assert len(data.train) + len(data.dev) == len(WORDS)


@pytest.mark.parametrize("task", ["classify", "tag", "seq2seq", "embed", "dpo"])
def test_equal_texts_with_other_labels_stay_together(task: str) -> None:
    key = key_of(work.task_named(task))
    assert key(Record("x", row_of(task, "anna", "a"))) == key(Record("x", row_of(task, "anna", "b")))
    assert key(Record("x", row_of(task, "anna", "a"))) != key(Record("x", row_of(task, "maria", "a")))


@pytest.mark.parametrize("task", work.TASKS)
def test_a_lone_surrogate_is_refused_with_its_line(task: str, tmp_path: Path) -> None:
    rows = [row_of(task, word, "ab"[i % 2]) for i, word in enumerate(WORDS)]
    text = json.dumps(row_of(task, "x", "a")).replace('"x"', r'"\ud800"')
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + text.replace('"x ', r'"\ud800 ') + "\n")
    with pytest.raises(DataError, match=r"train.jsonl: line 13: .* (valid Unicode|needs a text)"):
        read_data(work.task_named(task), [str(path)], [str(path)], sections_of(task, tmp_path))


def test_questions_without_a_title_are_divided_by_their_contexts(tmp_path: Path) -> None:
    for title in ("", " ", None):
        rows = [{"title": title, **row_of("qa", word, "x")} for word in WORDS]
        data = read("qa", tmp_path, rows)
        assert [len(data.train), len(data.dev)] == [11, 1]


def test_examples_that_go_back_to_training_are_cleaned(tmp_path: Path) -> None:
    labels = ["a", "b"] * 6
    for seed in range(30):
        labels[6] = "only"
        rows = [{"text": f"{word} x@y.de now", "label": label} for word, label in zip(WORDS, labels)]
        more = (f"--train.seed={seed}", "--data.dev_fraction=0.3", "--clean.emails=true")
        data = read("classify", tmp_path, rows, *more)
        assert "only" in {example.label for example in data.train}
        assert not any("@" in example.text for example in data.train)
        assert data.cleaning["emails"] == len(data.train)
        assert all("@" in example.text for example in data.dev)


@pytest.mark.parametrize("task", ["chat", "dpo", "seq2seq", "embed"])
def test_texts_in_messages_are_cleaned(task: str, tmp_path: Path) -> None:
    rows = [row_of(task, f"{word} x@y.de", "b") for word in WORDS]
    data = read(task, tmp_path, rows, "--clean.emails=true")
    assert not any("@" in text for example in data.train for text in texts_of(example))
    assert data.cleaning == {"emails": len(data.train)}


@pytest.mark.parametrize("task", ["tag", "qa"])
def test_texts_with_places_are_not_changed(task: str, tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"clean.emails: changes texts, but the labels of this task are positions"
    ):
        read(task, tmp_path, [row_of(task, word, "b") for word in WORDS], "--clean.emails=true")


def test_a_label_that_only_a_held_out_example_has_is_no_label_of_all(tmp_path: Path) -> None:
    rows = [{"text": word, "label": "a"} for word in WORDS[:9]] + [{"text": "tower", "label": "b"}]
    found = []
    for seed in range(30):
        try:
            found.append(len(read("classify", tmp_path, rows, f"--train.seed={seed}").train))
        except DataError as error:
            found.append(str(error))
    assert set(found) == {9, "data: has too few examples of each label to hold some out, needs --dev"}


def test_all_examples_decide_on_the_kind_of_labels(tmp_path: Path) -> None:
    rows = [{"text": word, "label": i % 4} for i, word in enumerate(WORDS)]
    rows[3]["label"] = 2.5
    for seed in range(30):
        data = read("classify", tmp_path, rows, f"--train.seed={seed}")
        assert data.options.kind == "regression"
        assert {len(example.label) for example in (*data.train, *data.dev)} == {1}
