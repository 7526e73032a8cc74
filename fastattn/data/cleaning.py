"""Cleaning of records, each step optional and counted: encoding, control characters, duplicates, length, addresses."""

from __future__ import annotations

import hashlib
import importlib
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastattn.data.checks import check_flag, check_integer
from fastattn.data.corpora import DataError
from fastattn.data.records import Record, contents

EMAIL_MASK, PHONE_MASK = "[EMAIL]", "[PHONE]"
EMAIL = re.compile(r"(?<![\w.+-])[\w.+-]+@[\w-]+(?:\.[\w-]+)*\.[^\W\d_]{2,}(?![\w-])")
# A leading + or 0, or a bracketed area code, or groups separated throughout; 8 to 15 digits in all (E.164).
PHONE = re.compile(r"(?<![\w+.,/-])(?<!\d:)(?:\+|\()?\d(?:[ ()./-]{0,2}\d){7,14}(?![\w/-]|[.,:]\d)")
GROUPED = re.compile(r"\d[ ()./-]{1,2}\(?\d")
YEAR, OCTET = r"(?:1\d|20)\d\d", r"(?:25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d)"
OTHER_NUMBERS = (
    re.compile(r"\d+\.\d+"),
    # a date, perhaps followed by a time or another date
    re.compile(
        rf"(?:{YEAR}([-./ ])\d{{1,2}}\1\d{{1,2}}|\d{{1,2}}([-./ ])\d{{1,2}}\2{YEAR})(?:[ /-]{{1,2}}\d.*)?"
    ),
    re.compile(rf"{YEAR}(?:[ ./-]{{1,2}}{YEAR})+"),
    re.compile(r"\d{1,2}\.\d\d ?- ?\d{1,2}\.\d\d"),  # times
    re.compile(rf"{OCTET}(?:\.{OCTET}){{3}}"),  # an IP address
    # groups of three digits are a number's, except where the first three may be an area code
    re.compile(r"[1-9]\d?(?:([ .])\d{3})(?:\1\d{3})+|[1-9]\d\d(?:([ .])\d{3})(?:\2\d{3})*(?:\2)000"),
)
ISBN = re.compile(r"97[89](?:[ -]?\d){10}")
ISBN_BEFORE = re.compile(r"\bISBN(?:-1[03])?:?\s*$", re.IGNORECASE)
KEPT_CONTROLS = "\t\n\r"
PERMUTATIONS = 128  # of MinHash
SHINGLE = 5  # words, or characters of scripts without spaces
WORD = re.compile(r"[^\W_]+")


@dataclass(frozen=True)
class CleaningConfig:
    """The cleaning steps of the training data; each is off by default.

    Args:
        encoding: repair text that was UTF-8 read as Windows-1252 or Latin-1, and normalise to NFC.
        control: remove control, formatting-only and unassigned characters, except tabs and line ends.
        exact_duplicates: drop an example that equals an earlier one in every field that the task reads.
        near_duplicates: drop an example whose text has at least this Jaccard similarity to an earlier one (of runs of
            five words, by MinHash); needs the package datasketch.
        min_chars, max_chars: drop an example whose text is shorter or longer.
        emails, phones: replace e-mail addresses by [EMAIL] and phone numbers by [PHONE].

    Raises:
        TypeError, ValueError: an option is of another type or out of range.
    """

    encoding: bool = False
    control: bool = False
    exact_duplicates: bool = False
    near_duplicates: float | None = None
    min_chars: int | None = None
    max_chars: int | None = None
    emails: bool = False
    phones: bool = False

    def __post_init__(self) -> None:
        for name in ("encoding", "control", "exact_duplicates", "emails", "phones"):
            check_flag(name, getattr(self, name))
        for name in ("min_chars", "max_chars"):
            if getattr(self, name) is not None:
                check_integer(name, getattr(self, name), 1)
        near = self.near_duplicates
        if near is not None and (isinstance(near, bool) or not isinstance(near, (int, float))):
            raise TypeError(f"near_duplicates: got {near!r}, needs a number between 0 and 1")
        if near is not None and not 0.0 < near < 1.0:
            raise ValueError(f"near_duplicates: got {near}, needs a number between 0 and 1")
        if None not in (self.min_chars, self.max_chars) and self.min_chars > self.max_chars:  # type: ignore[operator]
            raise ValueError(f"max_chars: got {self.max_chars}, needs at least min_chars={self.min_chars}")


