"""Records of every format, and what each reader refuses, by file and line."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from fastattn.data import DataError
from fastattn.data.records import (
    Record,
    conversation_of,
    mapped,
    read_records,
    required,
    split_records,
    text_of,
)

SQUAD = {
    "data": [
        {
            "title": "Rivers",
            "paragraphs": [
                {
                    "context": "The Spree is in Berlin.",
                    "qas": [
                        {
                            "id": "a",
                            "question": "where?",
                            "answers": [{"text": "Berlin", "answer_start": 16}],
                        },
                        {"question": "how deep?", "answers": [], "is_impossible": True},
                    ],
                }
            ],
        }
    ]
}


def written(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_lines_of_json_keep_their_numbers(tmp_path: Path) -> None:
    content = '\ufeff{"text": "a\u2028b", "label": 1}\r\n\n{"text": "c"}'
    path = written(tmp_path, "train.jsonl", content)
    assert read_records(path) == [
        Record(f"{path}: line 1", {"text": "a\u2028b", "label": 1}),
        Record(f"{path}: line 3", {"text": "c"}),
    ]
    assert read_records(written(tmp_path, "a.data", content), format="jsonl")[1].fields == {"text": "c"}


@pytest.mark.parametrize(
    "content",
    [
        '[{"text": "a"}, {"text": "b"}]',
        '{"data": [{"text": "a"}, {"text": "b"}]}',
        '{"text": "a"}\n{"text": "b"}',
    ],
    ids=["list", "data", "lines"],
)
def test_json_holds_a_list_or_lines(content: str, tmp_path: Path) -> None:
    found = read_records(written(tmp_path, "x.json", content))
    assert [record.fields for record in found] == [{"text": "a"}, {"text": "b"}]


def test_cells_of_csv_may_hold_lines_and_commas(tmp_path: Path) -> None:
    long = "x" * 200_000  # over csv's own limit
    path = written(tmp_path, "x.csv", f'text,label\r\n"a, ""b""\nc",1\n\n{long},2\n')
    assert [(r.where, r.fields) for r in read_records(path)] == [
        (f"{path}: line 2", {"text": 'a, "b"\nc', "label": "1"}),
        (f"{path}: line 5", {"text": long, "label": "2"}),
    ]
    assert read_records(written(tmp_path, "x.tsv", "a\tb\n1\t2\n"))[0].fields == {"a": "1", "b": "2"}


def test_quotes_of_tsv_are_part_of_its_values(tmp_path: Path) -> None:
    content = 'text\tlabel\n"Foo starts\tpos\nend of bar"\tneg\n"Alien" is great\tpos\n5" of rain\tneg\n'
    path = written(tmp_path, "a.tsv", content)
    assert [record.where for record in read_records(path)] == [f"{path}: line {n}" for n in range(2, 6)]
    assert [record.fields["text"] for record in read_records(path)] == [
        '"Foo starts',
        'end of bar"',
        '"Alien" is great',
        '5" of rain',
    ]
    path = written(tmp_path, "b.tsv", 'text\tlabel\n"a\tb"\tpos\n')
    with pytest.raises(
        DataError, match=r"line 2 has 3 values, needs 2 .* a tab or line end always ends a value"
    ):
        read_records(path)


def test_a_document_of_conll_ends_a_sentence(tmp_path: Path) -> None:
    path = written(
        tmp_path, "a.conll", "-DOCSTART- O\nanna B-PER\n-DOCSTART- O\nmaria B-PER\n\n-DOCSTART- O\n\nx O\n"
    )
    assert [record.fields["tokens"] for record in read_records(path)] == [["anna"], ["maria"], ["x"]]


def test_sentences_of_conll_end_at_blank_lines(tmp_path: Path) -> None:
    path = written(
        tmp_path, "x.conll", "-DOCSTART- -X- O O\n\nAnna NNP B-NP B-PER\nlives VBZ B-VP O\n\n\nx y z O\n"
    )
    assert [(r.where, r.fields) for r in read_records(path)] == [
        (f"{path}: line 3", {"tokens": ["Anna", "lives"], "tags": ["B-PER", "O"]}),
        (f"{path}: line 7", {"tokens": ["x"], "tags": ["O"]}),
    ]
    path = written(tmp_path, "tabs.conll", "New York\tB-LOC\n#\tO\n")
    assert read_records(path)[0].fields == {"tokens": ["New York", "#"], "tags": ["B-LOC", "O"]}


def test_questions_of_squad_have_their_context(tmp_path: Path) -> None:
    first, second = read_records(written(tmp_path, "x.json", json.dumps(SQUAD)))
    assert first.fields["context"] == second.fields["context"] == "The Spree is in Berlin."
    assert (first.fields["id"], first.fields["title"], second.fields["id"]) == ("a", "Rivers", "0-0-1")
    assert first.fields["answers"] == [{"text": "Berlin", "answer_start": 16}]
    assert second.where.endswith("x.json: data[0].paragraphs[0].qas[1]")


def test_folders_stand_for_their_files(tmp_path: Path) -> None:
    written(tmp_path, "b.txt", "one\ntwo\n\n\nthree\n")
    (tmp_path / "a").mkdir()
    written(tmp_path / "a", "c.jsonl", '{"text": "zero"}')
    written(tmp_path, ".hidden.txt", "no")
    written(tmp_path, "notes.pdf", "no")
    assert [record.fields["text"] for record in read_records(tmp_path)] == ["zero", "one\ntwo\n", "three\n"]
    more = read_records([tmp_path / "b.txt", tmp_path / "a" / "c.jsonl"])
    assert [record.fields["text"] for record in more] == ["one\ntwo\n", "three\n", "zero"]


def test_columns_are_mapped(tmp_path: Path) -> None:
    path = written(tmp_path, "x.jsonl", '{"body": "a", "topic": "b"}\n{"body": "c"}\n')
    (first,) = read_records(written(tmp_path, "y.jsonl", '{"body": "a"}'), columns={"text": "body"})
    assert first.fields == {"body": "a", "text": "a"}
    with pytest.raises(DataError, match=r"x.jsonl: line 2 has no column 'topic' for label, it has 'body'"):
        read_records(path, columns={"text": "body", "label": "topic"})
    assert mapped(first, {"label": "body"}).fields["label"] == "a"


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("x.jsonl", b'{"a": 1}\n{', "line 2 is not JSON"),
        ("x.jsonl", b"[1]", "line 1 is not a JSON object"),
        ("x.jsonl", b'{"a": 1}\n{"a": "\xff"}', "line 2 is not UTF-8 (byte 0xff)"),
        ("x.jsonl", b'{"a": "\0"}', "line 1 is binary"),
        ("x.jsonl", b"\n\n", "holds no example"),
        ("x.jsonl", b"[" * 200_000, "line 1 is not JSON"),
        ("x.json", b'[1,\n2,"x]', "line 2 is not JSON"),
        ("x.json", b"3", "holds a int, needs a list"),
        ("x.json", b"[3]", "item 1 is not a JSON object"),
        ("x.json", b'{"data": [{"paragraphs": 3}]}', "data[0] has no list 'paragraphs'"),
        ("x.json", b'{"data": [{"paragraphs": [{"context": "a"}]}]}', "data[0].paragraphs[0] has no list 'qas'"),
        ("x.json", b'{"data": [{"paragraphs": [{"qas": [1]}]}]}', "data[0].paragraphs[0].qas[0] is not a JSON"),
        ("x.csv", b"a,b\n1,2\n\n3\n", "line 4 has 1 values, needs 2"),
        ("x.csv", b"a,a\n1,2\n", "line 1: more than one column is named 'a'"),
        ("x.csv", b"a,\n1,2\n", "line 1: a column has no name"),
        ("x.csv", b'a,b\n1,2\n"x,2\n3,4\n', "line 3 is not CSV"),
        ("x.csv", b"a,b\n", "holds no example"),
        ("x.csv", b"", "holds no example"),
        ("x.csv", b"a,b\n1,\xe9\n", "line 2 is not UTF-8 (byte 0xe9)"),
        ("x.conll", b"Anna\tO\nlives\n", "line 2 needs a word and its tag"),
        ("x.conll", b"Anna\tO\n\tO\n", "line 2 needs a word and its tag"),
        ("x.conll", b"a X O\nb O\n", "line 2 has 2 columns, those before it have 3"),
        ("x.txt", b" \n", "holds only white space"),
        ("x.txt", b"a\xff", "is not UTF-8"),
        ("x.pdf", b"a", "got the suffix '.pdf', needs one of"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named_by_file_and_line(
    name: str, content: bytes, complaint: str, tmp_path: Path
) -> None:
    path = written(tmp_path, name, content)
    with pytest.raises(DataError) as caught:
        read_records(path)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert complaint in message
    assert "\n" not in message


def test_paths_that_are_no_data_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        read_records(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match="holds no file with a suffix"):
        read_records(tmp_path)
    with pytest.raises(DataError, match="format: got 'xml', needs one of"):
        read_records(tmp_path, format="xml")
    with pytest.raises(DataError, match="got no file"):
        read_records([])
    with pytest.raises(DataError):
        read_records("x" * 5000 + ".jsonl")
    with pytest.raises(DataError):
        read_records("a\0.jsonl")
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(DataError, match="is not a regular file"):
        read_records(tmp_path / "pipe.jsonl")


def test_fields_are_checked_where_they_are_read() -> None:
    record = Record("x: line 3", {"texts": "a", "label": 3, "blank": " ", "bad": "\ud800"})
    with pytest.raises(DataError, match=r"x: line 3 has no 'text', it has 'texts'.*did you mean 'texts'"):
        required(record, "text")
    for name, complaint in (
        ("label", "is a int, needs a text"),
        ("blank", "is empty"),
        ("bad", "not valid Unicode"),
    ):
        with pytest.raises(DataError, match=f"x: line 3: {name} .*{complaint}"):
            text_of(record, name)
    assert text_of(record, "texts") == "a"


def records(count: int) -> list[Record]:
    return [Record(f"x: line {i}", {"text": f"text {i}", "context": str(i // 5)}) for i in range(count)]


def test_held_out_records_are_chosen_by_their_contents() -> None:
    given = records(100)
    train, dev = split_records(given, 0.1)
    assert len(dev) == 10
    assert sorted([*train, *dev], key=given.index) == given
    assert train == [record for record in given if record not in dev]
    again = split_records([Record("y", record.fields) for record in reversed(given)], 0.1)
    assert {r.fields["text"] for r in again[1]} == {r.fields["text"] for r in dev}
    assert split_records(given, 0.1, seed=1)[1] != dev
    assert len(split_records(given[:2], 0.9)[1]) == 1


def test_records_of_one_key_stay_together() -> None:
    given = records(100)
    train, dev = split_records(given, 0.1, key=lambda record: record.fields["context"])
    contexts = {record.fields["context"] for record in dev}
    assert len(dev) == 10
    assert len(contexts) == 2
    assert not contexts & {record.fields["context"] for record in train}
    twice = [Record("x", {"text": str(i % 3)}) for i in range(30)]
    assert {len(part) for part in split_records(twice, 0.1)} == {10, 20}
    with pytest.raises(DataError, match="fewer than two different examples"):
        split_records([twice[0], twice[3]], 0.5)


def test_chats_are_messages_or_a_prompt() -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert conversation_of(Record("x", {"messages": messages})) == messages
    assert conversation_of(Record("x", {"prompt": "a", "completion": "b"})) == messages
    for wrong in ([], "a", [{"role": "user"}], [{"content": "a"}], [3]):
        with pytest.raises(DataError, match="x: "):
            conversation_of(Record("x", {"messages": wrong}))
    with pytest.raises(DataError, match="x has no 'messages'"):
        conversation_of(Record("x", {"text": "a"}))


@pytest.mark.downloads
def test_datasets_are_read_where_the_library_is(tmp_path: Path) -> None:
    datasets: Any = pytest.importorskip("datasets")
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])}
    )
    rows = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}, features=features)
    rows.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": rows, "test": rows.select([1])}).save_to_disk(tmp_path / "many")
    golden = [{"text": "a", "label": "yes"}, {"text": "b", "label": "no"}]
    assert [record.fields for record in read_records(tmp_path / "one")] == golden
    assert [record.fields for record in read_records(tmp_path / "many")] == golden
    (last,) = read_records(f"hf:{tmp_path / 'many'}:test")
    assert (last.fields, last.where) == (golden[1], f"{tmp_path / 'many'}: row 1")
    with pytest.raises(DataError, match="has no split 'dev', needs one of train, test"):
        read_records(f"hf:{tmp_path / 'many'}:dev")
    (tmp_path / "one" / "state.json").write_text("{")
    with pytest.raises(DataError, match="cannot be loaded"):
        read_records(tmp_path / "one")


def test_datasets_need_their_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"hf:a/b: needs the package datasets"):
        read_records("hf:a/b")
    with pytest.raises(DataError, match="needs hf:OWNER/NAME"):
        read_records("hf:")
