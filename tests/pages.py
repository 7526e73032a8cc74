"""What tests ask of the pages in docs/: their code blocks, and whether a test that they name exists."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
FENCE = re.compile(r"^(\s*)(`{3,}|~{3,})\s*([^\s`]*)")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page. `note` is the comment on the line before it, which says why it is not run here."""

    page: str
    line: int
    language: str
    code: str
    note: str

    @property
    def name(self) -> str:
        """The page and the line, as a traceback shows them."""
        return f"{self.page}:{self.line}"


def blocks_of(text: str, page: str) -> list[Block]:
    """Every fenced block, indented or not."""
    found: list[Block] = []
    opened: tuple[int, re.Match[str]] | None = None
    lines = text.splitlines()
    for number, line in enumerate(lines):
        match = FENCE.match(line)
        if match is None:
            continue
        if opened is None:
            opened = number, match
        elif match[2].startswith(opened[1][2]) and not match[3]:
            start, opening = opened
            code = "\n".join(each.removeprefix(opening[1]) for each in lines[start + 1 : number]) + "\n"
            before = re.fullmatch(r"\s*<!-- (.*) -->", lines[start - 1]) if start else None
            found.append(Block(page, start + 1, opening[3], code, before[1] if before else ""))
            opened = None
    assert opened is None, f"{page}: the block of line {opened[0] + 1} has no end"
    return found


def all_blocks() -> list[Block]:
    """Every fenced block of docs/."""
    return [
        block
        for page in PAGES
        for block in blocks_of(page.read_text(encoding="utf-8"), page.relative_to(ROOT).as_posix())
    ]


@cache
def tests_of(path: str) -> frozenset[str]:
    """The names of a file's tests, "Class::test" in a class."""
    file = ROOT / path
    if not file.is_file():
        return frozenset()
    names = set()
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        inside = node.body if isinstance(node, ast.ClassDef) else [node]
        prefix = f"{node.name}::" if isinstance(node, ast.ClassDef) else ""
        names |= {
            prefix + each.name
            for each in inside
            if isinstance(each, ast.FunctionDef) and each.name.startswith("test")
        }
    return frozenset(names)


def test_exists(test: str) -> bool:
    """Whether tests/FILE.py::NAME, without parameters, is a test."""
    path, _, name = test.partition("::")
    return name in tests_of(path)


test_exists.__test__ = False  # type: ignore[attr-defined]  # not itself one