def clean(
    records: Sequence[Record],
    config: CleaningConfig,
    names: Sequence[str],
    *,
    compared: Sequence[str] | None = None,
    editable: bool = True,
) -> tuple[list[Record], dict[str, int]]:
    """The remaining records, and for each step that is on the number of examples that it changed or dropped.

    Args:
        records: of one task.
        config: the steps, in the order of its fields, except that duplicates are dropped last, exact ones first.
        names: the fields that hold text; other values are not changed.
        compared: the fields in which exact duplicates are equal; None for all that a record has.
        editable: whether steps may change text; False where labels are positions in the text, as for answers.

    Raises:
        DataError: near_duplicates without the package datasketch; a step changes text that is not editable; or
            nothing is left.
    """
    cleaner = Cleaner(config, names, compared=compared, editable=editable)
    kept = list(cleaner.kept(records))
    cleaner.check_some_left(len(kept))
    return kept, cleaner.counts


class Cleaner:
    """The steps of `clean` on one record after another: what is held of a record is a hash, and with near_duplicates
    a sketch.

    counts: for each step that is on, the number of records that it has changed or dropped so far.
    """

    def __init__(
        self,
        config: CleaningConfig,
        names: Sequence[str],
        *,
        compared: Sequence[str] | None = None,
        editable: bool = True,
    ) -> None:
        self.config, self.names = config, tuple(names)
        self._compared = None if compared is None else tuple(compared)
        edits = {
            "encoding": repaired,
            "control": without_control,
            "emails": without_emails,
            "phones": without_phones,
        }
        self._edits = {name: edit for name, edit in edits.items() if getattr(config, name)}
        if self._edits and not editable:
            name = next(iter(self._edits))
            raise DataError(f"clean.{name}: changes texts, but the labels of this task are positions in them")
        dropping = ("min_chars", "max_chars", "exact_duplicates", "near_duplicates")
        on = [*self._edits, *(name for name in dropping if getattr(config, name) not in (False, None))]
        self.counts = dict.fromkeys(on, 0)
        self._duplicates()  # refuses a missing package before any record is read

    def fitting(self, record: Record) -> Record | None:
        """The record with its texts edited; None where its length drops it, and only then it is counted."""
        edited, changed = self._edited(record)
        step = self._by_length(edited)
        if step is None:
            return edited
        self._count(*changed, step)
        return None

    def kept(self, records: Iterable[Record], held: Iterable[Record] = ()) -> Iterator[Record]:
        """The records that remain, in their order; of duplicates the first, and none of those in `held`.

        held: records that are not cleaned, compared as they are after editing.
        """
        duplicates = self._duplicates()
        if duplicates is not None:
            for record in held:
                duplicates.add(self._edited(record)[0])
        for record in records:
            edited, changed = self._edited(record)
            self._count(*changed)
            step = self._by_length(edited)
            if step is None and duplicates is not None:
                step = duplicates.step(edited)
            if step is None:
                yield edited
            else:
                self._count(step)

    def check_some_left(self, count: int) -> None:
        """Raise DataError where no record is left."""
        if not count:
            raise DataError("clean: dropped every example, by step: " + _listed(self.counts))

    def _count(self, *steps: str) -> None:
        for step in steps:
            self.counts[step] += 1

    def _edited(self, record: Record) -> tuple[Record, list[str]]:
        """The record with its texts edited, and the steps that changed it."""
        changed = []
        for name, edit in self._edits.items():
            new = {each: _applied(record.fields[each], edit) for each in self.names if each in record.fields}
            if any(record.fields[each] != value for each, value in new.items()):
                changed.append(name)
                record = Record(record.where, {**record.fields, **new})
        return record, changed

    def _by_length(self, record: Record) -> str | None:
        """The step that drops a record for its length."""
        config = self.config
        if config.min_chars is None and config.max_chars is None:
            return None
        size = sum(len(text) for text in _texts(record, self.names))
        if config.min_chars is not None and size < config.min_chars:
            return "min_chars"
        return "max_chars" if config.max_chars is not None and size > config.max_chars else None

    def _duplicates(self) -> _Duplicates | None:
        """Where records are compared; None where neither step for duplicates is on."""
        if not self.config.exact_duplicates and self.config.near_duplicates is None:
            return None
        return _Duplicates(self.config, self.names, self._compared)


class _Duplicates:
    """Records that have been seen, against which further ones are compared."""

    def __init__(self, config: CleaningConfig, names: Sequence[str], compared: Sequence[str] | None) -> None:
        self._names, self._compared = names, compared
        self._seen: set[bytes] | None = set() if config.exact_duplicates else None
        self._near = None if config.near_duplicates is None else _NearDuplicates(config.near_duplicates)

    def add(self, record: Record) -> None:
        """Add a record, whether or not it is a duplicate."""
        if self._seen is not None:
            self._seen.add(self._digest(record))
        if self._near is not None:
            self._near.add(self._text(record))

    def step(self, record: Record) -> str | None:
        """The step that drops a record; one that is no duplicate is added."""
        if self._seen is not None:
            digest = self._digest(record)
            if digest in self._seen:
                return "exact_duplicates"
            self._seen.add(digest)
        if self._near is not None and self._near.holds(self._text(record)):
            return "near_duplicates"
        return None

    def _digest(self, record: Record) -> bytes:
        return hashlib.sha256(contents(record, self._compared).encode()).digest()

    def _text(self, record: Record) -> str:
        return " ".join(_texts(record, self._names))


