"""Instructions that a softmax or loss kernel issues for an element, from its machine code, beside what bytes allow.

PYTHONPATH=tests python -m csrc.row_instructions

Counted is the way of a thread that holds whole, aligned vectors of a row of a contiguous tensor, without a mask, in a
block of several warps where the kernel knows such rows: the shortest way through the control flow with a load of 16
bytes for each of its vectors, the stores of their results, and its barriers. Kernels that read a row in steps are
counted by the passes of their loops. An instruction counts whether or not its predicate holds: it is issued.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from csrc.compile_report import compile_kernels, missing

from fastattn.tune.cycles.machine import CLOCK_HZ, MULTIPROCESSORS, QUARTERS
from fastattn.tune.cycles.sass import Function, functions_of, tool

WARP = 32
VECTOR_BYTES = 16


class Device(NamedTuple):
    """What bounds a kernel that moves memory: its makers' figures."""

    name: str
    arch: str
    bytes: float  # a second, of memory
    multiprocessors: int
    clock: float

    def budget(self, element: int) -> float:
        """Instructions for an element in the time that its bytes take.

        bytes / (bandwidth / (multiprocessors * clock)) is a multiprocessor's cycles for an element, in each of which
        four schedulers issue one instruction for 32 lanes.
        """
        return element * self.multiprocessors * self.clock / self.bytes * QUARTERS * WARP


A100 = Device("A100", "sm_80", 2.039e12, 108, 1.41e9)
H100 = Device("H100", "sm_90a", 3.35e12, MULTIPROCESSORS, CLOCK_HZ)
H200 = Device("H200", "sm_90a", 4.8e12, MULTIPROCESSORS, CLOCK_HZ)
DEVICES = (A100, H100, H200)
DTYPE_BYTES = {"6__half": 2, "13__nv_bfloat16": 2, "f": 4}
KERNEL = re.compile(
    r"(?P<family>softmax_(?:forward|backward)|cross_entropy_(?:forward|backward))(?P<kind>_plain_long|_plain|_long|)_kernel"
    r"I(?P<types>.*?)(?:Li(?P<elements>\d+)ELi\d+E)?EEv"
)
WIDE = ("LDG", "STG")
SOURCES = "softmax|cross_entropy"


class Point(NamedTuple):
    """How far a way has come: an instruction, and what was passed."""

    index: int
    loads: int
    stores: int
    barriers: int


class RowKernel(NamedTuple):
    """A kernel on rows and its code."""

    arch: str
    family: str  # softmax_forward ...
    kind: str  # "", "plain", "long" or "plain_long"
    types: tuple[str, ...]  # of its template
    held: int  # elements in a thread; 0 where a row is read in steps
    function: Function

    @property
    def name(self) -> str:
        """For people."""
        words = {"6__half": "half", "13__nv_bfloat16": "bfloat16", "f": "float"}
        types = ", ".join(words[each] for each in self.types)
        return f"{self.family}{'_' + self.kind if self.kind else ''}<{types}{f', {self.held}' if self.held else ''}>"

    @property
    def sizes(self) -> tuple[int, int]:
        """Bytes of an element that is read, and of one that is written; the gradient's type comes second."""
        sizes = [DTYPE_BYTES[each] for each in self.types]
        return sizes[0], sizes[-1]

    @property
    def tensors_read(self) -> int:
        """The backward of a softmax reads y and dy."""
        return 2 if self.family == "softmax_backward" else 1

    @property
    def writes(self) -> bool:
        """Whether there is a result for each element."""
        return self.family != "cross_entropy_forward"

    @property
    def bytes(self) -> int:
        """Of memory that an element moves; a row in steps finds what it reads again in L2."""
        read, written = self.sizes
        return self.tensors_read * read + (written if self.writes else 0)

    @property
    def vector(self) -> int:
        """Elements that are worked on at a time: 16 bytes of the narrower type."""
        return VECTOR_BYTES // min(self.sizes)

    @property
    def loads_of_vector(self) -> int:
        """Instructions that read one."""
        return self.tensors_read * self.vector * self.sizes[0] // VECTOR_BYTES

    @property
    def stores_of_vector(self) -> int:
        """Instructions that write one."""
        return self.vector * self.sizes[1] // VECTOR_BYTES if self.writes else 0

    @property
    def vectors(self) -> int:
        """In a thread that holds them; the gradient of a loss has two (kLossVectors)."""
        return 2 if self.family == "cross_entropy_backward" else self.held // self.vector

    @property
    def barriers(self) -> int:
        """One for each reduction over warps; a row within a warp has none."""
        return 0 if self.held <= 8 else {"softmax_forward": 2, "softmax_backward": 1}[self.family]

    def divisions(self) -> list[str]:
        """Instructions of integer divisions by what the compiler does not know: calls, or reciprocals rounded up."""
        return [
            each.text
            for each in self.function.instructions
            if re.search(r"(div|rem)_[su]64", each.text) or re.match(r"I2F\S*\.RP", each.opcode)
        ]

    def instructions(self) -> float:
        """Issued for an element."""
        code = _Code(self.function)
        if self.vectors:
            way = code.way(
                self.vectors * self.loads_of_vector, self.vectors * self.stores_of_vector, self.barriers
            )
            self._check(way, self.vectors * self.vector)
            return len(way) / (self.vectors * self.vector)
        passes = code.passes(exponentials=self.family.endswith("forward"))
        total = 0.0
        for body, loads in passes:
            elements = loads // self.loads_of_vector * self.vector
            self._check(body, elements)
            total += len(body) / elements
        return total

    def _check(self, way: list[int], elements: int) -> None:
        """Raises where a way leaves out exponentials, so that nothing runs like this."""
        exponentials = sum(self.function.instructions[index].opcode == "MUFU.EX2" for index in way)
        if self.family != "softmax_backward" and exponentials < elements:
            raise ValueError(f"{self.name}: {exponentials} exponentials for {elements} elements")


