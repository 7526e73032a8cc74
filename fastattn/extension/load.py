"""The built CUDA extension: found, checked against this torch, Python and sources, and loaded on first use."""

from __future__ import annotations

import importlib.util
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType

import torch

from fastattn.cache import cache_dir
from fastattn.extension.archs import covers
from fastattn.extension.info import BuildInfo, abi_tag, csrc_folder, library_name, sources_hash

PACKAGE = Path(__file__).resolve().parent.parent
ADVICE = "`fastattn build` builds one that matches"


@dataclass(frozen=True, slots=True)
class State:
    """The loaded module with its info, or the reason why there is none."""

    module: ModuleType | None = None
    info: BuildInfo | None = None
    path: Path | None = None
    reason: str | None = None


@cache
def state() -> State:
    """The extension of this environment: the installed one, or one that `fastattn build` left in the cache.

    An extension that does not match is never loaded; for the installed one there is one warning.
    """
    if torch.version.cuda is None:
        return State(reason=f"torch {torch.__version__} is built without CUDA")
    here = info_here()
    refused = None
    for path, installed in _candidates():
        info = BuildInfo.of_file(path)
        wrong = "it was not built by fastattn" if info is None else info.mismatch(here)
        if wrong is None:
            loaded = _load(path)
            if isinstance(loaded, ModuleType):
                return State(loaded, info, path)
            refused = f"the extension {loaded}"
        elif installed:
            refused = f"the installed extension does not match: {wrong}"
    if refused is None:
        return State(reason="the extension is not built on this machine; `fastattn build` builds it")
    warnings.warn(
        f"fastattn runs without its CUDA extension, {refused}; {ADVICE}", RuntimeWarning, stacklevel=2
    )
    return State(reason=f"{refused}; {ADVICE}")


def module() -> ModuleType:
    """The loaded extension; RuntimeError with the reason if there is none."""
    found = state()
    if found.module is None:
        raise RuntimeError(found.reason)
    return found.module


def info_here() -> BuildInfo:
    """The build info of an extension for this process, without architectures."""
    sources = sources_hash(csrc_folder())
    return BuildInfo(str(torch.__version__), str(torch.version.cuda), abi_tag(), (), sources)


def _candidates() -> Iterator[tuple[Path, bool]]:
    """(library, whether it is the installed one); those for this GPU first, then the newest first."""
    name = library_name()
    installed = PACKAGE / name
    if installed.exists():
        yield installed, True
    found = [path for path in cache_dir().glob(f"*/{name}") if "." not in path.parent.name]
    yield from ((path, False) for path in sorted(found, key=_preference, reverse=True))


def _preference(path: Path) -> tuple[bool, float]:
    info = BuildInfo.of_file(path)
    fits = False
    if info is not None and torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        fits = covers(info.archs, 10 * major + minor)
    return fits, path.stat().st_mtime


def _load(path: Path) -> ModuleType | str:
    """The module, or why it cannot be loaded."""
    name = "fastattn._C"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        return f"is not an extension module: {path}"
    try:
        made = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(made)
    except ImportError as error:
        return f"cannot be loaded: {error}"
    sys.modules[name] = made
    return made
