"""The state of this machine: versions, devices, compilers, the extension, and each backend with its refusal."""

from __future__ import annotations

import functools
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from fastattn import versions
from fastattn.extension.toolkit import find_toolkit

SCHEMA = 1
PACKAGES = ("torch", "triton", "numpy", "safetensors", "tokenizers", "transformers")
VARIABLES = (
    "FASTATTN_BACKEND", "FASTATTN_DISABLE", "FASTATTN_CACHE_DIR", "TRITON_INTERPRET", "CUDA_VISIBLE_DEVICES",
    "CUDA_HOME", "TORCH_CUDA_ARCH_LIST", "OMP_NUM_THREADS",
)  # fmt: skip
PROBE_SECONDS = 10.0

T = TypeVar("T")


def report() -> dict[str, Any]:
    """The report of `fastattn doctor`, as plain types; a probe that fails is null and listed under "errors".

    Keys: schema (raised when a key changes its meaning), fastattn, versions, platform, cpu, gpus, compilers,
    extension, backends, environment, errors. Sizes are bytes.
    """
    errors: dict[str, str] = {}

    def probe(name: str, read: Callable[[], T]) -> T | None:
        try:
            return read()
        except Exception as error:
            errors[name] = f"{type(error).__name__}: {error}"
            return None

    return {
        "schema": SCHEMA,
        "fastattn": probe("fastattn", _fastattn),
        "versions": {"python": platform.python_version()}
        | {p: probe(p, functools.partial(_version, p)) for p in PACKAGES},
        "platform": probe("platform", platform.platform),
        "cpu": probe("cpu", _cpu),
        "gpus": probe("gpus", _gpus),
        "compilers": {
            "nvcc": probe("nvcc", _nvcc),
            "c++": probe("c++", lambda: _tool(os.environ.get("CXX", "g++"))),
            "ninja": probe("ninja", lambda: _tool("ninja")),
        },
        "extension": probe("extension", _extension),
        "backends": probe("backends", _backends),
        "environment": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        "errors": errors,
    }


def _fastattn() -> dict[str, Any]:
    import fastattn

    root = Path(fastattn.__file__).resolve().parent
    return {"version": fastattn.__version__, "path": str(root), "revision": _revision(root.parent)}


def _revision(root: Path) -> str | None:
    """The git revision of a checkout, marked when it has local changes; None for an installed package."""
    if not (root / ".git").exists() or not (root / "setup.py").exists() or not shutil.which("git"):
        return None
    revision = _run("git", "-C", str(root), "rev-parse", "--short=12", "HEAD").strip()
    changed = _run("git", "-C", str(root), "status", "--porcelain", "--untracked-files=no").strip()
    return f"{revision} with local changes" if changed else revision


def _version(package: str) -> str | None:
    return versions.find(package)


def _cpu() -> dict[str, Any]:
    import torch

    return {
        "model": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory": _physical_memory(),
        "torch_threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
    }


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        match = re.search(r"^model name\s*:\s*(.+)$", info.read_text(errors="replace"), re.MULTILINE)
        if match:
            return match.group(1).strip()
    return platform.processor() or platform.machine()


def _physical_memory() -> int | None:
    names = getattr(os, "sysconf_names", {})
    if "SC_PHYS_PAGES" not in names or "SC_PAGE_SIZE" not in names:
        return None
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _gpus() -> list[dict[str, Any]]:
    import torch

    if not torch.cuda.is_available():
        return []
    driver = _driver()
    found = []
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        capability = f"{gpu.major}.{gpu.minor}"
        found.append(
            {"name": gpu.name, "capability": capability, "memory": gpu.total_memory, "driver": driver}
        )
    return found


def _driver() -> str | None:
    if not shutil.which("nvidia-smi"):
        return None
    lines = _run("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").splitlines()
    return lines[0].strip() if lines else None


def _nvcc() -> dict[str, Any] | None:
    """The CUDA compiler that would build the extension, its toolkit's root and the version its headers state."""
    toolkit = find_toolkit()
    path = toolkit.nvcc if toolkit else shutil.which("nvcc")
    if path is None:
        return None
    release = re.search(r"release ([\d.]+)", _run(path, "--version"))
    return {
        "path": path,
        "version": release.group(1) if release else None,
        "root": toolkit.root if toolkit else None,
        "headers": toolkit.version if toolkit else None,
    }


def _tool(name: str) -> dict[str, Any] | None:
    path = shutil.which(name)
    if path is None:
        return None
    match = re.search(r"\d+(\.\d+)+", _run(path, "--version").partition("\n")[0].split(")")[-1])
    return {"path": path, "version": match.group(0) if match else None}


def _extension() -> dict[str, Any]:
    from fastattn import extension

    found = extension.state()
    if found.info is None:
        return {"built": False, "detail": found.reason}
    detail = f"{found.path}, for {', '.join(found.info.archs)}"
    return {"built": True, "detail": detail, "path": str(found.path), "archs": list(found.info.archs)}


def _backends() -> list[dict[str, Any]]:
    from fastattn import backends

    return [{"name": n, "available": why is None, "reason": why} for n, why in backends.available()]


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=PROBE_SECONDS, check=False)
    return done.stdout
