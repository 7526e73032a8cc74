"""Which pages of the key/value cache are free, how many sequences hold each, and which hold what prompts begin with."""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Sequence
from hashlib import sha256


class PagesExhausted(Exception):
    """No page is free."""


class PagePool:
    """Counts the holders of each page. Pages with a name are kept when nobody holds them, until one is needed.

    A name says what a page holds: it is a digest of all tokens up to a place in it, or to its end. A sequence whose
    prompt begins with the same tokens takes a whole page, or copies a part, instead of computing it.
    """

    def __init__(self, pages: int, page_size: int) -> None:
        self.page_size = page_size
        self.holders = [0] * pages
        self._free = list(range(pages - 1, -1, -1))
        self._unheld: OrderedDict[int, None] = OrderedDict()  # with a name, the least recently used first
        self._page_of: dict[bytes, int] = {}
        self._names_of: dict[int, list[bytes]] = {}

    def __len__(self) -> int:
        return len(self.holders)

    @property
    def available(self) -> int:
        """Pages that nobody holds."""
        return len(self._free) + len(self._unheld)

    def take(self) -> int:
        """A page for one sequence, to write to; PagesExhausted if all are held."""
        if self._free:
            page = self._free.pop()
        elif self._unheld:
            page, _ = self._unheld.popitem(last=False)
            for name in self._names_of.pop(page):
                del self._page_of[name]
        else:
            raise PagesExhausted
        self.holders[page] = 1
        return page

    def hold(self, page: int) -> None:
        """One more sequence holds a page."""
        if not self.holders[page]:
            del self._unheld[page]
        self.holders[page] += 1

    def release(self, page: int) -> None:
        """One sequence less holds a page."""
        self.holders[page] -= 1
        if self.holders[page]:
            return
        if page in self._names_of:
            self._unheld[page] = None
        else:
            self._free.append(page)

    def name(self, page: int, name: bytes) -> None:
        """A page is complete up to a place; the first with a name keeps it."""
        if name not in self._page_of:
            self._page_of[name] = page
            self._names_of.setdefault(page, []).append(name)

    def page_of(self, name: bytes) -> int | None:
        """The page that holds what has this name; None = no page does. It gets no holder by this."""
        return self._page_of.get(name)

    def begin_with(self, names: Sequence[bytes]) -> list[int]:
        """The pages that hold the first of these names, as far as there are any; nobody more holds them yet."""
        found = []
        for name in names:
            page = self.page_of(name)
            if page is None:
                break
            found.append(page)
        return found


def names_of(tokens: Sequence[int], size: int, count: int) -> list[bytes]:
    """The names of the first parts of a sequence, of `size` tokens each; each depends on all tokens before it."""
    names: list[bytes] = []
    name = b""
    for number in range(count):
        part = array("q", tokens[number * size : (number + 1) * size])
        name = sha256(name + part.tobytes()).digest()
        names.append(name)
    return names
