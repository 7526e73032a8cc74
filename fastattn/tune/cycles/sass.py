"""Reads machine code: nvdisasm's text as instructions with their control fields."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fastattn.console import InputError
from fastattn.tune.cycles.machine import Kind, Product, kind_of

FUNCTION = re.compile(r"^\.text\.(\S+):")
LABEL = re.compile(r"^(\.L_\w+):")
CODE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;\s*/\* 0x[0-9a-f]+ \*/")
UPPER_HALF = re.compile(r"^\s*/\* (0x[0-9a-f]+) \*/")
TARGET = re.compile(r"`\((\.L_\w+)\)")
MMA = re.compile(r"HMMA\.16816")
WGMMA = re.compile(r"HGMMA\.(\d+)x(\d+)x(\d+)\S*\s+(.*)")
GROUP = re.compile(r"gsb0(?:, 0x(\w+))?")
NO_SCOREBOARD = 7


class NoDisassembler(InputError):
    """nvdisasm or cuobjdump is not available."""


@dataclass(frozen=True)
class Control:
    """The control fields of an instruction, which the compiler sets for the scheduler."""

    stall: int = 1  # cycles until the warp's next instruction
    sets_when_written: int = NO_SCOREBOARD  # the scoreboard that ends with its result
    sets_when_read: int = NO_SCOREBOARD  # the scoreboard that ends when its operands are read
    waits: int = 0  # one bit per scoreboard

    @classmethod
    def of(cls, upper: int) -> Control:
        """Decode the upper 64 bits of an instruction."""
        return cls(upper >> 41 & 15, upper >> 46 & 7, upper >> 49 & 7, upper >> 52 & 63)


@dataclass(frozen=True)
class Instruction:
    """One instruction of a kernel."""

    opcode: str
    text: str  # without its predicate
    predicate: str = ""
    control: Control = Control()

    @property
    def kind(self) -> Kind:
        """Its class in the model."""
        return kind_of(self.opcode)

    @property
    def product(self) -> Product | None:
        """The matrix product: a wgmma, or the four mma of the warps of a warpgroup, whose operands are registers."""
        if MMA.match(self.opcode):
            return Product(64, 8, 16, False)
        match = WGMMA.match(self.text)
        if match is None:
            return None
        rows, columns, depth = (int(size) for size in match.groups()[:3])
        return Product(rows, columns, depth, "gdesc" in match[4].split(",")[1])

    @property
    def ends_group(self) -> bool:
        """Whether a wgmma is the last one of a group."""
        return self.opcode.startswith("HGMMA") and "gsb0" in self.text

    @property
    def groups_left(self) -> int | None:
        """The number of groups that may still run after a wait for products."""
        match = GROUP.search(self.text) if self.kind.name == "wgmma wait" else None
        return int(match[1], 16) if match and match[1] else None

    @property
    def branches_conditionally(self) -> bool:
        """Whether it is a branch that may fall through."""
        return bool(self.predicate or re.match(r"BRA(\.\w+)*\s+!?U?P\d", self.text))


@dataclass(frozen=True)
class Function:
    """The code of a kernel, and the positions of its labels."""

    name: str
    instructions: tuple[Instruction, ...]
    labels: dict[str, int]

    def target(self, index: int) -> int | None:
        """The target of the branch at an index."""
        match = TARGET.search(self.instructions[index].text)
        return self.labels.get(match[1]) if match else None


def tool(name: str) -> str:
    """nvdisasm or cuobjdump: that of the environment variable of its name, of Triton's package, of a CUDA toolkit."""
    named = os.environ.get(name.upper())
    if named:
        if shutil.which(named) is None:
            raise NoDisassembler(f"{name.upper()}: got {named!r}, needs a program")
        return named
    folders = [os.environ.get("PATH", "")]
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin is not None:
        folders.insert(0, str(Path(triton.origin).parent / "backends" / "nvidia" / "bin"))
    folders += [str(Path(root) / "bin") for root in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if root]
    found = shutil.which(name, path=os.pathsep.join(folders))
    if found is None:
        raise NoDisassembler(
            f"there is no {name}: it comes with triton and with the CUDA toolkit, or {name.upper()} names it"
        )
    return found


def functions_of(cubin: bytes) -> list[Function]:
    """The kernels of a cubin. Raises NoDisassembler, or ValueError unless it is a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([tool("nvdisasm"), "-c", "-hex", file.name], capture_output=True, text=True)
    if done.returncode != 0:
        raise ValueError(f"not a cubin that nvdisasm reads: {done.stderr.strip()[:200]}")
    return list(parse(done.stdout))


def parse(text: str) -> Iterator[Function]:
    """The kernels in the output of `nvdisasm -c -hex`."""
    name: str | None = None
    code: list[Instruction] = []
    labels: dict[str, int] = {}
    pending: str | None = None
    for line in text.splitlines():
        if match := FUNCTION.match(line):
            if name is not None:
                yield Function(name, tuple(code), labels)
            name, code, labels, pending = match[1], [], {}, None
        elif name is None:
            continue
        elif line.startswith("\t.section"):
            yield Function(name, tuple(code), labels)
            name = None
        elif match := LABEL.match(line):
            labels[match[1]] = len(code)
        elif match := CODE.match(line):
            pending = match[2]
        elif pending is not None and (match := UPPER_HALF.match(line)):
            code.append(_instruction(pending, Control.of(int(match[1], 16))))
            pending = None
    if name is not None:
        yield Function(name, tuple(code), labels)


def _instruction(text: str, control: Control) -> Instruction:
    predicate = ""
    if text.startswith("@"):
        predicate, text = text.split(None, 1)
    return Instruction(text.split()[0], text, predicate, control)
