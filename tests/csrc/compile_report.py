"""What nvcc makes of every CUDA kernel: registers, spills, shared memory, wgmma instructions, seconds.

python tests/csrc/compile_report.py [ARCH ...]        by default 8.0 and 9.0a; exits with 1 where a kernel spills, or
                                                      where its warpgroups ask for more registers than its block has
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from collections import Counter
from math import prod
from pathlib import Path
from typing import NamedTuple

from fastattn.cache import cache_dir
from fastattn.extension.archs import SM90_SUFFIX
from fastattn.extension.compiling import Object, Plan, compile_all, sources
from fastattn.extension.info import csrc_folder
from fastattn.extension.toolkit import Toolkit, Torch, find_toolkit

ARCHS = ("8.0", "9.0a")
SAMPLE = "attention_(fwd|bwd)_half_128"  # every kind of attention kernel but those of a head dim over 128
WARPGROUP_THREADS = 128
ENTRY = re.compile(
    r"Compiling entry function '(?P<name>\S+)' for '(?P<arch>\w+)'.*?"
    r"(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)


class Kernel(NamedTuple):
    """One kernel compiled for one architecture."""

    source: str
    arch: str
    name: str
    registers: int
    spilled: int  # bytes stored and loaded
    shared: int  # bytes, beside what a launch asks for
    wgmma: int
    warnings: tuple[str, ...]  # of the assembler


class RegisterPool(NamedTuple):
    """The registers of a block whose warpgroups hand some over (setmaxnreg), as the binary says."""

    name: str
    registers: int  # a thread at the launch
    threads: int  # of a block, by the launch bounds
    lowered: tuple[int, ...]  # what warpgroups go down to
    raised: tuple[int, ...]  # and up to

    @property
    def had(self) -> int:
        """Registers that a launch takes for a block."""
        return self.registers * self.threads

    @property
    def asked(self) -> int:
        """What its warpgroups ask for in all: one is the producer, the others are consumers."""
        consumers = self.threads - WARPGROUP_THREADS
        return WARPGROUP_THREADS * max(self.lowered, default=256) + consumers * max(self.raised, default=256)

    def mistake(self) -> str | None:
        """Why a warpgroup would wait for registers for ever, or the instruction is not allowed; None if neither."""
        if not self.lowered or not self.raised:
            return f"goes down to {self.lowered} and up to {self.raised} registers, needs both"
        if any(count % 8 or not 24 <= count <= 256 for count in self.lowered + self.raised):
            return f"{self.lowered} and {self.raised} registers: needs multiples of 8 from 24 to 256"
        if max(self.lowered) > self.registers or min(self.raised) < self.registers:
            return f"{self.lowered} down and {self.raised} up from {self.registers} registers a thread"
        if self.asked > self.had:
            return f"asks for {self.asked} registers of the {self.had} that a block has"
        return None


def missing() -> str | None:
    """Why nothing can be compiled here, or None."""
    if find_toolkit() is None:
        return "needs a CUDA toolkit"
    return None if shutil.which("g++") else "needs g++"


def compile_kernels(archs: tuple[str, ...] = ARCHS, names: str = "") -> tuple[list[Object], list[Kernel]]:
    """Every instantiation, from the cache where its text is there: kernels know nothing of torch, so none is needed.

    `names`: a regular expression for files, to compile those alone.
    """
    toolkit = find_toolkit()
    assert toolkit is not None
    nothing = Torch("", toolkit.version, "", True, ())
    plan = Plan(csrc_folder(), toolkit, nothing, archs)
    device = [path for path in sources(plan) if path.suffix == ".cu" and re.search(names, path.name)]
    objects = compile_all(plan, cache_dir() / "objects", log=lambda _: None, only=device)
    return objects, [kernel for made in objects for kernel in kernels_of(made, toolkit)]


def kernels_of(made: Object, toolkit: Toolkit) -> list[Kernel]:
    """The kernels of an object, by what the assembler said of them and by their code."""
    wgmma = _wgmma(made.path, toolkit) if made.source.endswith(SM90_SUFFIX) else Counter()
    warnings = tuple(line for line in made.log.splitlines() if "warning" in line or "Potential" in line)
    found = []
    for match in ENTRY.finditer(made.log):
        shared = re.search(r"(\d+) bytes smem", match["rest"])
        found.append(
            Kernel(
                made.source, match["arch"], _readable(match["name"]), int(match["registers"]),
                int(match["stores"]) + int(match["loads"]), int(shared.group(1)) if shared else 0,
                wgmma[match["name"]], warnings,
            )
        )  # fmt: skip
    return found


def disassembler(toolkit: Toolkit) -> str | None:
    """cuobjdump, the toolkit's or the one that triton brings."""
    folders = [Path(toolkit.root) / "bin"]
    triton = importlib.util.find_spec("triton")
    if triton and triton.origin:
        folders.append(Path(triton.origin).parent / "backends" / "nvidia" / "bin")
    return next((tool for folder in folders if (tool := shutil.which("cuobjdump", path=str(folder)))), None)


