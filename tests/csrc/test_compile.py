"""nvcc compiles every kernel: none spills, Hopper's use wgmma, and there are as many as dispatch.h says."""

import re
from pathlib import Path

import pytest
from csrc.compile_report import Kernel, compile_kernels, disassembler, missing

from fastattn import build

CSRC = build.csrc_folder()


@pytest.fixture(scope="module")
def kernels() -> list[Kernel]:
    if reason := missing():
        pytest.skip(reason)
    return compile_kernels()[1]


@pytest.mark.exhaustive
@pytest.mark.timeout(900)
def test_nothing_spills(kernels: list[Kernel]) -> None:
    assert [kernel for kernel in kernels if kernel.spilled] == []
    assert {kernel.arch for kernel in kernels} == {"sm_80", "sm_90a"}
    assert all(0 < kernel.registers <= 255 for kernel in kernels)


@pytest.mark.exhaustive
@pytest.mark.timeout(900)
def test_matrix_products_of_hopper_are_wgmma_and_none_is_serialised(kernels: list[Kernel]) -> None:
    toolkit = build.find_toolkit()
    if toolkit is None or disassembler(toolkit) is None:
        pytest.skip("needs cuobjdump")
    products = [k for k in kernels if re.search(r"attention_(fwd|bwd_d)", k.name)]
    for kernel in products:
        assert kernel.arch == "sm_90a"
        assert kernel.wgmma > 0, kernel
        assert not [line for line in kernel.warnings if "wgmma" in line], kernel


@pytest.mark.exhaustive
@pytest.mark.timeout(900)
def test_dispatch_states_how_many_kernels_there_are(kernels: list[Kernel]) -> None:
    text = (CSRC / "dispatch.h").read_text(encoding="utf-8")
    families = {
        "softmax forward": "softmax_forward",
        "softmax backward": "softmax_backward",
        "cross-entropy": "cross_entropy",
        "attention forward": "attention_fwd",
        "attention backward": "attention_bwd",
    }
    for family, prefix in families.items():
        match = re.search(rf"^//   {family} [^=]*= +(\d+)$", text, re.MULTILINE)
        assert match is not None, family
        built = [k for k in kernels if k.arch == "sm_90a" and k.name.startswith(prefix)]
        assert len(built) == int(match.group(1)), family


def test_kernels_know_nothing_of_torch() -> None:
    for path in [*CSRC.rglob("*.cuh"), *CSRC.rglob("*.cu"), CSRC / "params.h", CSRC / "launch.h"]:
        includes = re.findall(r"#\s*include\s+[<\"](.+)[>\"]", path.read_text(encoding="utf-8"))
        assert not [name for name in includes if name.startswith(("torch", "ATen", "c10", "pybind"))], path


def test_special_instructions_stay_in_the_device_layer() -> None:
    """Else the emulation, which replaces that layer, could not run a kernel."""
    for path in (CSRC / "kernels").glob("*.cuh"):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"\basm\b|__shared__|threadIdx|blockIdx|__syncthreads|__shfl", text), path


def test_everything_that_is_compiled_is_installed() -> None:
    kinds = {path.suffix for path in CSRC.rglob("*") if path.is_file()}
    assert kinds == {".h", ".cpp", ".cuh", ".cu"}
    deepest = max(len(path.relative_to(CSRC).parts) for path in CSRC.rglob("*") if path.is_file())
    assert deepest == 2
    assert Path(CSRC / "bindings.cpp").exists()
