"""Builds the CUDA extension: finds the toolkit, compiles csrc for the wanted GPUs, and keeps results by their content.

setup.py loads this file by its path, before the package can be imported, so it needs the standard library alone.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

MARKER = b"FASTATTN_BUILD_INFO="  # stands before the build info in a built extension
MIN_ARCH = 80
DEFAULT_ARCHS = (
    "8.0+PTX",
    "9.0a",
)  # where no GPU says better: every GPU from 8.0 on, and Hopper's own instructions
SM90_SUFFIX = "_sm90.cu"  # a source so named uses instructions of compute capability 9.0 alone
JOB_BYTES = 2 * 2**30  # what one compiler may take
DEFAULT_ROOTS = ("/usr/local/cuda",)  # where a toolkit is looked for after CUDA_HOME and PATH
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


class BuildError(RuntimeError):
    """The extension cannot be built; the message says why and what would help."""


@dataclass(frozen=True, slots=True)
class Toolkit:
    """A CUDA toolkit, confirmed by its headers."""

    nvcc: str
    root: str
    version: str  # of its headers, "13.0"


@dataclass(frozen=True, slots=True)
class Torch:
    """What the extension is tied to in a torch."""

    version: str
    cuda: str  # "13.0"
    folder: str
    cxx11_abi: bool
    device_archs: tuple[str, ...]  # of the GPUs it sees, "9.0"


@dataclass(frozen=True, slots=True)
class BuildInfo:
    """What a built extension was made from; it is written into the file."""

    torch: str
    cuda: str
    python: str  # ABI tag
    archs: tuple[str, ...]
    sources: str  # hash

    @classmethod
    def of_file(cls, path: Path) -> BuildInfo | None:
        """Read from an extension without loading it; None if there is none."""
        data = path.read_bytes()
        start = data.find(MARKER + b"{")
        if start < 0:
            return None
        text = data[start + len(MARKER) : data.index(b"\0", start)]
        fields: dict[str, Any] = json.loads(text)
        return cls(**{**fields, "archs": tuple(fields["archs"])})

    def mismatch(self, other: BuildInfo) -> str | None:
        """How this one, of a file, differs from what is here."""
        for name in ("torch", "cuda", "python"):
            built, here = getattr(self, name), getattr(other, name)
            if built != here:
                return f"built for {name} {built}, this is {here}"
        return None if self.sources == other.sources else "built from other sources than these"


@dataclass(frozen=True, slots=True)
class Plan:
    """One build: sources, tools and targets. Equal plans make equal extensions."""

    csrc: Path
    toolkit: Toolkit
    torch: Torch
    archs: tuple[str, ...]  # as in TORCH_CUDA_ARCH_LIST

    def info(self) -> BuildInfo:
        """What the extension will say of itself."""
        return BuildInfo(self.torch.version, self.torch.cuda, abi_tag(), self.archs, sources_hash(self.csrc))

    def key(self) -> str:
        """Names the result: a hash of everything it depends on."""
        parts = [asdict(self.info()), self.toolkit.version, _versions(self.toolkit.nvcc, _cxx())]
        return _digest(json.dumps([*parts, NVCC_FLAGS, CXX_FLAGS, self.torch.cxx11_abi]))


@dataclass(frozen=True, slots=True)
class Object:
    """One compiled source: its file, what the compiler said and the seconds it took."""

    source: str
    path: Path
    log: str
    seconds: float
    cached: bool


@dataclass(frozen=True, slots=True)
class Built:
    """What `fastattn build` made."""

    library: Path
    info: BuildInfo
    toolkit: Toolkit
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """The same as plain types, for JSON."""
        parts = asdict(self.info) | {"toolkit": asdict(self.toolkit)}
        return {"library": str(self.library), "seconds": round(self.seconds, 1), **parts}


def csrc_folder() -> Path:
    """The CUDA sources: beside the package in a checkout, inside it when installed."""
    here = Path(__file__).resolve().parent
    return here / "csrc" if (here / "csrc").is_dir() else here.parent / "csrc"


def abi_tag() -> str:
    """The Python a binary is for."""
    return str(sysconfig.get_config_var("SOABI") or sys.implementation.cache_tag)


def library_name() -> str:
    """The file name of the extension."""
    return "_C" + str(sysconfig.get_config_var("EXT_SUFFIX") or ".so")


def sources_hash(csrc: Path) -> str:
    """A hash of every file of csrc."""
    files = sorted(p for p in csrc.rglob("*") if p.suffix in (".cpp", ".cu", ".cuh", ".h"))
    return _digest("\0".join(f"{p.relative_to(csrc).as_posix()}\0{p.read_text('utf-8')}" for p in files))


def find_torch() -> Torch:
    """The torch to build for: that of this process, or of the environment pip installs into.

    pip builds with the target's interpreter and only hides its packages; other tools build elsewhere.
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
        bool(torch._C._GLIBCXX_USE_CXX11_ABI), tuple(archs),
    )  # fmt: skip


