"""nvcc compiles every kernel: none spills, Hopper's use wgmma, and there are as many as dispatch.h says."""

import re

import pytest
from csrc.compile_report import (
    SAMPLE,
    Kernel,
    RegisterPool,
    compile_kernels,
    disassembler,
    missing,
    pools_of,
    register_pools,
)

from fastattn.extension.info import csrc_folder
from fastattn.extension.toolkit import find_toolkit

CSRC = csrc_folder()


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
    toolkit = find_toolkit()
    if toolkit is None or disassembler(toolkit) is None:
        pytest.skip("needs cuobjdump")
    products = [k for k in kernels if re.search(r"attention_(fwd|bwd_d)", k.name)]
    assert products
    for kernel in products:
        assert kernel.arch == "sm_90a"
        assert kernel.wgmma > 0, kernel
        assert not [line for line in kernel.warnings if "wgmma" in line], kernel


@pytest.mark.timeout(900)
@pytest.mark.parametrize("names", [SAMPLE, pytest.param("", marks=pytest.mark.exhaustive, id="all")])
def test_warpgroups_ask_for_no_more_registers_than_their_block_has(names: str) -> None:
    """Else a consumer warpgroup waits for ever for registers that nobody gives up."""
    toolkit = find_toolkit()
    if (reason := missing()) or toolkit is None:
        pytest.skip(str(reason))
    if disassembler(toolkit) is None:
        pytest.skip("needs cuobjdump")
    objects, all_kernels = compile_kernels(names=names)
    pools = register_pools(objects, toolkit)
    assert {pool.name: mistake for pool in pools if (mistake := pool.mistake())} == {}
    producers = [
        k.name
        for k in all_kernels
        if re.search(r"attention_(fwd_sm90|bwd_(dkdv|dkdv_split|dq|fused)_kernel)", k.name)
    ]
    assert producers
    assert sorted(pool.name for pool in pools) == sorted(producers)


BUDGET = ("kThreads", "kMinBlocks", "kProducerRegisters", "kConsumerRegisters")


def test_every_shape_that_sets_registers_holds_them_to_its_pool() -> None:
    """A static_assert in the very struct: one of its base would not see what a derived shape changes."""
    found = []
    for path in (CSRC / "kernels").glob("*.cuh"):
        for name, body in re.findall(
            r"^struct (\w+)[^;{]*\{\n(.*?)^\};", path.read_text("utf-8"), re.M | re.S
        ):
            if re.search(rf"static constexpr int ({'|'.join(BUDGET)}) =", body):
                assert f"static_assert(registers_fit({', '.join(BUDGET)}));" in body, (path.name, name)
                found.append(name)
    assert sorted(found) == ["ForwardShape", "KeyGradientsShape", "QueryGradientShape"]


def test_warpgroups_reallocate_what_the_shape_says() -> None:
    """No kernel has numbers of its own, and its launch bounds are those of the budget."""
    kernels = 0
    for path in (CSRC / "kernels").glob("*.cuh"):
        text = path.read_text("utf-8")
        given = re.findall(r"(?:de|in)crease_registers<(.*?)>\(\)", text)
        assert set(given) <= {"Shape::kProducerRegisters", "Shape::kConsumerRegisters"}, path.name
        assert len(given) <= 2 * text.count("FASTATTN_LAUNCH_BOUNDS(Shape::kThreads, Shape::kMinBlocks)"), (
            path.name
        )
        kernels += len(given) // 2
    assert kernels == 5


DUMP = """
 Function kernel:
  REG:168 STACK:0 SHARED:1024 LOCAL:0
 Function plain:
  REG:40 STACK:0 SHARED:0 LOCAL:0
.nv.info.kernel
	Attribute:	EIATTR_MAX_THREADS
	Format:	EIFMT_SVAL
	Value:	0x180 0x1 0x1
.nv.info.plain
	Attribute:	EIATTR_MAX_THREADS
	Format:	EIFMT_SVAL
	Value:	0x100 0x1 0x1
		Function : kernel
        /*02a0*/                   USETMAXREG.TRY_ALLOC.CTAPOOL UP0, 0xf0 ;
        /*6b10*/                   USETMAXREG.DEALLOC.CTAPOOL 0x18 ;
		Function : plain
        /*0000*/                   EXIT ;
"""


def test_the_report_reads_registers_from_a_binary() -> None:
    assert pools_of(DUMP) == [RegisterPool("kernel", 168, 384, (24,), (240,))]


@pytest.mark.parametrize(
    ("pool", "word"),
    [
        (RegisterPool("", 168, 384, (24,), (240,)), None),
        (RegisterPool("", 128, 512, (32,), (160,)), None),
        (RegisterPool("", 168, 384, (32,), (240,)), "asks for 65536 registers of the 64512"),
        (RegisterPool("", 128, 384, (24,), (240,)), "asks for"),  # the assembler assigned fewer than it may
        (RegisterPool("", 168, 384, (24, 40), (240,)), "asks for"),
        (RegisterPool("", 168, 384, (24,), (160,)), "up from 168"),
        (RegisterPool("", 168, 384, (28,), (232,)), "multiples of 8"),
        (RegisterPool("", 168, 384, (), (168,)), "needs both"),
    ],
)
def test_a_pool_too_small_is_a_mistake(pool: RegisterPool, word: str | None) -> None:
    mistake = pool.mistake()
    assert mistake is None if word is None else mistake is not None and word in mistake


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
    paths = list((CSRC / "kernels").glob("*.cuh"))
    assert paths
    for path in paths:
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"\basm\b|__shared__|threadIdx|blockIdx|__syncthreads|__shfl", text), path
