"""Kernels with one line changed, an error that the emulation has to report."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from cuda_emulation.build import HERE, ROOT, EmulationError, Library, build

SWITCH = "\nnamespace fastattn {\ninline int broken_line = -1;\n}\n"
ENTRY = """
extern "C" const char* break_line(int64_t number) {
  fastattn::broken_line = static_cast<int>(number);
  return nullptr;
}
"""


@dataclass(frozen=True)
class Mutation:
    """One occurrence of a statement, counted from the file's start, replaced by another or removed."""

    name: str
    old: str
    new: str = ""
    occurrence: int = 0
    report: str | None = None  # a regular expression of the report; None where a wrong result is enough

    def __str__(self) -> str:
        return self.name

    def place(self, text: str) -> int:
        """The offset of the statement, which must exist."""
        at = -1
        for _ in range(self.occurrence + 1):
            at = text.find(self.old, at + 1)
            assert at >= 0, f"{self.name}: the kernel has changed"
        return at


# The producer keeps so many that those which the consumers ask for do not exist: 32 where the consumers have 240.
MORE_REGISTERS = Mutation(
    "more registers than the block has",
    "decrease_registers<Shape::kProducerRegisters>();",
    "decrease_registers<Shape::kProducerRegisters + 8>();",
    report=r"deadlock.* in increase_registers from \d+ registers",
)
LANE_NOT_RECONVERGED = Mutation(
    "no reconvergence before release", "warp_sync();", report=r"deadlock.* in mbarrier_wait"
)


# Threads and warps that starve: lanes of the producer warp, its neighbours, and of each warpgroup of consumers.
_FIRST_WARP = 1024
STARVED = [
    *(pytest.param(thread, id=f"thread {thread}") for thread in (0, 13, 31, 40, 64, 128, 250, 383)),
    *(pytest.param(_FIRST_WARP + warp, id=f"warp {warp}") for warp in (0, 1, 4, 11)),
]


def every_schedule(mutations: Sequence[Mutation]) -> list[Any]:
    """Parameters: the numbers of the mutations that every schedule reveals."""
    return [
        pytest.param(number, id=mutation.name)
        for number, mutation in enumerate(mutations)
        if mutation is not LANE_NOT_RECONVERGED
    ]


def assert_lane_reported(run: Callable[[int], None], lanes: Sequence[int]) -> None:
    """One of run(lane), in which that lane starves and the line of LANE_NOT_RECONVERGED is lost, is reported."""
    reports = []
    for lane in lanes:
        try:
            run(lane)
        except EmulationError as error:
            reports.append(str(error))
    assert any(re.search(str(LANE_NOT_RECONVERGED.report), report) for report in reports), reports


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
            choice = f"if (broken_line == {line}) {{ {mutation.new} }} else "
            if text.startswith(mutation.old, at):
                text = f"{text[:at]}{choice}{{ {mutation.old} }}{text[at + len(mutation.old) :]}"
            else:  # with a second mutation
                text = text[:at] + choice + text[at:]
        (csrc / name).write_text(text)
    config = csrc / "device" / "config.cuh"
    config.write_text(config.read_text() + SWITCH)
    beside = csrc / source  # where its includes find the copies
    beside.write_text((HERE / source).read_text() + ENTRY)
    return build(beside, cache, defines, csrc)