def find_toolkit() -> Toolkit | None:
    """The CUDA toolkit: CUDA_HOME's, that of nvcc on PATH, or one in a usual place. A root without headers is none."""
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


def make_plan(arch_list: str | None = None, csrc: Path | None = None) -> Plan:
    """What a build here would do, or a BuildError that says why there can be none."""
    if not sys.platform.startswith("linux"):
        raise BuildError(f"the CUDA extension builds on Linux, this is {sys.platform}")
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
            f" {torch.cuda.split('.')[0]}.x; set CUDA_HOME to one that fits"
        )
    wanted = arch_list or os.environ.get("TORCH_CUDA_ARCH_LIST") or ";".join(torch.device_archs)
    return Plan(csrc, toolkit, torch, parse_archs(wanted) if wanted else DEFAULT_ARCHS)


def parse_archs(text: str) -> tuple[str, ...]:
    """TORCH_CUDA_ARCH_LIST as a tuple; 9.0 becomes 9.0a, whose code is Hopper's own."""
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


def build(plan: Plan, cache: Path, force: bool = False, log: Log = print) -> Path:
    """The extension of a plan, from the cache if it is there; one process builds, others wait for it."""
    folder = cache / plan.key()[:32]
    library = folder / library_name()
    cache.mkdir(parents=True, exist_ok=True)
    with _locked(cache / f"{folder.name}.lock"):
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
    """The extension for this torch in the cache, compiled if it is not there."""
    started = time.monotonic()
    plan = make_plan(arch_list)
    log(
        f"torch {plan.torch.version}, CUDA {plan.toolkit.version} in {plan.toolkit.root}, for {', '.join(plan.archs)}"
    )
    library = build(plan, cache, force=force, log=log)
    return Built(library, plan.info(), plan.toolkit, time.monotonic() - started)


def sources(plan: Plan) -> list[Path]:
    """What is compiled: host code, and the kernels that some wanted architecture can run."""
    device = sorted((plan.csrc / "instantiations").glob("*.cu"))
    return [*sorted(plan.csrc.glob("*.cpp")), *(path for path in device if _archs_of(path, plan.archs))]