def register_pools(objects: list[Object], toolkit: Toolkit) -> list[RegisterPool]:
    """Those of every kernel with setmaxnreg, which only Hopper's own sources have."""
    tool = disassembler(toolkit)
    assert tool is not None
    pools = []
    for made in objects:
        if made.source.endswith(SM90_SUFFIX):
            command = [tool, "-elf", "-sass", "--dump-resource-usage", str(made.path)]
            pools += pools_of(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return pools


def pools_of(dump: str) -> list[RegisterPool]:
    """From the text of cuobjdump: its resource usage, its ELF sections and its code."""
    registers = {name: int(count) for name, count in re.findall(r"Function (\S+):\s+REG:(\d+)", dump)}
    threads: dict[str, int] = {}
    for name, info in re.findall(r"^\.nv\.info\.(\S+)\n(.*?)(?=^\.|\Z)", dump, re.DOTALL | re.MULTILINE):
        if match := re.search(r"EIATTR_MAX_THREADS\s+Format:\s*\S+\s+Value:\s*(0x\w+) (0x\w+) (0x\w+)", info):
            threads[name] = prod(int(size, 16) for size in match.groups())
    pools = []
    for name, code in re.findall(r"Function : (\S+)\n(.*?)(?=Function :|\Z)", dump, re.DOTALL):
        asked = re.findall(r"USETMAXREG\.(\w+)\S* (?:UP\d, )?(0x\w+)", code)
        assert len(asked) == code.count("USETMAXREG"), f"an unknown form of USETMAXREG in {name}"
        if asked:
            lowered = tuple(sorted({int(count, 16) for kind, count in asked if kind == "DEALLOC"}))
            raised = tuple(sorted({int(count, 16) for kind, count in asked if kind != "DEALLOC"}))
            pools.append(RegisterPool(_readable(name), registers[name], threads[name], lowered, raised))
    return pools


def _wgmma(path: Path, toolkit: Toolkit) -> Counter[str]:
    """wgmma instructions by kernel."""
    counts: Counter[str] = Counter()
    tool = disassembler(toolkit)
    if tool is None:
        return counts
    code = subprocess.run([tool, "-sass", str(path)], capture_output=True, text=True, check=True).stdout
    name = ""
    for line in code.splitlines():
        if match := re.search(r"Function : (\S+)", line):
            name = match.group(1)
        elif "HGMMA" in line:
            counts[name] += 1
    return counts


def _readable(mangled: str) -> str:
    if shutil.which("c++filt") is None:
        return mangled
    text = subprocess.run(["c++filt", mangled], capture_output=True, text=True, check=True).stdout.strip()
    return re.sub(
        r"\(.*\)$|fastattn::|^void |\(int\)|\(bool\)", "", re.sub(r"\(fastattn::[A-Z].*$", "", text)
    )


def table(objects: list[Object], kernels: list[Kernel]) -> str:
    """The report, as text."""
    lines = [f"{'kernel':<78} {'arch':<7} registers  spilled  static shared  wgmma"]
    for k in kernels:
        lines.append(
            f"{k.name[:78]:<78} {k.arch:<7} {k.registers:>9}  {k.spilled:>7}  {k.shared:>13}  {k.wgmma or '':>5}"
        )
    lines += [f"{made.source}: {made.seconds:.1f} s" for made in objects]
    lines.append(f"{len(kernels)} kernels in {sum(made.seconds for made in objects):.0f} s of compiling")
    return "\n".join(lines)


if __name__ == "__main__":
    if reason := missing():
        sys.exit(reason)
    compiled, all_kernels = compile_kernels(tuple(sys.argv[1:]) or ARCHS)
    print(table(compiled, all_kernels))
    if spilling := [kernel for kernel in all_kernels if kernel.spilled]:
        sys.exit("\n".join(f"spills {k.spilled} bytes on {k.arch}: {k.name}" for k in spilling))
    if (used := find_toolkit()) and disassembler(used):
        found = register_pools(compiled, used)
        print(f"{len(found)} kernels hand registers over")
        if mistakes := [f"{pool.name}: {mistake}" for pool in found if (mistake := pool.mistake())]:
            sys.exit("\n".join(mistakes))
