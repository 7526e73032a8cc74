"""The build of the CUDA extension: what it depends on, what it refuses and how it is kept."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from fastattn import extension
from fastattn.extension.archs import DEFAULT_ARCHS, covers, parse_archs
from fastattn.extension.build import build, make_plan
from fastattn.extension.commands import BuildError
from fastattn.extension.compiling import JOB_BYTES, Plan, jobs, sources
from fastattn.extension.info import MARKER, BuildInfo, abi_tag, library_name
from fastattn.extension.toolkit import Toolkit, Torch, find_toolkit

ROOT = Path(__file__).resolve().parent.parent


def fake_toolkit(folder: Path, version: int = 13000, *, headers: bool = True) -> Path:
    """A folder that looks like a CUDA toolkit, whose nvcc writes its arguments to the file it is to make."""
    (folder / "bin").mkdir(parents=True)
    (folder / "include").mkdir()
    if headers:
        (folder / "include" / "cuda.h").write_text(f"#define CUDA_VERSION {version}\n")
    return script(folder / "bin" / "nvcc", folder)


def script(path: Path, top: Path) -> Path:
    """A compiler: asked for its version or its root it answers, else it counts its calls and makes its output."""
    path.write_text(
        "#!/bin/sh\n"
        'case "$1" in\n'
        '--version) echo "a compiler, release 13.0";;\n'
        f'--dryrun) echo "#$ TOP={top}/bin/.." >&2;;\n'
        "*)\n"
        f'echo call >> "{path}.calls"\n'
        'for word; do test "$last" = -o && echo made > "$word"; last=$word; done\n'
        'test -z "$FAIL_COMPILING" || { echo "error: made to fail"; exit 1; }\n'
        ";;\n"
        "esac\n"
    )
    path.chmod(0o755)
    return path


def calls(compiler: Path) -> int:
    log = Path(f"{compiler}.calls")
    return len(log.read_text().splitlines()) if log.exists() else 0


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Plan:
    """A build of three small sources with compilers that are scripts."""
    nvcc = fake_toolkit(tmp_path / "toolkit")
    monkeypatch.setenv("CXX", str(script(tmp_path / "g++", tmp_path)))
    csrc = tmp_path / "csrc"
    (csrc / "instantiations").mkdir(parents=True)
    (csrc / "kernels").mkdir()
    (csrc / "bindings.cpp").write_text('#include "api.h"\n')
    (csrc / "api.h").write_text("\n")
    (csrc / "kernels" / "rows.cuh").write_text("\n")
    (csrc / "instantiations" / "rows.cu").write_text('#include "kernels/rows.cuh"\n')
    (csrc / "instantiations" / "tiles_sm90.cu").write_text("\n")
    toolkit = Toolkit(str(nvcc), str(tmp_path / "toolkit"), "13.0")
    return Plan(csrc, toolkit, Torch("2.11.0", "13.0", "torch", True, ()), ("8.0", "9.0a"))


def quiet(_: str) -> None:
    pass


def test_architectures() -> None:
    assert parse_archs("8.0;9.0") == ("8.0", "9.0a")
    assert parse_archs(" 8.0+PTX 8.6, 9.0a;9.0 ") == ("8.0+PTX", "8.6", "9.0a")
    assert parse_archs("10.0a;12.0") == ("10.0a", "12.0")
    for wrong in ("Hopper", "7.5", "90", "8.0;sm_90"):
        with pytest.raises(BuildError, match="architecture '"):
            parse_archs(wrong)


def test_what_code_runs_where() -> None:
    assert covers(["8.0"], 80)
    assert covers(["8.0"], 86)
    assert not covers(["8.6"], 80)
    assert not covers(["8.0"], 90)
    assert covers(["8.0+PTX"], 90)
    assert covers(["9.0a"], 90)
    assert not covers(["9.0a"], 100)
    assert not covers([], 90)


def test_a_build_is_kept_by_content(plan: Plan, tmp_path: Path) -> None:
    cache, nvcc, cxx = tmp_path / "cache", Path(plan.toolkit.nvcc), tmp_path / "g++"
    library = build(plan, cache, log=quiet)
    assert library.read_text() == "made\n"
    assert (calls(nvcc), calls(cxx)) == (2, 2)  # two kernels; host code and the link
    assert build(plan, cache, log=quiet) == library
    assert (calls(nvcc), calls(cxx)) == (2, 2)
    other_torch = replace(plan, torch=replace(plan.torch, version="2.12.0"))
    assert build(other_torch, cache, log=quiet) != library
    assert (calls(nvcc), calls(cxx)) == (2, 4)  # kernels know nothing of torch
    (plan.csrc / "kernels" / "rows.cuh").write_text("// changed\n")
    build(plan, cache, log=quiet)
    assert (calls(nvcc), calls(cxx)) == (3, 5)  # the one that includes it
    build(plan, cache, force=True, log=quiet)
    assert calls(nvcc) == 5
    leftovers = [p.name for p in cache.rglob("*") if "partial" in p.name or p.name.count(".") > 3]
    assert leftovers == []


def test_everything_a_result_depends_on_is_in_its_key(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    variants = [
        plan,
        replace(plan, archs=("8.0",)),
        replace(plan, torch=replace(plan.torch, version="2.12.0")),
        replace(plan, torch=replace(plan.torch, cuda="13.1")),
        replace(plan, torch=replace(plan.torch, cxx11_abi=False)),
        replace(plan, toolkit=replace(plan.toolkit, version="13.1")),
    ]
    keys = {variant.key() for variant in variants}
    assert len(keys) == len(variants)
    monkeypatch.setattr("fastattn.extension.compiling.NVCC_FLAGS", ("-O1",))
    assert plan.key() not in keys
    monkeypatch.undo()


def test_hopper_sources_need_hopper(plan: Plan) -> None:
    assert [p.name for p in sources(plan)] == ["bindings.cpp", "rows.cu", "tiles_sm90.cu"]
    assert [p.name for p in sources(replace(plan, archs=("8.0",)))] == ["bindings.cpp", "rows.cu"]


def test_a_failing_compiler_is_shown_and_leaves_nothing(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAIL_COMPILING", "1")
    with pytest.raises(BuildError, match=r"compiling .* failed:[\s\S]*error: made to fail"):
        build(plan, tmp_path / "cache", log=quiet)
    monkeypatch.delenv("FAIL_COMPILING")
    assert list((tmp_path / "cache").glob(f"*/{library_name()}")) == []
    assert build(plan, tmp_path / "cache", log=quiet).exists()


def test_the_toolkit_is_confirmed_by_its_headers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastattn.extension.toolkit.DEFAULT_ROOTS", ())
    monkeypatch.delenv("CUDA_PATH", raising=False)
    good, bare = tmp_path / "good", tmp_path / "bare"
    fake_toolkit(good, 12090)
    fake_toolkit(bare, headers=False)
    (tmp_path / "path").mkdir()
    script(tmp_path / "path" / "nvcc", good)
    monkeypatch.setenv("PATH", f"{tmp_path / 'path'}:/usr/bin:/bin")
    monkeypatch.setenv("CUDA_HOME", str(bare))
    expected = Toolkit(str(good / "bin" / "nvcc"), str(good), "12.9")
    assert find_toolkit() == expected  # CUDA_HOME has no headers; nvcc on PATH says where it lives
    monkeypatch.setenv("CUDA_HOME", str(good))
    assert find_toolkit() == expected
    monkeypatch.delenv("CUDA_HOME")
    monkeypatch.setenv("PATH", "/nowhere")
    assert find_toolkit() is None


def test_a_plan_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    cuda = Torch("2.11.0", "13.0", "torch", True, ())
    monkeypatch.setattr("fastattn.extension.build.find_torch", lambda: cuda)
    monkeypatch.setattr("fastattn.extension.build.find_toolkit", lambda: None)
    with pytest.raises(BuildError, match="set CUDA_HOME"):
        make_plan()
    monkeypatch.setattr("fastattn.extension.build.find_toolkit", lambda: Toolkit("nvcc", "/cuda", "12.9"))
    with pytest.raises(BuildError, match=r"is 12\.9, torch 2\.11\.0 needs 13\.x"):
        make_plan()
    monkeypatch.setattr("fastattn.extension.build.find_toolkit", lambda: Toolkit("nvcc", "/cuda", "13.1"))
    assert make_plan().archs == DEFAULT_ARCHS
    assert make_plan("8.6").archs == ("8.6",)
    monkeypatch.setattr("fastattn.extension.build.find_torch", lambda: replace(cuda, device_archs=("9.0",)))
    assert make_plan().archs == ("9.0a",)
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0 9.0+PTX")
    assert make_plan().archs == ("8.0", "9.0a")
    with pytest.raises(BuildError, match="the CUDA sources are missing"):
        make_plan(csrc=tmp_path)


def test_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAX_JOBS", "3")
    assert jobs() == 3
    monkeypatch.setenv("MAX_JOBS", "many")
    with pytest.raises(BuildError, match="MAX_JOBS='many': needs a whole number"):
        jobs()
    monkeypatch.delenv("MAX_JOBS")
    monkeypatch.setattr("fastattn.extension.compiling._available_memory", lambda: JOB_BYTES // 2)
    assert jobs() == 1


def built(path: Path, info: BuildInfo) -> Path:
    """A file that carries build info, and is no library."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({name: getattr(info, name) for name in info.__slots__})
    path.write_bytes(b"\x7fELF" + MARKER + text.encode() + b"\0rest")
    return path


