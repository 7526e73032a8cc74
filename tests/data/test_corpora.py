"""Corpora: the default one is free of leaks, user files are read as documents, and unusable ones are refused."""

import builtins
import io
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastattn.data.corpora import (
    MIN_SHARED_PARAGRAPH,
    DataError,
    TextFiles,
    _unwrapped,
    check_text_file,
    default_corpus,
    split_documents,
)


def paragraphs(document):
    """Those long enough to count, as they read whatever the line breaks, at spaces and after hyphens."""
    keys = (" ".join(paragraph.split()).replace("- ", "-") for paragraph in document.split("\n\n"))
    return [key for key in keys if len(key) >= MIN_SHARED_PARAGRAPH]


def test_default_corpus_is_english_prose_of_some_size():
    documents = default_corpus()
    assert len(documents) > 100
    assert min(map(len, documents)) > 250
    assert 250_000 < sum(map(len, documents)) < 465_000
    assert any("statement" in document for document in documents)
    assert documents == default_corpus()


def test_default_corpus_repeats_no_paragraph():
    found = [paragraph for document in default_corpus() for paragraph in paragraphs(document)]
    assert len(found) == len(set(found))


def test_default_corpus_drops_only_repeats():
    from pydoc_data.topics import topics

    everything = {p for text in topics.values() for p in paragraphs(text)}
    kept = {p for document in default_corpus() for p in paragraphs(document)}
    assert kept <= everything
    assert sum(map(len, kept)) > 0.99 * sum(map(len, everything))


WRAPPED = (
    "   Each of these lines was broken where the next word would not fit the\n   page, also after a hyphen."
)


@pytest.mark.parametrize(
    ("paragraph", "expected"),
    [
        (WRAPPED, WRAPPED.replace("\n   ", " ")),
        ("* " + "x" * 60 + " and-\n  so-on-and-on", "* " + "x" * 60 + " and-so-on-and-on"),
        ("short\nlines", "short\nlines"),
        ("A title\n=======", "A title\n======="),
        ("A title as long as fifty characters or a little more\n" + "=" * 52, None),
        ("x = [" + "1, " * 22 + "\n     2]\nprint(x)", None),
        ("one line", "one line"),
    ],
)
def test_only_forced_line_breaks_are_undone(paragraph, expected):
    assert _unwrapped(paragraph) == (paragraph if expected is None else expected)


def test_default_corpus_joins_the_lines_of_prose_and_keeps_those_of_code():
    text = "\n\n".join(default_corpus())
    assert 'The "break" statement\n*********************\n' in text
    assert re.search(r"\n   >>> .*\n   \S", text)
    lengths = [len(line) for line in text.splitlines() if line[:1].isalpha()]
    assert sum(length for length in lengths if length > 80) > 0.8 * sum(lengths)


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def test_documents_end_at_two_blank_lines_and_at_the_end_of_a_file(tmp_path):
    one = write(tmp_path / "one.txt", b"a\nb\n\nc\n\n\nd\n \n\t\n\n\n\ne")
    two = write(tmp_path / "two.txt", b"\n\n\nf\n")
    files = TextFiles([one, two])
    assert list(files) == ["a\nb\n\nc\n", "d\n", "e\n", "f\n"]
    assert list(files) == list(files)


def test_byte_order_mark_and_line_ends_are_normalised(tmp_path):
    path = write(tmp_path / "dos.txt", b"\xef\xbb\xbfa\r\nb\rc\n")
    assert list(TextFiles(path)) == ["a\nb\nc\n"]


def test_a_long_document_is_cut_at_line_ends(tmp_path):
    path = write(tmp_path / "long.txt", b"".join(b"line %d\n" % i for i in range(100)))
    documents = list(TextFiles(path, max_document=50))
    assert "".join(documents) == path.read_text()
    assert max(map(len, documents)) <= 50
    assert all(document.startswith("line") and document.endswith("\n") for document in documents)


def test_a_line_longer_than_a_document_is_cut():
    assert "".join(split_documents(["x" * 25], 10)).replace("\n", "") == "x" * 25


@settings(max_examples=50, deadline=None)
@given(st.lists(st.text(alphabet="ab \n", max_size=12), max_size=12), st.integers(4, 40))
def test_no_word_is_lost(lines, size):
    text = "\n".join(lines)
    documents = list(split_documents(io.StringIO(text), size))
    assert "".join("".join(documents).split()) == "".join(text.split())


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (b"", "empty"),
        (b" \n\t\n", "white space"),
        (b"\xef\xbb\xbf", "white space"),
        (b"abc\0def", "binary.*offset 3"),
        ("hallo".encode("utf-16"), "binary"),
        (b"caf\xe9 noir", "not UTF-8.*0xe9 at offset 3"),
        (b"cut \xe4\xbd", "not UTF-8.*offset 4"),
    ],
)
def test_unusable_content_is_refused_by_name(tmp_path, data, complaint):
    path = write(tmp_path / "file.txt", data)
    with pytest.raises(DataError, match=f"file.txt.*{complaint}"):
        TextFiles(path)


def test_offset_is_right_when_a_character_straddles_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr("fastattn.data.corpora.CHUNK_BYTES", 4)
    good = write(tmp_path / "good.txt", "ab€d€".encode())
    check_text_file(good)
    bad = write(tmp_path / "bad.txt", b"abc\xe2\x82xyz")
    with pytest.raises(DataError, match="0xe2 at offset 3"):
        check_text_file(bad)


def test_missing_file_directory_and_special_file_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"nowhere\.txt: no such file"):
        TextFiles(tmp_path / "nowhere.txt")
    with pytest.raises(DataError, match="is a directory"):
        TextFiles(tmp_path)
    with pytest.raises(DataError, match="not a regular file"):
        TextFiles("/dev/null")
    with pytest.raises(DataError, match="no file"):
        TextFiles([])


def test_unreadable_file_is_refused(tmp_path, monkeypatch):
    path = write(tmp_path / "secret.txt", b"text")

    def denied(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(io, "open", denied)
    monkeypatch.setattr(builtins, "open", denied)
    monkeypatch.setattr(Path, "open", denied)
    with pytest.raises(DataError, match=r"secret\.txt: permission denied"):
        TextFiles(path)
