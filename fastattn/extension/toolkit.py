"""The CUDA toolkit and the torch that a build uses."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from .commands import BuildError

DEFAULT_ROOTS = ("/usr/local/cuda",)  # searched for a toolkit after CUDA_HOME and PATH


@dataclass(frozen=True, slots=True)
class Toolkit:
    """A CUDA toolkit, confirmed by its headers."""

    nvcc: str
    root: str
    version: str  # of its headers, "13.0"


@dataclass(frozen=True, slots=True)
class Torch:
    """The properties of a torch that an extension depends on."""

    version: str
    cuda: str  # "13.0"
    folder: str
    cxx11_abi: bool
    device_archs: tuple[str, ...]  # of the GPUs it sees, "9.0"


def find_torch() -> Torch:
    """The torch to build for: that of this process, or of the environment pip installs into.

    pip builds with the target's interpreter and only hides its packages; other tools build in another environment.
    """
    try:
        import torch
    except ImportError:
        sys.path.append(sysconfig.get_path("purelib"))  # last, so that the build's own packages win
        try:
            import torch
        except ImportError:
            raise BuildError(
                "torch cannot be imported in the build. With pip, install torch first. With uv, add to pyproject.toml"
                ' [tool.uv.extra-build-dependencies] fastattn = [{ requirement = "torch", match-runtime = true }],'
                " or run `fastattn build` after the installation"
            ) from None
    if torch.version.cuda is None:
        raise BuildError(f"torch {torch.__version__} is built without CUDA")
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    archs = sorted({"{}.{}".format(*torch.cuda.get_device_capability(gpu)) for gpu in gpus})
    return Torch(
        str(torch.__version__), torch.version.cuda, str(Path(torch.__file__).parent),
        torch.compiled_with_cxx11_abi(), tuple(archs),
    )  # fmt: skip


def find_toolkit() -> Toolkit | None:
    """The CUDA toolkit: CUDA_HOME's, that of nvcc on PATH, or one of DEFAULT_ROOTS; only one with headers."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    on_path = shutil.which("nvcc")
    candidates = [Path(home)] if home else []
    candidates += [_root_of(on_path)] if on_path else []
    candidates += [Path(root) for root in DEFAULT_ROOTS]
    for root in candidates:
        nvcc = shutil.which("nvcc", path=str(root / "bin")) or on_path
        version = _header_version(root)
        if nvcc and version:
            return Toolkit(nvcc, str(root.resolve()), version)
    return None


def _root_of(nvcc: str) -> Path:
    """The root that the compiler reports, because nvcc on PATH may be a script that starts another one."""
    done = subprocess.run(
        [nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True, check=False
    )
    top = re.search(r"TOP=(\S+)", done.stderr)
    return Path(top.group(1)).resolve() if top else Path(nvcc).resolve().parent.parent


def _header_version(root: Path) -> str | None:
    header = root / "include" / "cuda.h"
    if not header.exists():
        return None
    define = re.search(r"#define CUDA_VERSION (\d+)", header.read_text("utf-8", errors="replace"))
    return f"{int(define.group(1)) // 1000}.{int(define.group(1)) % 1000 // 10}" if define else None