def compile_all(
    plan: Plan, objects: Path, force: bool = False, log: Log = print, only: Sequence[Path] | None = None
) -> list[Object]:
    """Every source, or `only` some, compiled, several at once."""
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
    """One source compiled, unless the same text was compiled in the same way before."""
    name = source.relative_to(plan.csrc).as_posix()
    flags, includes = _flags(plan, source)
    compiler = plan.toolkit.nvcc if source.suffix == ".cu" else _cxx()
    text = "\0".join(path.read_text("utf-8") for path in with_headers(source, plan.csrc))
    key = _digest(json.dumps([flags, _versions(compiler, _cxx()), text, _tied(plan, source)]))[:32]
    path, record = objects / f"{key}.o", objects / f"{key}.json"
    with _locked(objects / f"{key}.lock"):
        if path.exists() and record.exists() and not force:
            kept = json.loads(record.read_text("utf-8"))
            return Object(name, path, kept["log"], kept["seconds"], cached=True)
        partial = objects / f"{key}.partial.o"
        started = time.monotonic()
        said = _run([compiler, *flags, *includes, "-c", str(source), "-o", str(partial)], f"compiling {name}")
        seconds = time.monotonic() - started
        record.write_text(json.dumps({"log": said, "seconds": seconds}), "utf-8")
        partial.replace(path)
    return Object(name, path, said, seconds, cached=False)


def link(plan: Plan, objects: Sequence[Object], target: Path, log: Log = print) -> None:
    """The extension, with its build info inside."""
    info = json.dumps(json.dumps(asdict(plan.info())))
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch) / "build_info.cpp"
        source.write_text(
            f'extern "C" const char fastattn_build_info[] = "{MARKER.decode()}" {info};\n', "utf-8"
        )
        folders = [f"{plan.torch.folder}/lib", f"{plan.toolkit.root}/lib64"]
        command = [_cxx(), "-shared", "-fPIC", str(source), *(str(made.path) for made in objects)]
        command += [*(f"-L{folder}" for folder in folders), *(f"-l{name}" for name in LIBRARIES), "-lcudart"]
        _run([*command, "-o", str(target)], "linking")
    log(f"linked {target.name}: {target.stat().st_size / 2**20:.1f} MiB")


def jobs() -> int:
    """Compilers at once: MAX_JOBS, or as many as there are cores and memory for."""
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


def _archs_of(source: Path, archs: Sequence[str]) -> list[str]:
    """The architectures a source is compiled for."""
    return [arch for arch in archs if arch == "9.0a" or not source.name.endswith(SM90_SUFFIX)]


def _flags(plan: Plan, source: Path) -> tuple[list[str], list[str]]:
    """(flags, include folders) of a source: kernels see csrc alone, host code torch and Python too."""
    if source.suffix == ".cu":
        flags = [*NVCC_FLAGS, *(_gencode(arch) for arch in _archs_of(source, plan.archs))]
        return [*flags, *(["-ccbin", _cxx()] if "CXX" in os.environ else [])], [f"-I{plan.csrc}"]
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


def _gencode(arch: str) -> str:
    number = re.sub(r"\.|\+PTX", "", arch)
    code = f"[sm_{number},compute_{number}]" if arch.endswith("+PTX") else f"sm_{number}"
    return f"-gencode=arch=compute_{number},code={code}"


def _tied(plan: Plan, source: Path) -> list[str]:
    """What an object depends on beside its text, compiler and flags: kernels know nothing of torch."""
    if source.suffix == ".cu":
        return [plan.toolkit.version]
    return [plan.toolkit.version, plan.torch.version, plan.torch.cuda, abi_tag()]


def with_headers(source: Path, csrc: Path) -> list[Path]:
    """A source and the headers of csrc it reaches."""
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


def _cxx() -> str:
    return os.environ.get("CXX", "g++")


def _root_of(nvcc: str) -> Path:
    """Where a compiler lives: it is asked, since the one on PATH may be a script that starts another."""
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


def _versions(*compilers: str) -> list[str]:
    return [_run([compiler, "--version"], f"asking {compiler} for its version") for compiler in compilers]


def _run(command: Sequence[str], what: str) -> str:
    """The output of a command; a failure raises with it."""
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
        )
    except OSError as error:
        raise BuildError(f"{what} failed: {error}") from None
    if done.returncode:
        raise BuildError(f"{what} failed:\n{' '.join(command)}\n{done.stdout}")
    return done.stdout


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Held by one process at a time, and given back even if it dies."""
    import fcntl

    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
