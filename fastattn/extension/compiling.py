"""One build: its plan, compiling the sources, each cached by content, and linking."""

from __future__ import annotations

import json
import os
import re
import sysconfig
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from .archs import archs_of, gencode
from .commands import BuildError, cxx, digest, locked, run, versions
from .info import MARKER, BuildInfo, abi_tag, sources_hash
from .toolkit import Toolkit, Torch

JOB_BYTES = 2 * 2**30  # memory of one compiler process at most
NVCC_FLAGS = (
    "-std=c++17",
    "-O3",
    "-DNDEBUG",
    "-lineinfo",
    "-Xptxas=-v",
    "-Xcompiler=-fPIC,-fvisibility=hidden",
)
CXX_FLAGS = ("-std=c++20", "-O2", "-DNDEBUG", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wno-unknown-pragmas")
LIBRARIES = ("c10", "c10_cuda", "torch_cpu", "torch_cuda", "torch", "torch_python")

Log = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Plan:
    """One build: sources, tools and targets. Equal plans give equal extensions."""

    csrc: Path
    toolkit: Toolkit
    torch: Torch
    archs: tuple[str, ...]  # as in TORCH_CUDA_ARCH_LIST

    def info(self) -> BuildInfo:
        """The build info that is written into the extension."""
        return BuildInfo(self.torch.version, self.torch.cuda, abi_tag(), self.archs, sources_hash(self.csrc))

    def key(self) -> str:
        """The name of the result: a hash of everything it depends on."""
        parts = [asdict(self.info()), self.toolkit.version, versions(self.toolkit.nvcc, cxx())]
        return digest(json.dumps([*parts, NVCC_FLAGS, CXX_FLAGS, self.torch.cxx11_abi]))


@dataclass(frozen=True, slots=True)
class Object:
    """One compiled source: its file, the compiler's output and the seconds it took."""

    source: str
    path: Path
    log: str
    seconds: float
    cached: bool


def sources(plan: Plan) -> list[Path]:
    """The sources to compile: host code, and the kernels that one of the architectures can run."""
    device = sorted((plan.csrc / "instantiations").glob("*.cu"))
    return [*sorted(plan.csrc.glob("*.cpp")), *(path for path in device if archs_of(path, plan.archs))]


def compile_all(
    plan: Plan, objects: Path, force: bool = False, log: Log = print, only: Sequence[Path] | None = None
) -> list[Object]:
    """Compile every source, or those in `only`, in parallel."""
    todo = sources(plan) if only is None else list(only)
    objects.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(jobs()) as pool:
        futures = [pool.submit(compile_one, plan, path, objects, force) for path in todo]
        done = []
        for number, future in enumerate(futures, 1):
            made = future.result()
            log(f"[{number}/{len(todo)}] {made.source}: {'kept' if made.cached else f'{made.seconds:.1f} s'}")
            done.append(made)
    return done


def compile_one(plan: Plan, source: Path, objects: Path, force: bool = False) -> Object:
    """Compile one source, unless the cache has the same text compiled in the same way."""
    name = source.relative_to(plan.csrc).as_posix()
    flags, includes = _flags(plan, source)
    compiler = plan.toolkit.nvcc if source.suffix == ".cu" else cxx()
    text = "\0".join(path.read_text("utf-8") for path in with_headers(source, plan.csrc))
    key = digest(json.dumps([flags, versions(compiler, cxx()), text, _tied(plan, source)]))[:32]
    path, record = objects / f"{key}.o", objects / f"{key}.json"
    with locked(objects / f"{key}.lock"):
        if path.exists() and record.exists() and not force:
            kept = json.loads(record.read_text("utf-8"))
            return Object(name, path, kept["log"], kept["seconds"], cached=True)
        partial = objects / f"{key}.partial.o"
        started = time.monotonic()
        said = run([compiler, *flags, *includes, "-c", str(source), "-o", str(partial)], f"compiling {name}")
        seconds = time.monotonic() - started
        record.write_text(json.dumps({"log": said, "seconds": seconds}), "utf-8")
        partial.replace(path)
    return Object(name, path, said, seconds, cached=False)


def link(plan: Plan, objects: Sequence[Object], target: Path, log: Log = print) -> None:
    """Link the extension, with its build info in it."""
    info = json.dumps(json.dumps(asdict(plan.info())))
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch) / "build_info.cpp"
        source.write_text(
            f'extern "C" const char fastattn_build_info[] = "{MARKER.decode()}" {info};\n', "utf-8"
        )
        folders = [f"{plan.torch.folder}/lib", f"{plan.toolkit.root}/lib64"]
        command = [cxx(), "-shared", "-fPIC", str(source), *(str(made.path) for made in objects)]
        command += [*(f"-L{folder}" for folder in folders), *(f"-l{name}" for name in LIBRARIES), "-lcudart"]
        run([*command, "-o", str(target)], "linking")
    log(f"linked {target.name}: {target.stat().st_size / 2**20:.1f} MiB")


def jobs() -> int:
    """The number of parallel compilers: MAX_JOBS, or as many as cores and memory allow."""
    wanted = os.environ.get("MAX_JOBS", "")
    if wanted:
        if not wanted.isdecimal() or int(wanted) < 1:
            raise BuildError(f"MAX_JOBS={wanted!r}: needs a whole number from 1 on")
        return int(wanted)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, _available_memory() // JOB_BYTES))


def _available_memory() -> int:
    try:
        text = Path("/proc/meminfo").read_text("utf-8")
    except OSError:
        return JOB_BYTES
    match = re.search(r"^MemAvailable:\s+(\d+) kB", text, re.MULTILINE)
    return int(match.group(1)) * 1024 if match else JOB_BYTES


def _flags(plan: Plan, source: Path) -> tuple[list[str], list[str]]:
    """(flags, include folders) of a source: kernels include csrc only, host code torch and Python too."""
    if source.suffix == ".cu":
        flags = [*NVCC_FLAGS, *(gencode(arch) for arch in archs_of(source, plan.archs))]
        return [*flags, *(["-ccbin", cxx()] if "CXX" in os.environ else [])], [f"-I{plan.csrc}"]
    folder = Path(plan.torch.folder) / "include"
    flags = [
        *CXX_FLAGS, "-DTORCH_EXTENSION_NAME=_C", f"-D_GLIBCXX_USE_CXX11_ABI={int(plan.torch.cxx11_abi)}",
        f"-DFASTATTN_SM90={int('9.0a' in plan.archs)}",
    ]  # fmt: skip
    outer = (
        folder,
        folder / "torch/csrc/api/include",
        plan.toolkit.root + "/include",
        sysconfig.get_path("include"),
    )
    return flags, [f"-I{plan.csrc}", *(f"-isystem{path}" for path in outer)]


def _tied(plan: Plan, source: Path) -> list[str]:
    """The dependencies of an object besides its text, compiler and flags; kernels do not depend on torch."""
    if source.suffix == ".cu":
        return [plan.toolkit.version]
    return [plan.toolkit.version, plan.torch.version, plan.torch.cuda, abi_tag()]


def with_headers(source: Path, csrc: Path) -> list[Path]:
    """A source and the headers of csrc that it includes, directly or not."""
    found, todo = [], [source]
    while todo:
        path = todo.pop()
        if path in found:
            continue
        found.append(path)
        for name in re.findall(r'^\s*#\s*include\s+"([^"]+)"', path.read_text("utf-8"), re.MULTILINE):
            choices = (path.parent / name, csrc / name)
            todo += [choice.resolve() for choice in choices if choice.exists()][:1]
    return found