def repaired(text: str) -> str:
    """The text in NFC; text that was UTF-8 read as Windows-1252 or Latin-1 is decoded again where all of it can be."""
    for encoding in ("cp1252", "latin-1"):
        if text.isascii():
            break
        try:
            again = text.encode(encoding).decode("utf-8")
        except UnicodeError:
            continue
        text = again
        break
    return unicodedata.normalize("NFC", text)


def without_control(text: str) -> str:
    """The text without characters of the categories Cc, Cf, Cn, Co and Cs, except tabs, line ends and joiners."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        c for c in text if c in KEPT_CONTROLS or c in "\u200c\u200d" or unicodedata.category(c)[0] != "C"
    )


def without_emails(text: str) -> str:
    """The text with [EMAIL] for each e-mail address."""
    return EMAIL.sub(EMAIL_MASK, text)


def without_phones(text: str) -> str:
    """The text with [PHONE] for each phone number: 8 to 15 digits, grouped or after + or 0.

    Dates, years, times, IP addresses, ISBNs and numbers in groups of three digits are kept, but not 123 456 789 and
    123.456.789, as phone numbers of some countries are written.
    """
    return PHONE.sub(lambda match: PHONE_MASK if _is_phone(match) else match[0], text)


def _is_phone(match: re.Match[str]) -> bool:
    found = match[0]
    if any(pattern.fullmatch(found) for pattern in OTHER_NUMBERS):
        return False
    if ISBN.fullmatch(found) or ISBN_BEFORE.search(match.string, max(0, match.start() - 16), match.start()):
        return False
    return found[0] in "+(0" or GROUPED.search(found) is not None


def _applied(value: Any, edit: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return edit(value)
    if isinstance(value, list):
        return [_applied(each, edit) for each in value]
    if isinstance(value, Mapping) and isinstance(value.get("content"), str):  # a message of a chat
        return {**value, "content": edit(value["content"])}
    return value


def _texts(record: Record, names: Sequence[str]) -> list[str]:
    found: list[str] = []

    def gather(value: Any) -> None:
        if isinstance(value, str):
            found.append(value)
        elif isinstance(value, list):
            for each in value:
                gather(each)
        elif isinstance(value, Mapping):
            gather(value.get("content"))

    for name in names:
        gather(record.fields.get(name))
    return found


class _NearDuplicates:
    """The sketches of texts, against which further ones are compared."""

    def __init__(self, threshold: float) -> None:
        try:
            self._datasketch = importlib.import_module("datasketch")
        except ImportError:
            raise DataError(
                "clean.near_duplicates: needs the package datasketch (pip install 'fastattn[train]')"
            ) from None
        self._threshold = threshold
        # a lower threshold in the index, whose search is probabilistic; the sketches are compared below
        self._index = self._datasketch.MinHashLSH(threshold=min(0.9, 0.9 * threshold), num_perm=PERMUTATIONS)
        self._sketches: dict[str, Any] = {}

    def holds(self, text: str) -> bool:
        """Whether an earlier text is about the same; one that is not is added."""
        sketch = self._sketch(text)
        if self._nearest(sketch) >= self._threshold:
            return True
        self._insert(sketch)
        return False

    def add(self, text: str) -> None:
        """Add a text, also where an earlier one is about the same: a later text may be similar to this one only."""
        sketch = self._sketch(text)
        if self._nearest(sketch) < 1.0:
            self._insert(sketch)

    def _sketch(self, text: str) -> Any:
        sketch = self._datasketch.MinHash(num_perm=PERMUTATIONS)
        # a lone surrogate is refused with its line where examples are made
        sketch.update_batch([shingle.encode("utf-8", "surrogatepass") for shingle in shingles(text)])
        return sketch

    def _nearest(self, sketch: Any) -> float:
        """The similarity of the most similar earlier text that the index finds."""
        return max((sketch.jaccard(self._sketches[name]) for name in self._index.query(sketch)), default=0.0)

    def _insert(self, sketch: Any) -> None:
        name = str(len(self._sketches))
        self._index.insert(name, sketch)
        self._sketches[name] = sketch


def shingles(text: str) -> set[str]:
    """Runs of five words in lower case; runs of five characters for scripts without spaces, such as Chinese, and for
    texts of fewer words, of all characters where a text has no word."""
    words = WORD.findall(text.lower())
    # average words are shorter in every language
    if len(words) < SHINGLE or len("".join(words)) > 12 * len(words):
        words = list("".join(words) or "".join(text.split()))
    return {" ".join(words[i : i + SHINGLE]) for i in range(max(1, len(words) - SHINGLE + 1))}


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items())
