"""What the package declares and contains: metadata, the wheel, the sdist, and where the kernels import from."""

import email
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

import fastattn
import fastattn.kernels

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A wheel and an sdist of a copy of the tree, built by this environment's setuptools."""
    folder = tmp_path_factory.mktemp("build")
    tree = folder / "tree"
    leftovers = shutil.ignore_patterns(
        ".git", "build", "dist", "*.egg-info", "__pycache__", ".*_cache", ".hypothesis"
    )
    shutil.copytree(ROOT, tree, ignore=leftovers)
    for target in ("sdist", "wheel"):
        script = f"import sys; from setuptools import build_meta; build_meta.build_{target}(sys.argv[1])"
        command = [sys.executable, "-c", script, str(folder)]
        environment = {**os.environ, "FASTATTN_BUILD_CUDA": "0"}
        done = subprocess.run(command, cwd=tree, capture_output=True, text=True, timeout=120, env=environment)
        assert done.returncode == 0, done.stderr
    return {"wheel": next(folder.glob("*.whl")), "sdist": next(folder.glob("*.tar.gz"))}


def test_the_wheel_holds_the_package_and_nothing_else(built: dict[str, Path]) -> None:
    names = set(zipfile.ZipFile(built["wheel"]).namelist())
    version = importlib.metadata.version("fastattn")
    assert {name.split("/")[0] for name in names} == {"fastattn", f"fastattn-{version}.dist-info"}
    package = {
        f"fastattn/{p.relative_to(ROOT / 'fastattn').as_posix()}" for p in (ROOT / "fastattn").rglob("*.py")
    }
    kernels = {
        f"fastattn/kernels/{p.relative_to(ROOT / 'kernels').as_posix()}"
        for p in (ROOT / "kernels").rglob("*.py")
    }
    assert "fastattn/kernels/__init__.py" in kernels
    folder = ROOT / "benchmarks"
    benches = {f"fastattn/benchmarks/{p.relative_to(folder).as_posix()}" for p in folder.rglob("*.py")}
    assert {"fastattn/benchmarks/bench_attention.py", "fastattn/benchmarks/cases/attention.py"} <= benches
    sources = {
        f"fastattn/csrc/{p.relative_to(ROOT / 'csrc').as_posix()}"
        for p in (ROOT / "csrc").rglob("*")
        if p.suffix in (".h", ".cpp", ".cuh", ".cu")
    }
    page = {f"fastattn/serve/page_files/{name}" for name in ("index.html", "page.css", "page.js")}
    assert package | kernels | benches | sources | page | {"fastattn/py.typed"} == {
        name for name in names if name.startswith("fastattn/")
    }


def test_the_sdist_holds_what_tests_and_a_build_need(built: dict[str, Path]) -> None:
    with tarfile.open(built["sdist"]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    needed = {"pyproject.toml", "setup.py", "LICENSE", "README.md", "README.zh-CN.md", "CHANGELOG.md"}
    needed |= {"mkdocs.yml", "CONTRIBUTING.md"}
    for folder in ("docs", "examples"):
        files = (ROOT / folder).rglob("*.*")
        needed |= {p.relative_to(ROOT).as_posix() for p in files if "__pycache__" not in p.parts}
    needed |= {p.relative_to(ROOT).as_posix() for p in (ROOT / "kernels").rglob("*.py")}
    needed |= {p.relative_to(ROOT).as_posix() for p in (ROOT / "tests").rglob("*.py")}
    needed |= {p.relative_to(ROOT).as_posix() for p in (ROOT / "csrc").rglob("*.*")}
    needed |= {
        p.relative_to(ROOT).as_posix()
        for p in (ROOT / "tests" / "cuda_emulation").rglob("*.*")
        if "__" not in str(p)
    }
    assert needed <= names


def test_metadata(built: dict[str, Path]) -> None:
    wheel = zipfile.ZipFile(built["wheel"])
    text = wheel.read(next(n for n in wheel.namelist() if n.endswith("METADATA"))).decode()
    declared = email.message_from_string(text)
    required = [line for line in declared.get_all("Requires-Dist") if "extra ==" not in line]
    assert sorted(required) == ["numpy", "pyyaml", "rich", "safetensors", "tokenizers", "torch>=2.9", "typer"]
    assert declared["Requires-Python"] == ">=3.10"
    assert declared["License-Expression"] == "Apache-2.0"
    assert [limit for limit in required if "==" in limit or "<" in limit] == []
    bounded = {
        "torch",
        "transformers",
        "triton",
        "onnx",
        "onnxscript",
        "onnxruntime",
    }  # private names, formats
    extras = [line.partition(";")[0] for line in declared.get_all("Requires-Dist") if "extra ==" in line]
    assert {re.match(r"\w+", line)[0] for line in extras if "<" in line} == bounded


def test_the_version_has_one_home() -> None:
    version = re.search(
        r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert version is not None
    assert importlib.metadata.version("fastattn") == version.group(1)
    others = [
        p
        for p in (ROOT / "fastattn").rglob("*.py")
        if f'"{version.group(1)}"' in p.read_text(encoding="utf-8")
    ]
    assert others == []


def test_the_kernels_belong_to_the_package_that_is_imported() -> None:
    package = Path(fastattn.__file__).resolve().parent
    kernels = Path(fastattn.kernels.__file__).resolve().parent
    assert kernels in (package / "kernels", package.parent / "kernels")
    assert fastattn.kernels.__name__ == "fastattn.kernels"


@pytest.mark.parametrize(
    ("wanted", "code", "message"),
    [
        ("1", 1, "FASTATTN_BUILD_CUDA=1, but "),
        ("auto", 0, "without the CUDA extension: "),
        ("maybe", 1, "needs auto, 0 or 1"),
    ],
)
@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch could build the extension")
def test_a_torch_without_cuda_builds_nothing_and_says_so(
    tmp_path: Path, wanted: str, code: int, message: str
) -> None:
    command = [sys.executable, str(ROOT / "setup.py"), "-q", "build_ext", "--build-lib", str(tmp_path)]
    environment = {**os.environ, "FASTATTN_BUILD_CUDA": wanted}
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=120, env=environment, check=False
    )
    assert done.returncode == code, done.stderr
    assert message in done.stderr
    assert list(tmp_path.iterdir()) == []
