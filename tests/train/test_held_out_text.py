"""What is held out of a language model's documents without --dev: a share of the text, in memory and from files."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from fastattn.data import DataError
from fastattn.data.records import Record, read_records, split_records
from fastattn.train import run as work
from fastattn.train.corpus import Corpus
from fastattn.train.task_config import Sections, read_sections
from fastattn.train.task_data import read_data, split_document, split_texts

TASKS = ("causal-lm", "masked-lm")


def document(name: str, lines: int) -> str:
    return "".join(f"{name} says {number} words, {number * number} in all\n" for number in range(lines))


def file_of(path: Path, documents: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return path


def sections_of(task: str, folder: Path, *more: str) -> Sections:
    overrides = (f"--train.output_dir={folder / 'out'}", f"--data.cache={folder / 'cache'}", *more)
    module = work.task_named(task)
    return read_sections(module, preset=None, file=None, overrides=overrides, defaults=module.DEFAULTS)


def divided(task: str, path: Path, fraction: float, seed: int = 0) -> tuple[list[str], list[str]]:
    """The (training, held-out) texts, which are the same in memory and from files."""
    module = work.task_named(task)
    sections = sections_of(task, path.parent, f"--data.dev_fraction={fraction}", f"--train.seed={seed}")
    found = []
    for data in (
        read_data(module, [str(path)], [], sections),
        Corpus(module, [str(path)], [], sections).read(),
    ):
        found.append(([example.text for example in data.train], [example.text for example in data.dev]))
        assert data.held_out == len(data.dev)
    assert found[0] == found[1]
    return found[0]


def check_parts(documents: list[str], train: list[str], dev: list[str]) -> int:
    """That each document is whole in one part, but for one that may have its end in dev; how many are split."""
    assert train
    assert dev
    assert not set(train) & set(dev)
    rest, begins, ends = sorted(documents), [], []
    for part, texts in ((begins, train), (ends, dev)):
        for text in texts:
            if text in rest:
                rest.remove(text)
            else:
                part.append(text)
    assert rest == [a + b for a, b in zip(begins, ends, strict=True)]
    assert len(rest) <= 1
    return len(rest)


def share(documents: list[str], dev: list[str]) -> float:
    return sum(map(len, dev)) / sum(map(len, documents))


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("seed", range(4))
def test_of_three_documents_the_end_of_one_is_held_out(tmp_path: Path, task: str, seed: int) -> None:
    documents = [document("anna", 220), document("maria", 280), document("paris", 140)]
    train, dev = divided(task, file_of(tmp_path / "plays.jsonl", documents), 0.02, seed)
    assert 0.01 <= share(documents, dev) <= 0.04
    assert check_parts(documents, train, dev) == 1
    assert len(train) == 3
    (end,) = dev
    assert all(line.startswith(("anna says", "maria says", "paris says")) for line in end.splitlines())


def test_documents_of_a_text_file_are_held_out_by_their_text(tmp_path: Path) -> None:
    path = tmp_path / "plays.txt"
    path.write_text("\n\n\n".join(document(name, 100).strip() for name in ("anna", "maria", "paris")))
    train, dev = divided("causal-lm", path, 0.02)
    documents = [record.fields["text"] for record in read_records(path)]
    assert len(documents) == 3
    assert 0.01 <= share(documents, dev) <= 0.04
    assert check_parts(documents, train, dev) == 1


@pytest.mark.parametrize("fraction", [0.02, 0.1, 0.5])
def test_many_documents_are_chosen_by_their_number(tmp_path: Path, fraction: float) -> None:
    documents = [document(f"name {number}", 1 + number % 3) for number in range(200)]
    path = file_of(tmp_path / "many.jsonl", documents)
    by_count = split_records(read_records(path), fraction)
    assert divided("causal-lm", path, fraction) == tuple(
        [record.fields["text"] for record in part] for part in by_count
    )


@pytest.mark.parametrize("lines", [1, 6, 30])
@pytest.mark.parametrize("seed", range(4))
def test_one_short_and_two_long_documents(tmp_path: Path, lines: int, seed: int) -> None:
    documents = [document("anna", 150), document("maria", lines), document("paris", 150)]
    train, dev = divided("causal-lm", file_of(tmp_path / "three.jsonl", documents), 0.02, seed)
    assert 0.01 <= share(documents, dev) <= 0.04
    check_parts(documents, train, dev)


def test_documents_of_any_lengths_meet_the_share(tmp_path: Path) -> None:
    drawn = random.Random(3)
    for number in range(25):
        documents = [
            document(f"name {i}", round(20 * drawn.paretovariate(0.8))) for i in range(drawn.randint(1, 30))
        ]
        fraction = drawn.choice((0.02, 0.1, 0.3))
        folder = tmp_path / str(number)
        folder.mkdir()
        train, dev = divided("causal-lm", file_of(folder / "x.jsonl", documents), fraction, number)
        assert fraction / 2 <= share(documents, dev) <= 2 * fraction
        check_parts(documents, train, dev)


@pytest.mark.parametrize("seed", range(4))
def test_equal_documents_stay_together(tmp_path: Path, seed: int) -> None:
    twice, other = document("anna", 100), document("maria", 100)
    path = file_of(tmp_path / "x.jsonl", [twice, other, twice])
    train, dev = divided("causal-lm", path, 0.05, seed)
    assert train.count(twice) == 2
    assert check_parts([twice, other, twice], train, dev) == 1
    assert 0.025 <= share([twice, other, twice], dev) <= 0.1
    both = file_of(tmp_path / "both.jsonl", [twice, other, other, twice])
    train, dev = divided("causal-lm", both, 0.05, seed)  # neither pair fits, and none of a pair is split
    assert {tuple(train), tuple(dev)} == {(twice, twice), (other, other)}


def test_one_document_gives_its_end(tmp_path: Path) -> None:
    text = document("anna", 40)
    train, dev = divided("causal-lm", file_of(tmp_path / "one.jsonl", [text]), 0.1)
    assert train[0] + dev[0] == text
    assert train[0].endswith("\n")
    assert 0.05 <= share([text], dev) <= 0.1


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("documents", [["word"], [document("anna", 9)] * 3])
def test_what_cannot_be_divided_is_refused(tmp_path: Path, task: str, documents: list[str]) -> None:
    with pytest.raises(DataError, match="fewer than two different examples, by their texts"):
        divided(task, file_of(tmp_path / "x.jsonl", documents), 0.1)


@pytest.mark.parametrize(
    ("line", "says"), [('{"text": 3}', "line 1: text is a int"), ('{"text": " "}', "line 1: text is empty")]
)
def test_an_error_in_the_only_line_comes_first(tmp_path: Path, line: str, says: str) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(DataError, match=says):
        divided("causal-lm", path, 0.1)


def test_other_tasks_count_examples(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    texts = [document("anna", 100), document("maria", 50), document("paris", 100)]
    path.write_text("".join(json.dumps({"source": text, "target": "a"}) + "\n" for text in texts))
    sections = sections_of("seq2seq", tmp_path, "--data.dev_fraction=0.02")
    data = read_data(work.task_named("seq2seq"), [str(path)], [], sections)
    assert (len(data.train), len(data.dev)) == (2, 1)
    assert {example.source for example in (*data.train, *data.dev)} == set(texts)


def by_rank(texts: list[str], fraction: float) -> tuple[list[str], list[str]]:
    """The parts of texts whose ranks are in their order; equal texts have one rank."""
    records = [Record(f"x: {number}", {"text": text}) for number, text in enumerate(texts)]
    ranks = [bytes([texts.index(text)] * 32) for text in texts]
    parts = split_texts(lambda: records, ranks, [len(text) for text in texts], fraction)
    train, dev = ([record.fields["text"] for record in part] for part in parts)
    return train, dev


def test_documents_are_held_out_while_they_fit() -> None:
    words = "word " * 18
    short, long = ([f"{number:10d}" + words * times for number in range(50)] for times in (1, 10))
    train, dev = by_rank(
        [*short[:30], *long], 0.1
    )  # by their number 8, of 800 characters; 4850 are asked for
    assert (train, dev) == (long[2:], [*short[:30], *long[:2]])
    train, dev = by_rank([*long, *short[:30]], 0.1)  # by their number 8, of 7280
    assert (train, dev) == ([*long[8:], *short[:30]], long[:8])


def test_the_end_of_the_first_document_is_held_out_where_none_fits() -> None:
    words = "word " * 20
    texts = [words * 50, *(f"{number:02d}" + words for number in range(50))]
    train, dev = by_rank(texts, 0.1)
    assert train[0] + dev[0] == texts[0]
    assert (train[1:], len(dev)) == (texts[1:], 1)
    assert 0.05 <= share(texts, dev) <= 0.2


def test_a_document_that_does_not_fit_stays_whole_where_half_of_the_share_is_met() -> None:
    words = "word " * 20
    long = words * 100
    train, dev = by_rank(["a" + words * 6, long, "b" + words * 3], 0.1)  # 601 of 1090.2
    assert dev == ["a" + words * 6]
    assert train == [long, "b" + words * 3]
    train, dev = by_rank(["a" + words * 3, long, "b" + words * 6], 0.1)  # 301 of 1090.2
    assert dev[0] == "a" + words * 3
    assert train[0] + dev[1] == long
    assert 1090.2 / 2 <= sum(map(len, dev)) <= 2 * 1090.2


def test_several_equal_documents_that_do_not_fit_are_passed_over() -> None:
    words = "word " * 20
    pair, last = "a" + words * 30, "b" + words * 30
    train, dev = by_rank([pair, last, pair], 0.1)
    assert train[0] == train[2] == pair
    assert train[1] + dev[0] == last
    short = "c" + words
    train, dev = by_rank([pair, pair, short], 0.1)
    assert (train, dev) == ([pair, pair], [short])


def test_documents_without_a_line_or_a_word_are_chosen_by_their_number() -> None:
    texts = [letter * 100 for letter in "abc"]
    assert by_rank(texts, 0.02) == (texts[1:], texts[:1])


def test_the_place_of_a_cut_is_the_one_that_meets_the_share() -> None:
    title = "title\n" + "word " * 200  # the next line ends it, and the one before leaves the title alone
    begin, end = split_document(Record("x", {"text": title}), 100)
    assert begin.fields["text"] + end.fields["text"] == title
    assert 50 <= len(end.fields["text"]) <= 200
    last = "word " * 190 + "\nend\n"
    begin, end = split_document(Record("x", {"text": last}), 100)
    assert 50 <= len(end.fields["text"]) <= 200
    begin, end = split_document(Record("x: line 2", {"text": "one longword", "id": 7}), 1)
    assert (begin.where, begin.fields, end.fields["text"]) == (
        "x: line 2",
        {"text": "one ", "id": 7},
        "longword",
    )
    assert split_document(Record("x", {"text": "word"}), 1) is None
    assert split_document(Record("x", {"text": " word \n "}), 1) is None


def test_documents_that_change_between_two_readings_are_refused() -> None:
    records = [Record("x", {"text": text * 10}) for text in ("a b\n", "b c\n", "c d\n")]
    ranks = [bytes([number] * 32) for number in range(3)]
    for fraction in (0.02, 0.4):
        train, _ = split_texts(lambda: records[:2], ranks, [40, 40, 40], fraction)
        with pytest.raises(DataError, match="3 examples had become 2 when read again"):
            list(train)


@pytest.mark.parametrize("stored", [False, True])
def test_pairs_of_passages_need_two_documents_in_each_part(tmp_path: Path, stored: bool) -> None:
    module = work.task_named("masked-lm")

    def parts(count: int, dev: list[str] | None = None) -> list[int]:
        train = file_of(tmp_path / f"{count}.jsonl", [f"a {number}. b c" for number in range(count)])
        paths = [] if dev is None else [str(file_of(tmp_path / "dev.jsonl", dev))]
        sections = sections_of("masked-lm", tmp_path, "--task.next_sentence=true")
        if stored:
            data = Corpus(module, [str(train)], paths, sections).read()
        else:
            data = read_data(module, [str(train)], paths, sections)
        return [len(data.train), len(data.dev)]

    assert parts(9) == [7, 2]
    assert parts(4) == [2, 2]
    assert parts(30) == [27, 3]
    with pytest.raises(DataError, match=r"data: has too few documents for 2 in training and 2 held out"):
        parts(3)
    with pytest.raises(DataError, match=r"--dev: holds 1 document, next_sentence needs at least 2"):
        parts(9, ["a. b"])
    with pytest.raises(DataError, match=r"--train: holds 1 document, next_sentence needs at least 2"):
        parts(1, ["a. b", "c"])
