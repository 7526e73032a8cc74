"""Compiles calls of device wrappers to PTX and returns the instructions, with values in place of registers."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from cuda_emulation.build import ROOT

# Instructions of intrinsics that are listed; those of asm statements are always listed.
SHOWN = ("shfl.", "vote.", "bar.", "barrier.", "atom.", "red.", "membar.", "fence.", "ld.shared", "st.shared")
REGISTER = re.compile(r"%[a-z]+\d+|[\w$]+_param_\d+")
LOAD = re.compile(r"ld\.[\w.]+\s+(%\w+), \[(%?\w+)(?:\+(\d+))?\]")


class Call(NamedTuple):
    """A kernel of one statement: its parameters as C++ declares them."""

    name: str
    parameters: str
    statement: str


def source_of(calls: Iterable[Call]) -> str:
    """A translation unit with a kernel for each call."""
    headers = sorted(path.name for path in (ROOT / "csrc" / "device").glob("*.cuh"))
    wanted = ("config", "cluster", "copy", "math", "mbarrier", "sync", "tma", "warp", "wgmma")
    lines = [f'#include "device/{name}"' for name in headers if name.removesuffix(".cuh") in wanted]
    lines.append("using namespace fastattn;")
    lines += [
        f'extern "C" __global__ void __launch_bounds__(384, 1) call_{call.name}({call.parameters}) '
        f"{{ {call.statement} }}"
        for call in calls
    ]
    return "\n".join(lines)


def compile_ptx(calls: Iterable[Call], arch: str, folder: Path) -> str:
    """The PTX of the calls for compute_`arch`, after ptxas has accepted it. Raises RuntimeError with the errors."""
    nvcc = shutil.which("nvcc")
    assert nvcc is not None
    source = folder / f"calls_{arch}.cu"
    source.write_text(source_of(calls))
    ptx = source.with_suffix(".ptx")
    target = f"-gencode=arch=compute_{arch},code=sm_{arch}"
    for command in (
        [nvcc, "-std=c++20", f"-I{ROOT / 'csrc'}", target, "-ptx", "-o", str(ptx), str(source)],
        [nvcc, target, "-cubin", "-o", str(ptx.with_suffix(".cubin")), str(ptx)],
    ):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0 or "warning" in done.stderr:
            raise RuntimeError(done.stderr[-4000:])
    return ptx.read_text()


def instructions(ptx: str, call: Call) -> list[str]:
    """The call's instructions: parameters by name, loads as name[index of 4 bytes], results as `out`."""
    body = re.search(rf"\.entry call_{call.name}\((.*?)\)\s*[^{{]*\{{(.*?)\n\}}", ptx, re.DOTALL)
    assert body is not None
    names = [re.split(r"[\s*&]+", declared.strip())[-1] for declared in call.parameters.split(",")]
    held: dict[str, str] = {f"call_{call.name}_param_{i}": name for i, name in enumerate(names)}

    def value(token: str) -> str:
        return held.get(token, "out" if token.startswith("%") else token)

    shown: list[str] = []
    in_asm = False
    for line in (line.strip() for line in body[2].splitlines()):
        if line.startswith("//"):
            in_asm = line.startswith("// begin inline asm")
        elif in_asm or line.startswith(SHOWN):
            text = REGISTER.sub(lambda match: value(match[0]), line)
            if text not in ("", "{", "}"):
                shown.append(re.sub(r"\s+", " ", text))
        elif load := LOAD.match(line):
            register, base, offset = load.groups()
            name = value(base)
            held[register] = name if "ld.param" in line else f"{name}[{int(offset or 0) // 4}]"
        elif move := re.match(r"(mov|cvta|cvt)([\w.]*)\s+(%\w+), ([^,;]+);", line):
            held[move[3]] = (
                f"shared({value(move[4])})" if move[2].startswith(".to.shared") else value(move[4])
            )
        elif result := re.match(r"(\w+)[\w.]*\s+(%\w+), ([^;]+);", line):
            held[result[2]] = f"{result[1]}({', '.join(value(x.strip()) for x in result[3].split(','))})"
    return shown
