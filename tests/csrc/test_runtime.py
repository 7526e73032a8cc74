"""What host code asks of the CUDA runtime: once, and within a stream capture too."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from fastattn.extension.toolkit import find_toolkit

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
TOOLKIT = find_toolkit()
# What a capture refuses or is ended by, unless it is asked for under RelaxedCapture in runtime.h.
ONLY_IN_RUNTIME = (
    "cudaDeviceGetAttribute",
    "cudaGetDeviceProperties",
    "cudaFuncSetAttribute",
    "cudaFuncGetAttributes",
    "cudaGetDriverEntryPoint",
    "cudaOccupancy",
)
# What would wait for the device, or allocate behind the back of torch's allocator.
NOWHERE = (
    "Synchronize",
    "cudaMalloc",
    "cudaFree",
    "cudaMemcpy",
    "cudaMemset",
    "cudaEventQuery",
    "cudaStreamQuery",
)
CODE = re.compile(r"//[^\n]*")


@pytest.mark.skipif(TOOLKIT is None or shutil.which("g++") is None, reason="needs g++ and the CUDA headers")
@pytest.mark.parametrize("old", [False, True], ids=["as it is", "before CUDA 12.5"])
def test_runtime_calls(tmp_path: Path, old: bool) -> None:
    assert TOOLKIT is not None
    program = tmp_path / "runtime_calls"
    command = [
        "g++",
        "-std=c++17",
        "-O2",
        "-pthread",
        f"-I{CSRC}",
        f"-isystem{Path(TOOLKIT.root) / 'include'}",
    ]
    command += ["-DOLD_RUNTIME"] * old
    compiled = subprocess.run(
        [*command, str(HERE / "runtime_calls.cpp"), "-o", str(program)], capture_output=True, text=True
    )
    assert compiled.returncode == 0, compiled.stderr
    done = subprocess.run([str(program)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) > 0


def test_calls_that_a_capture_refuses_have_one_home() -> None:
    for path in sorted(CSRC.rglob("*")):
        if path.suffix not in (".h", ".cpp", ".cu", ".cuh"):
            continue
        text = CODE.sub("", path.read_text(encoding="utf-8"))
        refused = ONLY_IN_RUNTIME if path.name != "runtime.h" else ()
        called = [name for name in (*refused, *NOWHERE) if re.search(rf"{name}\w*\(", text)]
        assert not called, path.name
