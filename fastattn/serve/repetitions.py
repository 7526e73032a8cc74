"""How far counted repetitions of a regular expression stand within each other around what may be empty.

Such an expression has many ways to match one text, and a matcher that follows all of them needs time and memory in
proportion to the product of the counts: `(((a?){50}){50}){50}` has 125,000.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

SINGLE = 1000  # most that one count weighs: a repetition that stands in no other is read at once, whatever its count
_TOKEN = re.compile(
    r"\\."
    r"|\[(?:\\.|[^\]\\])*\]"
    r"|(?P<open>\((?:\?(?::|<?[=!]|P?<\w+>))?)"
    r"|\{\s*(?P<least>\d+)\s*(?P<comma>,\s*(?P<most>\d*)\s*)?\}"
    r"|.",
    re.DOTALL,
)


@dataclass
class _Part:
    """Something that may be repeated: whether it may be empty, and the greatest product of counts in it."""

    empty: bool
    product: int = 1


class _Group:
    """Alternatives up to a closing bracket, of which the last is being read."""

    def __init__(self) -> None:
        self.some_empty = False  # of the alternatives before
        self.empty, self.product = True, 1
        self.last: _Part | None = None  # the part that a repetition may follow

    def add(self, part: _Part | None) -> None:
        """One more part of the alternative; the one before is complete."""
        if self.last is not None:
            self.empty &= self.last.empty
            self.product = max(self.product, self.last.product)
        self.last = part

    def alternative(self) -> None:
        """The next alternative begins."""
        self.add(None)
        self.some_empty |= self.empty
        self.empty = True

    def closed(self) -> _Part:
        """The group as one part."""
        self.alternative()
        return _Part(self.some_empty, self.product)


def nested_repetitions(expression: str) -> int:
    """The greatest product of the counts of repetitions that stand within each other around what may be empty.

    A count of one that stands in no other weighs 1,000 at most. What is wrong with an expression is not found here.
    """
    groups = [_Group()]
    for token in _TOKEN.finditer(expression):
        text, group = token[0], groups[-1]
        if token["open"]:
            groups.append(_Group())
        elif text == ")" and len(groups) > 1:
            part = groups.pop().closed()
            groups[-1].add(part)
        elif text == "|":
            group.alternative()
        elif text in ("?", "*", "+"):
            if group.last is not None and text != "+":
                group.last.empty = True
        elif token["least"]:
            if group.last is not None:
                least = int(token["least"][:9])
                _repeat(group.last, least, int((token["most"] or token["least"])[:9]))
        else:
            group.add(_Part(empty=text in ("^", "$")))
    while len(groups) > 1:  # never closed
        part = groups.pop().closed()
        groups[-1].add(part)
    return groups[0].closed().product


def _repeat(part: _Part, least: int, most: int) -> None:
    """The part becomes its repetition, `least` to `most` times."""
    if part.empty and part.product > 1:
        part.product *= max(most, 1)
    elif part.empty or not least:
        part.product = max(part.product, min(most, SINGLE))
    part.empty |= not least
