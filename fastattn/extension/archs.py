"""GPU architectures: parsing, comparison with a device, and compiler flags."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from .commands import BuildError

MIN_ARCH = 80
DEFAULT_ARCHS = (
    "8.0+PTX",
    "9.0a",
)  # without a GPU to ask: every GPU from 8.0 on, and Hopper with its own instructions
SM90_SUFFIX = "_sm90.cu"  # sources with this suffix use instructions that only compute capability 9.0 has


def parse_archs(text: str) -> tuple[str, ...]:
    """TORCH_CUDA_ARCH_LIST as a tuple; 9.0 becomes 9.0a, which has Hopper's instructions."""
    archs = []
    for name in re.split(r"[;, ]+", text.strip("; ,")):
        match = re.fullmatch(r"(\d+)\.(\d)([a-z]?)(\+PTX)?", name)
        if match is None:
            raise BuildError(f"architecture {name!r}: needs the form 8.0, 9.0a or 8.0+PTX")
        major, minor, kind, ptx = match.groups()
        if int(major + minor) < MIN_ARCH:
            raise BuildError(f"architecture {name!r}: the kernels need compute capability 8.0 or later")
        kind = "a" if major + minor == "90" else kind
        archs.append(f"{major}.{minor}{kind}{'' if kind else ptx or ''}")
    return tuple(dict.fromkeys(archs))


def covers(archs: Sequence[str], device: int) -> bool:
    """Whether code for some of `archs` runs on a device of compute capability `device` (10 * major + minor)."""
    for arch in archs:
        number, ptx = int(re.sub(r"\D", "", arch)), arch.endswith("+PTX")
        if "a" in arch:
            if number == device:
                return True
        elif number == device or (number <= device and (ptx or number // 10 == device // 10)):
            return True
    return False


def archs_of(source: Path, archs: Sequence[str]) -> list[str]:
    """The architectures a source is compiled for."""
    return [arch for arch in archs if arch == "9.0a" or not source.name.endswith(SM90_SUFFIX)]


def gencode(arch: str) -> str:
    number = re.sub(r"\.|\+PTX", "", arch)
    code = f"[sm_{number},compute_{number}]" if arch.endswith("+PTX") else f"sm_{number}"
    return f"-gencode=arch=compute_{number},code={code}"
