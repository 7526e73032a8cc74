"""The build info of an extension: written into the file and read without loading it."""

from __future__ import annotations

import json
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .commands import digest

MARKER = b"FASTATTN_BUILD_INFO="  # precedes the build info in a built extension


@dataclass(frozen=True, slots=True)
class BuildInfo:
    """The versions and architectures that an extension was built with."""

    torch: str
    cuda: str
    python: str  # ABI tag
    archs: tuple[str, ...]
    sources: str  # hash

    @classmethod
    def of_file(cls, path: Path) -> BuildInfo | None:
        """Read the build info of an extension without loading it; None if it has none."""
        data = path.read_bytes()
        start = data.find(MARKER + b"{")
        if start < 0:
            return None
        text = data[start + len(MARKER) : data.index(b"\0", start)]
        fields: dict[str, Any] = json.loads(text)
        return cls(**{**fields, "archs": tuple(fields["archs"])})

    def mismatch(self, other: BuildInfo) -> str | None:
        """The first difference between this info, of a file, and `other`, of this environment; None if they match."""
        for name in ("torch", "cuda", "python"):
            built, here = getattr(self, name), getattr(other, name)
            if built != here:
                return f"built for {name} {built}, this is {here}"
        return None if self.sources == other.sources else "built from other sources"


def csrc_folder() -> Path:
    """The CUDA sources: beside the package in a checkout, inside it when installed."""
    package = Path(__file__).resolve().parent.parent
    return package / "csrc" if (package / "csrc").is_dir() else package.parent / "csrc"


def abi_tag() -> str:
    """The Python ABI that a binary is built for."""
    return str(sysconfig.get_config_var("SOABI") or sys.implementation.cache_tag)


def library_name() -> str:
    """The file name of the extension."""
    return "_C" + str(sysconfig.get_config_var("EXT_SUFFIX") or ".so")


def sources_hash(csrc: Path) -> str:
    """A hash of every file of csrc."""
    files = sorted(p for p in csrc.rglob("*") if p.suffix in (".cpp", ".cu", ".cuh", ".h"))
    return digest("\0".join(f"{p.relative_to(csrc).as_posix()}\0{p.read_text('utf-8')}" for p in files))
