"""The files of the rows of docs/results.md: parts of the data folder, and a tiny folder of the same layout."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

SEED = 0  # of every split: it is fixed, and no figure was looked at to choose it
DEV_SHARE = 0.02  # of the characters that train
TEST_SHARE = 0.1  # of tinyshakespeare, its end, as in its usual split
SHARES = (1, 10, 100)  # percent of the labels of a learning curve
REQUEST = "What does this package do, in one line?\n"

Row = dict[str, Any]


def read_lines(path: Path) -> list[Row]:
    """The objects of a JSONL file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def write_lines(path: Path, rows: Iterable[Row]) -> None:
    """Objects as a JSONL file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")


def shakespeare(data: Path, files: Path) -> None:
    """train.txt, dev.txt and test.txt: the first nine tenths of the characters, of which the last 2 % are dev.txt, and
    the rest."""
    text = (data / "lm" / "tinyshakespeare.txt").read_text(encoding="utf-8")
    cut = round((1 - TEST_SHARE) * len(text))
    dev = round((1 - DEV_SHARE) * cut)
    for name, part in (("train", text[:dev]), ("dev", text[dev:cut]), ("test", text[cut:])):
        (files / f"{name}.txt").write_text(part, encoding="utf-8")


def addresses(data: Path, files: Path) -> None:
    """train.txt, dev.txt and test.txt: 80, 10 and 10 % of the addresses, drawn by seed; reuters-10.jsonl beside."""
    text = (data / "lm" / "state_of_the_union.txt").read_text(encoding="utf-8")
    documents = [each for each in text.split("\n\n\n") if each.strip()]
    random.Random(SEED).shuffle(documents)
    tenth = max(1, len(documents) // 10)
    parts = {
        "test": documents[:tenth],
        "dev": documents[tenth : 2 * tenth],
        "train": documents[2 * tenth :],
    }
    for name, each in parts.items():
        (files / f"{name}.txt").write_text("\n\n\n".join(each), encoding="utf-8")
    write_lines(
        files / "reuters-10.jsonl", share_of(read_lines(data / "classify/reuters8/train.jsonl"), 10, "label")
    )


def labelled(name: str) -> Callable[[Path, Path], None]:
    """Makes train-1.jsonl, train-10.jsonl and train-100.jsonl of a classification set."""

    def prepare(data: Path, files: Path) -> None:
        rows = read_lines(data / "classify" / name / "train.jsonl")
        for percent in SHARES:
            write_lines(files / f"train-{percent}.jsonl", share_of(rows, percent, "label"))

    return prepare


def share_of(rows: Sequence[Row], percent: int, key: str) -> list[Row]:
    """So many percent of the rows of each label, three of each at least."""
    if percent == 100:
        return list(rows)
    by_label: dict[str, list[Row]] = {}
    for row in rows:
        by_label.setdefault(str(row[key]), []).append(row)
    found: list[Row] = []
    drawn = random.Random(SEED)
    for label in sorted(by_label):
        group = by_label[label]
        count = min(len(group), max(3, round(len(group) * percent / 100)))
        found += drawn.sample(group, count)
    drawn.shuffle(found)
    return found


def questions(data: Path, files: Path) -> None:
    """train.json, dev.json and test.json of the English XQuAD: 32, 8 and 8 of its 48 articles, drawn by seed."""
    whole = json.loads((data / "qa" / "xquad" / "en.json").read_text(encoding="utf-8"))
    articles = list(whole["data"])
    random.Random(SEED).shuffle(articles)
    held = max(1, len(articles) // 6)
    parts = {"test": articles[:held], "dev": articles[held : 2 * held], "train": articles[2 * held :]}
    for name, each in parts.items():
        text = json.dumps({**whole, "data": each}, ensure_ascii=False)
        (files / f"{name}.json").write_text(text, encoding="utf-8")


def pairs(folder: str) -> Callable[[Path, Path], None]:
    """Makes dev.jsonl, the first 200 pairs of a dev file: to write targets for more would take long."""

    def prepare(data: Path, files: Path) -> None:
        write_lines(files / "dev.jsonl", read_lines(data / folder / "dev.jsonl")[:200])

    return prepare


def conversations(data: Path, files: Path) -> None:
    """text/, chats-*.jsonl and preferences-*.jsonl of package descriptions and their one-line summaries.

    Of a preference the chosen answer is the package's summary, the rejected one another package's of about the same
    length. Conversations, preferences and the text of pre-training are of different packages.
    """
    rows = read_lines(data / "summarise" / "debian" / "train.jsonl")
    third = len(rows) // 3
    parts = {"text": rows[third * 2 :], "chats": rows[:third], "preferences": rows[third : third * 2]}
    documents = "\n\n\n".join(f"{row['document']}\n{row['summary']}" for row in parts["text"])
    (files / "text.txt").write_text(documents, encoding="utf-8")
    held = read_lines(data / "summarise" / "debian" / "dev.jsonl")
    tested = read_lines(data / "summarise" / "debian" / "test.jsonl")
    sets = {"train": parts["chats"], "dev": held[::2], "test": tested[::2]}
    for name, each in sets.items():
        write_lines(files / f"chats-{name}.jsonl", map(_chat, each[: 6000 if name == "train" else 200]))
    sets = {"train": parts["preferences"][:2000], "dev": held[1::2][:200], "test": tested[1::2][:300]}
    for name, each in sets.items():
        write_lines(files / f"preferences-{name}.jsonl", _preferences(each))


def request(row: Row) -> str:
    """What a user asks about a package; long descriptions are cut."""
    return REQUEST + str(row["document"])[:300]


def _chat(row: Row) -> Row:
    return {
        "messages": [
            {"role": "user", "content": request(row)},
            {"role": "assistant", "content": row["summary"]},
        ]
    }


def _preferences(rows: Sequence[Row]) -> list[Row]:
    by_length = sorted(rows, key=lambda row: len(row["summary"]))
    found = []
    for place, row in enumerate(by_length):
        other = by_length[place + 1 if place + 1 < len(by_length) else place - 1]["summary"]
        if other != row["summary"]:
            found.append({"prompt": request(row), "chosen": row["summary"], "rejected": other})
    random.Random(SEED).shuffle(found)
    return found


def nothing(data: Path, files: Path) -> None:
    """For rows that read the data folder as it is."""


WORDS = [
    "river",
    "tower",
    "market",
    "shares",
    "rise",
    "fall",
    "good",
    "bad",
    "film",
    "book",
    "old",
    "new",
    "works",
    "lives",
    "under",
    "over",
]
TAGGED = "anna\tB-PER\nlives\tO\nin\tO\nparis\tB-LOC\n\nmaria\tB-PER\nworks\tO\n\n"


def tiny(data: Path) -> None:
    """A folder of the layout that --data has, with a few generated lines in every file."""
    drawn = random.Random(SEED)

    def sentence(count: int) -> str:
        return " ".join(drawn.choice(WORDS) for _ in range(count))

    for name, labels in (("reuters8", ("earn", "acq")), ("chinese_reviews", ("positive", "negative"))):
        for part, count in (("train", 60), ("dev", 8), ("test", 8)):
            rows = [{"text": f"{sentence(8)} {labels[i % 2]}", "label": labels[i % 2]} for i in range(count)]
            write_lines(data / "classify" / name / f"{part}.jsonl", rows)
    for folder, names in (
        ("summarise/debian", ("document", "summary")),
        ("translate/en-de", ("source", "target")),
    ):
        for part, count in (("train", 48), ("dev", 8), ("test", 8)):
            rows = [dict(zip(names, (f"{sentence(9)}. {i}", sentence(4)))) for i in range(count)]
            write_lines(data / folder / f"{part}.jsonl", rows)
    for part, repeats in (("train", 8), ("dev", 2), ("test", 2)):
        path = data / "ner" / "wnut17" / f"{part}.conll"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(TAGGED * repeats, encoding="utf-8")
    (data / "lm").mkdir(parents=True, exist_ok=True)
    lines = "\n".join(sentence(6) + "." for _ in range(200))
    (data / "lm" / "tinyshakespeare.txt").write_text(lines, encoding="utf-8")
    documents = ["\n".join(sentence(8) + "." for _ in range(12)) for _ in range(24)]
    (data / "lm" / "state_of_the_union.txt").write_text("\n\n\n".join(documents), encoding="utf-8")
    articles = []
    for number in range(8):
        context = f"{sentence(6)} anna lives in paris {sentence(4)}"
        answer = {"text": "paris", "answer_start": context.index("paris")}
        questions_ = [
            {"id": f"{number}-{i}", "question": "where does anna live?", "answers": [answer]}
            for i in range(2)
        ]
        articles.append({"title": f"t{number}", "paragraphs": [{"context": context, "qas": questions_}]})
    (data / "qa" / "xquad").mkdir(parents=True, exist_ok=True)
    (data / "qa" / "xquad" / "en.json").write_text(json.dumps({"version": "1.1", "data": articles}))


def tiny_encoder(folder: Path, data: Path) -> None:
    """A sentence encoder of random weights, whose tokenizer is learnt from the tiny data."""
    from peers.encoders import embedding_folder

    texts = [path.read_text(encoding="utf-8") for path in sorted(data.rglob("*.jsonl"))]
    folder.mkdir(parents=True, exist_ok=True)
    embedding_folder("", folder, texts)
