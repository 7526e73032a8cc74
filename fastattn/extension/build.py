"""Builds the CUDA extension for the installed torch, and caches results by content."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .archs import DEFAULT_ARCHS, parse_archs
from .commands import BuildError, locked
from .compiling import Log, Plan, compile_all, link
from .info import BuildInfo, csrc_folder, library_name
from .toolkit import Toolkit, find_toolkit, find_torch

__all__ = ["BuildError", "Built", "build", "build_here", "make_plan"]


@dataclass(frozen=True, slots=True)
class Built:
    """The result of `fastattn build`."""

    library: Path
    info: BuildInfo
    toolkit: Toolkit
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """The same as plain types, for JSON."""
        parts = asdict(self.info) | {"toolkit": asdict(self.toolkit)}
        return {"library": str(self.library), "seconds": round(self.seconds, 1), **parts}


def make_plan(arch_list: str | None = None, csrc: Path | None = None) -> Plan:
    """The plan of a build on this machine; BuildError with the reason if it cannot be built."""
    if not sys.platform.startswith("linux"):
        raise BuildError(f"the CUDA extension needs Linux, this is {sys.platform}")
    csrc = csrc or csrc_folder()
    if not (csrc / "bindings.cpp").exists():
        raise BuildError(f"the CUDA sources are missing: there is no {csrc / 'bindings.cpp'}")
    torch = find_torch()
    toolkit = find_toolkit()
    if toolkit is None:
        raise BuildError(
            "no CUDA toolkit: there is no nvcc with headers beside it; set CUDA_HOME to the toolkit's root"
        )
    if toolkit.version.split(".")[0] != torch.cuda.split(".")[0]:
        raise BuildError(
            f"the CUDA toolkit in {toolkit.root} is {toolkit.version}, torch {torch.version} needs"
            f" {torch.cuda.split('.')[0]}.x; set CUDA_HOME to a matching one"
        )
    wanted = arch_list or os.environ.get("TORCH_CUDA_ARCH_LIST") or ";".join(torch.device_archs)
    return Plan(csrc, toolkit, torch, parse_archs(wanted) if wanted else DEFAULT_ARCHS)


def build(plan: Plan, cache: Path, force: bool = False, log: Log = print) -> Path:
    """The extension of a plan, from the cache if present; one process builds, others wait for it."""
    folder = cache / plan.key()[:32]
    library = folder / library_name()
    cache.mkdir(parents=True, exist_ok=True)
    with locked(cache / f"{folder.name}.lock"):
        if library.exists() and not force:
            return library
        scratch = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=cache))
        try:
            link(
                plan, compile_all(plan, cache / "objects", force=force, log=log), scratch / library.name, log
            )
            folder.mkdir(exist_ok=True)
            (scratch / library.name).replace(library)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return library


def build_here(cache: Path, arch_list: str | None = None, force: bool = False, log: Log = print) -> Built:
    """The extension for this torch, from the cache or compiled."""
    started = time.monotonic()
    plan = make_plan(arch_list)
    log(
        f"torch {plan.torch.version}, CUDA {plan.toolkit.version} in {plan.toolkit.root}, for {', '.join(plan.archs)}"
    )
    library = build(plan, cache, force=force, log=log)
    return Built(library, plan.info(), plan.toolkit, time.monotonic() - started)
