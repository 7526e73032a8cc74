"""Kernels with lines that can be broken, one at a time, which the emulation has to notice."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cuda_emulation.build import HERE, ROOT, Library, build

SWITCH = "\nnamespace fastattn {\ninline int broken_line = -1;\n}\n"
ENTRY = """
extern "C" const char* break_line(int64_t number) {
  fastattn::broken_line = static_cast<int>(number);
  return nullptr;
}
"""


@dataclass(frozen=True)
class Mutation:
    """One occurrence of a statement, in the order of the file, replaced by another, or by nothing."""

    name: str
    old: str
    new: str = ""
    occurrence: int = 0

    def __str__(self) -> str:
        return self.name

    def place(self, text: str) -> int:
        """Where the statement begins; it has to be there."""
        at = -1
        for _ in range(self.occurrence + 1):
            at = text.find(self.old, at + 1)
            assert at >= 0, f"{self.name}: the kernel has changed"
        return at


def breakable_library(
    source: str, kernels: Mapping[str, Sequence[Mutation]], folder: Path, cache: Path, *defines: str
) -> Library:
    """The entry points of `source`, and break_line(number), over a copy of csrc in `folder`.

    Line `number` is that of the mutations of all kernels, files of csrc, one after the other; -1 breaks nothing.
    """
    csrc = folder / "csrc"
    shutil.copytree(ROOT / "csrc", csrc)
    number = 0
    for name, mutations in kernels.items():
        text = (csrc / name).read_text()
        edits = []
        for mutation in mutations:
            edits.append((mutation.place(text), number, mutation))
            number += 1
        for at, line, mutation in sorted(edits, key=lambda edit: -edit[0]):
            choice = f"if (broken_line == {line}) {{ {mutation.new} }} else {{ {mutation.old} }}"
            text = text[:at] + choice + text[at + len(mutation.old) :]
        (csrc / name).write_text(text)
    config = csrc / "device" / "config.cuh"
    config.write_text(config.read_text() + SWITCH)
    beside = csrc / source  # where its includes find the copies
    beside.write_text((HERE / source).read_text() + ENTRY)
    return build(beside, cache, defines, csrc)