INFO = BuildInfo("2.11.0", "13.0", abi_tag(), ("9.0a",), "hash")


def test_build_info_is_read_from_the_file(tmp_path: Path) -> None:
    assert BuildInfo.of_file(built(tmp_path / "_C.so", INFO)) == INFO
    (tmp_path / "other.so").write_bytes(b"\x7fELF and nothing else")
    assert BuildInfo.of_file(tmp_path / "other.so") is None
    assert INFO.mismatch(INFO) is None
    assert replace(INFO, archs=("8.0",)).mismatch(INFO) is None
    assert replace(INFO, torch="2.12.0").mismatch(INFO) == "built for torch 2.12.0, this is 2.11.0"
    assert replace(INFO, sources="x").mismatch(INFO) == "built from other sources"


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A process with a CUDA torch, an empty cache and a package folder of its own."""
    monkeypatch.setattr("torch.version.cuda", "13.0")
    monkeypatch.setattr("fastattn.extension.load.info_here", lambda: INFO)
    monkeypatch.setattr("fastattn.extension.load.PACKAGE", tmp_path / "package")
    monkeypatch.setenv("FASTATTN_CACHE_DIR", str(tmp_path / "cache"))
    extension.state.cache_clear()
    yield tmp_path
    extension.state.cache_clear()


def test_no_extension_is_a_reason_and_no_warning(environment: Path, recwarn: pytest.WarningsRecorder) -> None:
    assert (
        extension.state().reason == "the extension is not built on this machine; `fastattn build` builds it"
    )
    with pytest.raises(RuntimeError, match="not built on this machine"):
        extension.module()
    built(environment / "cache" / "key" / library_name(), replace(INFO, torch="2.9.0"))
    extension.state.cache_clear()
    assert extension.state().module is None  # what was built for others is theirs
    assert not recwarn.list


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"torch": "2.9.0"}, "does not match: built for torch 2.9.0, this is 2.11.0"),
        ({"python": "other"}, "does not match: built for python other"),
        ({"sources": "older"}, "does not match: built from other sources"),
        ({}, "the extension cannot be loaded"),
    ],
)
def test_an_installed_extension_that_does_not_fit_warns_once(
    environment: Path, change: dict[str, str], why: str
) -> None:
    built(environment / "package" / library_name(), replace(INFO, **change))
    with pytest.warns(RuntimeWarning, match=f"{why}.*fastattn build") as seen:
        found = extension.state()
    assert why in str(found.reason)
    assert extension.state().module is None
    assert len(seen) == 1


def test_a_torch_without_cuda_needs_no_search(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.version.cuda", None)
    extension.state.cache_clear()
    assert "is built without CUDA" in str(extension.state().reason)
    extension.state.cache_clear()


def test_what_setup_py_loads_needs_only_the_standard_library() -> None:
    """setup.py loads it where there is neither torch nor fastattn."""
    script = (
        "import json, runpy, sys; sys.argv = ['setup.py', '--version']; sys.modules['torch'] = None;"
        "import setuptools; setuptools.setup = lambda **_: None; before = set(sys.modules);"
        "runpy.run_path('setup.py'); print(json.dumps(sorted(set(sys.modules) - before)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    loaded = json.loads(done.stdout)
    assert "fastattn_extension.build" in loaded
    others = {name.split(".")[0] for name in loaded if not name.startswith(("setuptools", "_sysconfigdata"))}
    assert others - {"fastattn_extension"} <= sys.stdlib_module_names