class _Code:
    """The control flow of a kernel."""

    def __init__(self, function: Function) -> None:
        self.function = function
        self.code = function.instructions

    def _is(self, index: int, what: str) -> bool:
        each = self.code[index]
        return each.opcode.startswith(what) and ".128" in each.opcode

    def after(self, index: int) -> Iterator[int]:
        """What may be issued next."""
        each = self.code[index]
        leaves = each.opcode.split(".")[0] in ("EXIT", "RET", "BRX", "BPT")
        if each.opcode.startswith("BRA"):
            target = self.function.target(index)
            assert target is not None, each.text
            yield target
            leaves = not each.branches_conditionally
        if index + 1 < len(self.code) and not (leaves and not (each.predicate and "EXIT" in each.opcode)):
            yield index + 1

    def way(self, loads: int, stores: int, barriers: int) -> list[int]:
        """The shortest to an exit with so many loads and stores of 16 bytes and barriers, in a block by itself."""
        exits = {index for index, each in enumerate(self.code) if each.opcode.startswith("EXIT")}
        path = self._shortest(0, range(len(self.code)), exits, (loads, stores, barriers))
        if path is None:
            raise ValueError(
                f"{self.function.name}: no way with {loads} loads and {stores} stores of 16 bytes"
            )
        return path

    def passes(self, exponentials: bool) -> Iterator[tuple[list[int], int]]:
        """Of each loop with loads of 16 bytes: the shortest pass with all its loads and stores, and its loads.

        `exponentials`: only of loops with some. The forward's loop for rows with NaN has none.
        """
        for end, each in enumerate(self.code):
            begin = self.function.target(end) if each.opcode.startswith("BRA") else None
            if begin is None or begin > end:
                continue
            inside = range(begin, end + 1)
            loads, stores = (sum(self._is(index, what) for index in inside) for what in WIDE)
            if loads and (not exponentials or any(self.code[i].opcode == "MUFU.EX2" for i in inside)):
                path = self._shortest(begin, inside, {end}, (loads, stores, 0))
                if path is None:
                    raise ValueError(f"{self.function.name}: no pass with {loads} loads and {stores} stores")
                yield path, loads

    def _shortest(
        self, begin: int, inside: range, ends: set[int], passed: tuple[int, int, int]
    ) -> list[int] | None:
        """Instructions from one to one of others, by breadth-first search over the ways that stay inside."""
        before: dict[Point, Point | None] = {Point(begin, 0, 0, 0): None}
        queue = deque(before)
        while queue:
            point = queue.popleft()
            index = point.index
            if self.code[index].opcode.startswith("UCGABAR"):  # clusters
                continue
            here = Point(
                index, point.loads + self._is(index, "LDG"), point.stores + self._is(index, "STG"),
                point.barriers + self.code[index].opcode.startswith("BAR"),
            )  # fmt: skip
            if index in ends and here[1:] == passed:
                path = [point]
                while (last := before[path[-1]]) is not None:
                    path.append(last)
                return [each.index for each in reversed(path)]
            if any(count > most for count, most in zip(here[1:], passed)):
                continue
            for following in (here._replace(index=next_one) for next_one in self.after(index)):
                if following.index in inside and following not in before:
                    before[following] = point
                    queue.append(following)
        return None


def row_kernels(names: str = SOURCES) -> list[RowKernel]:
    """Those of the softmax and of losses, compiled for every architecture of the compile report.

    `names`: a regular expression for the source files.
    """
    return [each for made in compile_kernels(names=names)[0] for each in kernels_of(made.path)]


def kernels_of(path: Path) -> list[RowKernel]:
    """The kernels on rows of an object."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        command = [tool("cuobjdump"), "-xelf", "all", str(path.resolve())]
        subprocess.run(command, cwd=folder, capture_output=True, check=True)
        for cubin in sorted(Path(folder).glob("*.cubin")):
            arch = re.search(r"sm_\d+a?", cubin.name)
            assert arch is not None, cubin.name
            found += [
                kernel
                for function in functions_of(cubin.read_bytes())
                if (kernel := row_kernel(function, arch[0])) is not None
            ]
    return found


def row_kernel(function: Function, arch: str) -> RowKernel | None:
    """By its mangled name, in which a type that came before is S1_."""
    match = KERNEL.search(function.name)
    if match is None:
        return None
    types = re.findall("|".join(DTYPE_BYTES) + "|S1_", match["types"])
    types = [types[0] if each == "S1_" else each for each in types]
    held = int(match["elements"] or 0)
    return RowKernel(arch, match["family"], match["kind"].lstrip("_"), tuple(types), held, function)


def table(kernels: list[RowKernel]) -> str:
    """The report, as text."""
    heads = "".join(f"  {device.name:>6}" for device in DEVICES)
    lines = [f"{'for an element':<52} arch    bytes  instructions  budgets:{heads}"]
    for each in sorted(kernels, key=lambda each: (each.arch, each.name)):
        budgets = "".join(
            f"  {device.budget(each.bytes):>6.1f}" if device.arch == each.arch else 8 * " "
            for device in DEVICES
        )
        lines.append(
            f"{each.name:<52} {each.arch:<6}  {each.bytes:>5}  {each.instructions():>12.1f}          {budgets}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    if reason := missing():
        sys.exit(reason)
    print(table(row_kernels()))
