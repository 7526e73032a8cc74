"""Names that were replaced by the terms of FlashAttention, CUTLASS, Triton and PyTorch do not come back.

A new name that replaces another gets a row here and its line in CHANGELOG.md.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("benchmarks", "csrc", "docs", "examples", "fastattn", "kernels", "tests", ".ci", ".github")
SUFFIXES = {".cpp", ".cu", ".cuh", ".h", ".html", ".json", ".md", ".py", ".sh", ".toml", ".yaml", ".yml", ""}
# Whole identifiers, words or phrases, as they were written -> what is written instead. Of what is also an ordinary word
# or the name of a library (turns, edges, rich), only the identifiers are listed.
RETIRED = {
    # attention
    "EDGE": "IS_MASKED",
    "edges_q": "cu_seqlens_q",
    "edges_k": "cu_seqlens_k",
    "row_factor": "lse_correction",
    "RICH_FEATURES": "has_score_mods",
    "end_key": "visible_key_end",
    "end_query": "tile_query_end",
    "key_end": "seq_key_end",
    "sequence_key_end": "load_seq_key_end",
    "wide_offsets": "int64_offsets",
    "wide_rows": "int64_offsets",
    "weigh": "softmax_step",
    # Hopper
    "copy engine": "TMA",
    "kTakesTurns": "kPingPong",
    "await_turn": "ping_pong_wait",
    "pass_turn": "ping_pong_arrive",
    "dq_turns": "dq_semaphore",
    "TurnMistake": "OrderMistake",
    "LANE_OVERTAKEN": "LANE_NOT_RECONVERGED",
    # the package
    "nobody watches": "nothing records",
    "only_autograd_watches": "only_autograd_records",
    "to be had": "available",
}
# Likewise, also where they are one word of an identifier, such as head_plane.
RETIRED_PARTS = {
    "contestant": "provider",
    "cotangent": "upstream gradient",
    "door": "integration",
    "overtaken": "not reconverged",
    "plane": "batch head",
    "truth": "expected",
    "unwatched": "can_bypass_dispatcher",
    "watched": "recorded",
}
# (file, word) -> why it is another thing there.
ALLOWED: dict[tuple[str, str], str] = {}
PART = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])")


def files() -> Iterator[Path]:
    """Every text file of the repository but this one and the history."""
    found = [path for path in ROOT.iterdir() if path.is_file()]
    for folder in FOLDERS:
        found += [path for path in (ROOT / folder).rglob("*") if path.is_file()]
    for path in sorted(found):
        skipped = path.name in ("CHANGELOG.md", "LICENSE", Path(__file__).name)
        if path.suffix in SUFFIXES and not skipped and "__pycache__" not in path.parts and not _linked(path):
            yield path


def _linked(path: Path) -> bool:
    """Whether a file is reached through fastattn/kernels and its like, which are links to folders seen anyway."""
    return any(parent.is_symlink() for parent in path.parents if parent != ROOT and ROOT in parent.parents)


def text_of(path: Path) -> str:
    """The words of a file, those of a sentence one after another: without line breaks and what begins a comment."""
    return re.sub(r"\s*\n\s*(?:(?://|#|>|\*)\s)?", " ", path.read_text(encoding="utf-8", errors="ignore"))


def found_in(text: str) -> set[str]:
    """The retired words of a text."""
    found = {word for word, pattern in PATTERNS.items() if word in text and pattern.search(text)}
    parts = {part.lower().removesuffix("s") for part in PART.findall(text)}
    return found | (parts & RETIRED_PARTS.keys())


PATTERNS = {word: re.compile(rf"(?<![A-Za-z0-9_]){re.escape(word)}(?![A-Za-z0-9_])") for word in RETIRED}


def test_no_retired_word_is_used() -> None:
    used, met = [], set()
    for path in files():
        name = path.relative_to(ROOT).as_posix()
        for word in sorted(found_in(text_of(path))):
            met.add((name, word))
            if (name, word) not in ALLOWED:
                used.append(f"{name}: {word!r}, now {({**RETIRED, **RETIRED_PARTS})[word]}")
    assert not used, "\n".join(used)
    assert ALLOWED.keys() <= met, "a row of ALLOWED that allows nothing"


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("the copy\n    // engine of Hopper", "copy engine"),
        ("x = head_plane[0]", "plane"),
        ("two Cotangents", "cotangent"),
        ("kEdge = EDGE", "EDGE"),
        ("explain(\n# is not to\n# be had here)", "to be had"),
    ],
)
def test_words_are_found_across_lines_and_in_identifiers(text: str, word: str, tmp_path: Path) -> None:
    (tmp_path / "file.py").write_text(text, encoding="utf-8")
    assert found_in(text_of(tmp_path / "file.py")) == {word}


@pytest.mark.parametrize("text", ["explained", "an airplane", "planed", "EDGES", "a key_ending", "doorway"])
def test_other_words_are_not(text: str) -> None:
    assert found_in(text) == set()


def test_the_changelog_lists_every_renamed_word() -> None:
    renamed = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").split("- Renamed inside the package", 1)[1]
    entry = re.sub(r"\s+", " ", re.split(r"\n(?=- )", renamed)[0])
    missing = [old for old in {**RETIRED, **RETIRED_PARTS} if f"`{old}`" not in entry]
    assert not missing, f"CHANGELOG.md lacks {', '.join(missing)}"
