"""Cleaning steps: each changes what it says and no more, counts it, and off changes nothing."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from fastattn.data import DataError
from fastattn.data.cleaning import (
    CleaningConfig,
    clean,
    repaired,
    shingles,
    without_control,
    without_emails,
    without_phones,
)
from fastattn.data.records import Record

LONG = "the quick brown fox jumps over the lazy dog while seven wizards mix a bag of liquid jugs for the old queen"
DIRTY = [
    {"text": "caf\u00c3\u00a9 is nice", "label": "a"},
    {"text": "a\u0007b\u200bc", "label": "a"},
    {"text": LONG, "label": "a"},
    {"text": LONG, "label": "a"},
    {"text": LONG.replace("queen", "king"), "label": "b"},
    {"text": "write to jo.doe@mail.example.org or call +49 30 1234567", "label": "b"},
    {"text": "x", "label": "b"},
]


def records(given: list[dict[str, Any]] = DIRTY) -> list[Record]:
    return [Record(f"x: line {number}", row) for number, row in enumerate(given, 1)]


def run(names: tuple[str, ...] = ("text",), **steps: Any) -> tuple[list[str], dict[str, int]]:
    kept, counts = clean(records(), CleaningConfig(**steps), names)
    return [record.fields["text"] for record in kept], counts


TEXTS = [row["text"] for row in DIRTY]


def test_nothing_happens_unless_asked_for() -> None:
    kept, counts = clean(records(), CleaningConfig(), ["text"])
    assert (kept, counts) == (records(), {})


@pytest.mark.parametrize(
    ("step", "value", "count", "changed"),
    [
        ("encoding", True, 1, {0: "caf\u00e9 is nice"}),
        ("control", True, 1, {1: "abc"}),
        ("emails", True, 1, {5: "write to [EMAIL] or call +49 30 1234567"}),
        ("phones", True, 1, {5: "write to jo.doe@mail.example.org or call [PHONE]"}),
        ("exact_duplicates", True, 1, {3: None}),
        ("min_chars", 2, 1, {6: None}),
        ("max_chars", 60, 3, {2: None, 3: None, 4: None}),
    ],
)
def test_each_step_does_its_own_work(
    step: str, value: Any, count: int, changed: dict[int, str | None]
) -> None:
    expected = [changed.get(i, text) for i, text in enumerate(TEXTS)]
    assert run(**{step: value}) == ([text for text in expected if text is not None], {step: count})


def test_near_duplicates_are_left_out() -> None:
    pytest.importorskip("datasketch")
    kept, counts = run(near_duplicates=0.7)
    assert (kept, counts) == ([*TEXTS[:3], *TEXTS[5:]], {"near_duplicates": 2})
    kept, counts = run(near_duplicates=0.99)
    assert counts == {"near_duplicates": 1}
    kept, counts = run(near_duplicates=0.7, exact_duplicates=True)
    assert counts == {"exact_duplicates": 1, "near_duplicates": 1}


def test_near_duplicates_need_their_package(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "datasketch", None)
    with pytest.raises(DataError, match=r"clean.near_duplicates: needs the package datasketch"):
        run(near_duplicates=0.5)


def test_runs_are_of_words_or_of_characters() -> None:
    assert shingles("one two three four five six") == {"one two three four five", "two three four five six"}
    assert len(shingles("我们明天去北京看朋友")) == 6
    assert shingles("") == {""}
    assert shingles("!!! !") == {"! ! ! !"}


def test_texts_without_words_are_compared_by_their_characters() -> None:
    pytest.importorskip("datasketch")
    texts = ["\U0001f600\U0001f600", "\U0001f44d", "!!!", "\ud800", "!!!"]
    given = records([{"text": text} for text in texts])
    kept, counts = clean(given, CleaningConfig(near_duplicates=0.8), ["text"])
    assert ([record.fields["text"] for record in kept], counts) == (texts[:4], {"near_duplicates": 1})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("+49 (0)30 123456-78", "[PHONE]"),
        ("call (030) 123 45 67 now", "call [PHONE] now"),
        ("0301234567", "[PHONE]"),
        ("555-123-4567", "[PHONE]"),
        ("on 2024-05-17 and 17.05.2024", None),
        ("12345678 items", None),
        ("pi is 3.14159265358", None),
        ("1,234,567,890 dollars", None),
        ("version 1.2.3, 10 of 20", None),
        ("id a0301234567", None),
        ("log 2024-01-15 10:30:00", None),
        ("log 2024-01-15T10:30:00, 15.01.2024 10:30 and 2024-01-15 1030", None),
        ("from 2024-05-17 2024-05-18", None),
        ("built 1914-1918 in", None),
        ("in 1914 1918 1939", None),
        ("open 10.30-12.45", None),
        ("at 192.168.100.100 or 192.168.100.100:8080", None),
        ("12.345.678 people", None),
        ("1 000 000 000 euro", None),
        ("100 000 000 euro", None),
        ("1.234.567,89 euro", None),
        ("ISBN 978-3-16-148410-0", None),
        ("978-3-16-148410-0", None),
        ("isbn: 0-306-40615-2", None),
        ("tel:030 1234567", "tel:[PHONE]"),
        ("612 345 678", "[PHONE]"),
        ("01.23.45.67.89", "[PHONE]"),
        ("044.668.18.00", "[PHONE]"),
        ("1-800-555-1234", "[PHONE]"),
        ("978-316-1484", "[PHONE]"),
        ("+1 555 123 4567", "[PHONE]"),
    ],
)
def test_phone_numbers_are_told_from_other_numbers(text: str, expected: str | None) -> None:
    assert without_phones(text) == (text if expected is None else expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.b+c@example.co.uk, please", "[EMAIL], please"),
        ("mail: x@y.de.", "mail: [EMAIL]."),
        ("@paulwalk is here", None),
        ("a @ b", None),
        ("a@localhost", None),
    ],
)
def test_addresses_are_told_from_handles(text: str, expected: str | None) -> None:
    assert without_emails(text) == (text if expected is None else expected)


def test_right_text_is_not_repaired() -> None:
    for text in (
        "caf\u00e9",
        "Z\u00fcrich \u2013 \u201equote\u201c",
        "\u6211\u4eec",
        "plain",
        "\u00c3 la carte",
    ):
        assert repaired(text) == text
    assert repaired("e\u0301") == "\u00e9"
    assert without_control("a\tb\n\u200d\u00ad") == "a\tb\n\u200d"


def test_texts_in_lists_and_messages_are_cleaned() -> None:
    given = [{"messages": [{"role": "user", "content": "a\u0007"}], "negative": ["b\u0007", "c"], "score": 1}]
    kept, counts = clean(records(given), CleaningConfig(control=True), ["messages", "negative", "score"])
    assert kept[0].fields == {
        "messages": [{"role": "user", "content": "a"}],
        "negative": ["b", "c"],
        "score": 1,
    }
    assert counts == {"control": 1}


def test_what_cannot_be_cleaned_is_refused() -> None:
    with pytest.raises(
        DataError, match=r"clean.control: changes texts, but the labels of this task are positions"
    ):
        clean(records(), CleaningConfig(control=True), ["text"], editable=False)
    with pytest.raises(DataError, match=r"clean: dropped every example, by step: min_chars 7"):
        run(min_chars=1000)
    for field in dataclasses.fields(CleaningConfig):
        with pytest.raises((TypeError, ValueError), match=field.name):
            CleaningConfig(**{field.name: "x"})
    with pytest.raises(ValueError, match="max_chars: got 1, needs at least min_chars=2"):
        CleaningConfig(min_chars=2, max_chars=1)
