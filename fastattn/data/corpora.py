"""Sources of text: the standard library's own documentation, or a user's UTF-8 files."""

from __future__ import annotations

import codecs
import hashlib
import os
import re
import stat
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path

from fastattn.data.checks import check_integer

MIN_SHARED_PARAGRAPH = 40  # characters; shorter paragraphs (headings, "See also") may repeat across topics
PAGE_WIDTH = 70  # what Sphinx wraps its text output to
UNDERLINE = re.compile(r"([*=~^#-])\1{2,}")
MIN_SECTION = 300  # characters; a shorter section is joined to the next one
HEADING = re.compile(r"\n\n(?=[^\n]+\n([*=~^#-])\1{2,}\n)")  # the boundary before a title and its underline
MAX_DOCUMENT = 1 << 22  # characters held at once; a longer document is cut at a line end
CHUNK_BYTES = 1 << 20


class DataError(ValueError):
    """Data cannot be used; the message names the file and the fault."""


def default_corpus() -> list[str]:
    """The standard library's `pydoc_data.topics`: English prose about Python, one document per section.

    Topics quote each other, so a paragraph that an earlier section has is dropped: held-out sections share no paragraph
    with the others. Hard-wrapped paragraphs are joined to one line. The order is fixed and independent of the topics,
    so that any range of documents is a fair sample.
    """
    from pydoc_data.topics import topics

    longest_first = sorted(topics.items(), key=lambda item: (-len(item[1]), item[0]))
    seen: set[str] = set()
    documents = [section for _, text in longest_first for section in _sections(_without_repeats(text, seen))]
    return sorted(documents, key=lambda document: hashlib.sha256(document.encode()).digest())


def _unwrapped(paragraph: str) -> str:
    """The paragraph on one line if all its line breaks come from the page width, else unchanged."""
    lines = paragraph.strip("\n").split("\n")
    joined = lines[0]
    for line, following in pairwise(lines):
        words = following.split()
        if not words or UNDERLINE.fullmatch(following) or len(f"{line} {words[0]}") <= PAGE_WIDTH:
            return paragraph
        joined += following.lstrip() if re.search(r"\w-$", line) else " " + following.lstrip()
    return joined


def _sections(text: str) -> list[str]:
    """The parts of `text` that begin with an underlined heading, short ones joined to the next, the last to its
    predecessor; none if `text` is short itself."""
    begins = [0]
    for heading in HEADING.finditer(text):
        if heading.end() - begins[-1] >= MIN_SECTION:
            begins.append(heading.end())
    if len(text) - begins[-1] < MIN_SECTION:
        begins.pop()
    return [text[begin:end].strip("\n") + "\n" for begin, end in zip(begins, [*begins[1:], len(text)])]


def _without_repeats(text: str, seen: set[str]) -> str:
    """The unwrapped paragraphs of `text` that are not in `seen`; they are added to it."""
    kept = []
    for paragraph in text.split("\n\n"):
        key = " ".join(paragraph.split())
        if len(key) < MIN_SHARED_PARAGRAPH or key not in seen:
            kept.append(_unwrapped(paragraph))
        if len(key) >= MIN_SHARED_PARAGRAPH:
            seen.add(key)
    return "\n\n".join(kept)


class TextFiles:
    """Documents of UTF-8 text files, read lazily.

    Two or more blank lines in a row separate documents, and so does the end of a file. Line ends become "\\n" and a
    byte order mark is dropped. A document longer than `max_document` characters is divided at a line end, so that
    memory does not grow with the file.

    Args:
        paths: one path or several.
        max_document: characters of the longest document yielded.

    It can be iterated any number of times, and gives a str for each document, which ends in one line end.

    Raises:
        DataError: there is no path, or a path is missing, a directory, not a regular file, unreadable, empty or only
            white space, binary, or not UTF-8. All of every file is checked at construction.
        TypeError: paths is neither a path nor a sequence of them, or max_document is not an integer.
        ValueError: max_document is below 1.
    """

    def __init__(
        self,
        paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
        *,
        max_document: int = MAX_DOCUMENT,
    ) -> None:
        if isinstance(paths, (str, os.PathLike)):
            paths = [paths]
        if not isinstance(paths, Sequence) or not all(isinstance(path, (str, os.PathLike)) for path in paths):
            raise TypeError(f"paths: got {type(paths).__name__}, needs a path or several")
        if not paths:
            raise DataError("paths: got no file, needs at least one text file")
        max_document = check_integer("max_document", max_document, 1)
        self.paths = tuple(Path(path) for path in paths)
        self.max_document = max_document
        for path in self.paths:
            check_text_file(path)

    def __iter__(self) -> Iterator[str]:
        for path in self.paths:
            with path.open(encoding="utf-8-sig") as lines:
                yield from split_documents(lines, self.max_document)


def split_documents(lines: Iterable[str], max_document: int = MAX_DOCUMENT) -> Iterator[str]:
    """Documents of a stream of lines: runs of lines between two or more blank ones, each ending in one newline."""
    max_document = check_integer("max_document", max_document, 1)
    held: list[str] = []
    size = blank = 0
    for line in lines:
        for piece in _pieces(line, max_document):
            if not piece.strip():
                blank += 1
                continue
            if held and (blank >= 2 or size + blank + len(piece) > max_document):
                yield "".join(held)
                held, size = [], 0
            if held:
                held.append("\n" * blank)
            held.append(piece if piece.endswith("\n") else piece + "\n")
            size += blank + len(piece)
            blank = 0
    if held:
        yield "".join(held)


def _pieces(line: str, size: int) -> Iterator[str]:
    for start in range(0, len(line), size):
        yield line[start : start + size]


def check_text_file(path: str | os.PathLike[str]) -> None:
    """Raise DataError unless `path` is a readable regular file of UTF-8 text that is not all white space."""
    path = Path(path)
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise DataError(f"{path}: is a directory, needs a text file")
        if not stat.S_ISREG(mode):
            raise DataError(f"{path}: is not a regular file (it must be readable more than once)")
        with path.open("rb") as file:
            _check_utf8(path, iter(lambda: file.read(CHUNK_BYTES), b""))
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except PermissionError:
        raise DataError(f"{path}: permission denied, needs a file you may read") from None
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the path
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None


def _check_utf8(path: Path, chunks: Iterable[bytes]) -> None:
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    offset = 0  # bytes already handed to the decoder
    empty = blank = True
    for chunk in chunks:
        empty = False
        if b"\0" in chunk:
            where = offset + chunk.index(b"\0")
            raise DataError(f"{path}: is binary (a zero byte at offset {where}), needs UTF-8 text")
        blank = not _decode(path, decoder, chunk, offset).strip() and blank
        offset += len(chunk)
    if empty:
        raise DataError(f"{path}: is empty, needs some text")
    _decode(path, decoder, b"", offset, final=True)
    if blank:
        raise DataError(f"{path}: holds only white space, needs some text")


def _decode(
    path: Path, decoder: codecs.IncrementalDecoder, chunk: bytes, offset: int, final: bool = False
) -> str:
    held = len(decoder.getstate()[0])  # bytes of a character that the previous chunk left unfinished
    try:
        return decoder.decode(chunk, final)
    except UnicodeDecodeError as error:
        where = offset - held + error.start
        raise DataError(
            f"{path}: is not UTF-8 (byte 0x{error.object[error.start]:02x} at offset {where}: {error.reason}); "
            f"convert it first, e.g. iconv -f LATIN1 -t UTF-8"
        ) from None
