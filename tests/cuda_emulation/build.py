"""Builds kernels for the CPU emulation with g++ and calls them, with failures of the execution model as exceptions."""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Literal

import torch

ROOT = Path(__file__).resolve().parent.parent.parent
HERE = Path(__file__).resolve().parent
FLAGS = (
    "-O2",
    "-march=native",
    "-std=c++20",
    "-fPIC",
    "-shared",
    "-DFASTATTN_EMULATION",
    "-Wno-unknown-pragmas",
)
CSRC = ROOT / "csrc"
LANDINGS = ("eager", "lazy", "random")

Landing = Literal["eager", "lazy", "random"]


class EmulationError(Exception):
    """A kernel broke a rule of the execution model, or deadlocked."""


@cache
def cuda_include() -> Path | None:
    """A folder with cuda.h and vector_types.h: the CUDA toolkit's, or triton's; None without either."""
    folders = [Path(home) / "include" for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if home]
    triton = importlib.util.find_spec("triton")
    if triton and triton.origin:
        folders.append(Path(triton.origin).parent / "backends" / "nvidia" / "include")
    wanted = ("cuda.h", "vector_types.h", "vector_functions.h")
    return next((folder for folder in folders if all((folder / name).is_file() for name in wanted)), None)


def missing_tool() -> str | None:
    """The reason that kernels cannot be emulated on this machine, or None."""
    if shutil.which("g++") is None:
        return "needs g++"
    if cuda_include() is None:
        return "needs cuda.h, from a CUDA toolkit or triton"
    return None


class Library:
    """The entry points of one shared library: functions of pointers, int64_t and double, null or a message returned."""

    def __init__(self, path: Path) -> None:
        self._library = ctypes.CDLL(str(path))
        self._library.emulator_configure.argtypes = [
            ctypes.c_uint64,
            ctypes.c_int,
            ctypes.c_int,
            ctypes.c_int,
            ctypes.c_int,
        ]

    def __call__(
        self,
        name: str,
        *arguments: torch.Tensor | int | float | None,
        seed: int = 0,
        landing: Landing = "random",
        resident: int = 1,
        check: bool = True,
        starved: int = -1,
    ) -> None:
        """Calls entry point `name`; tensors are passed by address.

        `seed` draws the order of threads and blocks, `landing` says when asynchronous work completes, `resident` how
        many blocks are alive at once, `check` whether races are looked for, `starved` which thread of each block
        (below 1024) or which warp (from 1024 on) runs only when nothing else can. Raises EmulationError.
        """
        self._library.emulator_configure(seed, LANDINGS.index(landing), resident, int(check), starved)
        entry = self._library[name]
        entry.restype = ctypes.c_char_p
        message = entry(*map(_as_c, arguments))
        if message is not None:
            raise EmulationError(message.decode())


def _as_c(argument: torch.Tensor | int | float | None) -> ctypes.c_void_p | ctypes.c_int64 | ctypes.c_double:
    if argument is None:
        return ctypes.c_void_p(0)
    if isinstance(argument, torch.Tensor):
        return ctypes.c_void_p(argument.data_ptr())
    return ctypes.c_double(argument) if isinstance(argument, float) else ctypes.c_int64(argument)


INCLUDE = re.compile(rb'^\s*#include "([^"]+)"', re.MULTILINE)


def texts(source: Path, folders: tuple[Path, ...]) -> dict[Path, bytes]:
    """The text of `source` and of every file it includes by a quoted name, looked for beside it and in `folders`."""
    found: dict[Path, bytes] = {}
    todo = [source.resolve()]
    while todo:
        path = todo.pop()
        if path in found:
            continue
        found[path] = path.read_bytes()
        for name in INCLUDE.findall(found[path]):
            candidates = ((folder / name.decode()).resolve() for folder in (path.parent, *folders))
            todo += [next(filter(Path.is_file, candidates), path)]
    return found


def emulator_object(cache_folder: Path) -> Path:
    """The object file of the emulator, compiled once."""
    flags = (flag for flag in FLAGS if flag != "-shared")
    command = ["g++", *flags, "-isystem", str(cuda_include()), "-c"]
    return _compile(HERE / "emulator.cpp", (HERE,), command, cache_folder, ".o")


def build(source: Path, cache_folder: Path, defines: tuple[str, ...] = (), csrc: Path = CSRC) -> Library:
    """Compiles `source` to a library in `cache_folder`, unless the same text was compiled there before.

    `defines` are macros, "NAME" or "NAME=VALUE"; `csrc` is where the kernels are. Raises RuntimeError with the
    compiler's output.
    """
    folders = (HERE, csrc)
    flags = (*FLAGS, *(f"-D{macro}" for macro in defines), *(f"-I{folder}" for folder in folders))
    command = ["g++", *flags, "-isystem", str(cuda_include()), str(emulator_object(cache_folder))]
    return Library(_compile(source, folders, command, cache_folder, ".so"))


def _compile(
    source: Path, folders: tuple[Path, ...], command: list[str], cache_folder: Path, suffix: str
) -> Path:
    """The output of the command for `source`, named by a digest of all its inputs."""
    digest = hashlib.sha256("\0".join(word for word in command if not word.startswith("-I")).encode())
    for path, text in sorted(texts(source, folders).items()):
        digest.update(path.name.encode() + b"\0" + text)
    target = cache_folder / f"{source.stem}-{digest.hexdigest()[:16]}{suffix}"
    cache_folder.mkdir(parents=True, exist_ok=True)
    with open(target.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            partial = target.with_suffix(".partial")
            done = subprocess.run([*command, "-o", str(partial), str(source)], capture_output=True, text=True)
            if done.returncode != 0:
                raise RuntimeError(f"{' '.join(command)} {source}\n{done.stderr[-8000:]}")
            partial.replace(target)
    return target
