"""Error messages have one form: the argument's name, "got" and the value, "needs" and what is allowed."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "fastattn"
# What is written otherwise, and what is written instead.
OTHER_FORMS = {
    r"(, |; |: )need ": 'a message says "needs" of the argument',
    r"\bexpected\b.*\bgot\b|\bgot\b.*\bexpected\b": 'a message says "got" and "needs"',
    r"(?<!there )\bis no [a-z]": 'a message says "is not a"',
    r"\b(can't|don't|doesn't|isn't)\b": "a message has no contractions",
}


def messages(source: str) -> Iterator[tuple[int, str]]:
    """The texts that a file raises, a placeholder being {}, each with its line."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Raise):
            continue
        inner = {
            part for joined in ast.walk(node) if isinstance(joined, ast.JoinedStr) for part in joined.values
        }
        for part in ast.walk(node):
            if isinstance(part, ast.JoinedStr):
                texts = [
                    str(value.value) if isinstance(value, ast.Constant) else "{}" for value in part.values
                ]
                yield part.lineno, "".join(texts)
            elif isinstance(part, ast.Constant) and isinstance(part.value, str) and part not in inner:
                yield part.lineno, part.value


def in_another_form(text: str) -> str | None:
    """What is wrong with the form of a message, or None."""
    return next((rule for pattern, rule in OTHER_FORMS.items() if re.search(pattern, text)), None)


@pytest.mark.parametrize(
    "text", ["a: got 1, need 2", "expected 3 but got 4", "--data: is no file", "it can't be used"]
)
def test_another_form_is_found(text: str) -> None:
    assert in_another_form(text)
    assert in_another_form(dict(messages(f"raise ValueError({text!r})"))[1])


def test_every_message_has_the_form() -> None:
    found = [
        f"{path.relative_to(PACKAGE)}:{line}: {rule}: {text!r}"
        for path in sorted(PACKAGE.rglob("*.py"))
        for line, text in messages(path.read_text(encoding="utf-8"))
        if (rule := in_another_form(text)) is not None
    ]
    assert found == []
