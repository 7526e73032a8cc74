"""The whole extension on a CPU: the host code and bindings of csrc over launches that the emulation runs."""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import importlib.util
import os
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import torch
from cuda_emulation.build import FLAGS, HERE, LANDINGS, ROOT, Landing, cuda_include, texts

NAME = "emulated_extension"
SOURCES = (
    *sorted((ROOT / "csrc").glob("*.cpp")),
    *sorted(HERE.glob("*_launches.cpp")),
    HERE / "emulator.cpp",
    HERE / "stubs" / "runtime.cpp",
)


class EmulatedExtension:
    """The extension module, and the options of its emulated launches."""

    def __init__(self, module: ModuleType, path: Path) -> None:
        self.module = module
        self.path = path
        self._library = ctypes.CDLL(str(path))

    def configure(self, *, seed: int = 0, landing: Landing = "random", arch: int = 90) -> None:
        """Draw the order of threads from `seed`, and emulate a GPU of compute capability `arch`."""
        configure = self._library.emulator_configure
        configure.argtypes = [ctypes.c_uint64, *[ctypes.c_int] * 4]
        configure(seed, LANDINGS.index(landing), 1, 1, -1)
        self._library.emulate_compute_capability(arch)

    def last_forward_cluster(self) -> int:
        """The cluster size, in blocks, of the last attention forward."""
        return int(self._library.last_forward_cluster())

    def capture(self, active: bool) -> None:
        """Start or stop refusing the calls that a CUDA graph capture in progress does not permit."""
        self._library.emulate_capture(int(active))


def build(folder: Path) -> EmulatedExtension:
    """Compiles the extension into `folder`, source by source, unless the same text was compiled there before."""
    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(min(len(os.sched_getaffinity(0)), 4)) as pool:
        objects = list(pool.map(lambda source: _compile(source, folder), SOURCES))
    digest = hashlib.sha256("".join(path.name for path in objects).encode()).hexdigest()[:16]
    path = folder / f"{NAME}-{digest}.so"
    libraries = Path(torch.__file__).parent / "lib"
    names = ("c10", "torch_cpu", "torch", "torch_python")
    _once(
        path,
        [
            "g++",
            "-shared",
            "-Wl,-z,lazy",
            "-Wl,-Bsymbolic",  # a CUDA build of torch has loaded the real runtime, of the same names
            *map(str, objects),
            f"-L{libraries}",
            *(f"-l{name}" for name in names),
        ],
    )
    spec = importlib.util.spec_from_file_location(NAME, path)
    assert spec is not None
    assert spec.loader is not None
    flags = sys.getdlopenflags()
    sys.setdlopenflags(os.RTLD_LAZY)  # ops whose launches are not emulated are missed only if they are called
    try:
        module = importlib.util.module_from_spec(spec)
    finally:
        sys.setdlopenflags(flags)
    spec.loader.exec_module(module)
    return EmulatedExtension(module, path)


def _compile(source: Path, folder: Path) -> Path:
    include = Path(torch.__file__).parent / "include"
    system = (include, include / "torch/csrc/api/include", sysconfig.get_path("include"), cuda_include())
    host = source.parent == ROOT / "csrc"  # not optimised: it takes no time to run, and compiles faster so
    flags = ["-O0" if host and flag == "-O2" else flag for flag in FLAGS if flag != "-shared"]
    flags += [f"-DTORCH_EXTENSION_NAME={NAME}", "-DFASTATTN_SM90=1", "-Wno-attributes"]
    flags += [f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}"]
    own = (HERE / "stubs", ROOT / "csrc", HERE, ROOT)
    paths = [*(f"-I{path}" for path in own), *(f"-isystem{path}" for path in system)]
    digest = hashlib.sha256(repr((flags, torch.__version__)).encode())
    for path, text in sorted(texts(source, own).items()):
        digest.update(path.name.encode() + b"\0" + text)
    target = folder / f"{source.stem}-{digest.hexdigest()[:16]}.o"
    _once(target, ["g++", *flags, *paths, "-c", str(source)])
    return target


def _once(target: Path, command: list[str]) -> None:
    """Runs a command that makes `target`, in one process at a time, unless `target` exists."""
    with open(target.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if target.exists():
            return
        partial = target.with_suffix(".partial")
        done = subprocess.run([*command, "-o", str(partial)], capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(command)}\n{done.stderr[-8000:]}")
        partial.replace(target)
