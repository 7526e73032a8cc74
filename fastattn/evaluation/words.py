"""The units by which texts are compared: words, and single characters in scripts without spaces."""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Callable

# Han with its extensions and compatibility forms, and Japanese kana
_RANGES = (
    "\u3005-\u3007\u3041-\u309f\u30a1-\u30fa\u30fc-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    "\uff66-\uff9f\U00020000-\U000323af"
)
UNSPACED = re.compile(f"[{_RANGES}]")  # one character of a script without spaces
_PIECES = re.compile(f"[{_RANGES}]|[^\\s{_RANGES}]+")


# After a sentence: white space behind marks of scripts with spaces (ASCII's, Arabic, Urdu, Armenian, Ethiopic),
# where they also stand within words, and the place behind others (Chinese, dandas, Burmese, Khmer).
SENTENCE_END = (
    "(?<=[.!?\u061f\u06d4\u0589\u1362])\\s+|(?<=[\u3002\uff01\uff1f\uff61\u0964\u0965\u104b\u17d4])\\s*"
)


class _Replaced(dict[int, str]):
    """A table for str.translate: characters that `drop` names become `by`; it fills as characters come."""

    def __init__(self, drop: Callable[[str], bool], by: str) -> None:
        super().__init__()
        self.drop, self.by = drop, by

    def __missing__(self, code: int) -> str:
        character = chr(code)
        self[code] = self.by if self.drop(character) else character
        return self[code]


# letters, numbers and the marks on letters, which some scripts write as characters of their own
_NO_WORDS = _Replaced(lambda c: unicodedata.category(c)[0] not in "LNM", " ")
_PUNCTUATION = _Replaced(lambda c: unicodedata.category(c)[0] == "P" or c in string.punctuation, "")


def is_unspaced(text: str) -> bool:
    """Whether a text has a character of a script without spaces: Han or kana."""
    return not text.isascii() and UNSPACED.search(text) is not None


def pieces_of(text: str) -> list[str]:
    """The text split at white space, each Han or kana character being a piece of its own."""
    return text.split() if text.isascii() else _PIECES.findall(text)


def words_of(text: str) -> list[str]:
    """Runs of letters and digits in lower case, each Han or kana character being a word of its own."""
    return pieces_of(text.lower().translate(_NO_WORDS))


def without_punctuation(text: str) -> str:
    """The text without ASCII's and Unicode's punctuation."""
    return text.translate(_PUNCTUATION)
