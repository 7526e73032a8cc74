"""Softmax and loss kernels issue no more instructions than the bytes they move leave time for, and divide by shifts."""

from __future__ import annotations

import pytest
from csrc.compile_report import Kernel, compile_kernels, disassembler, missing
from csrc.row_instructions import A100, H100, H200, SOURCES, RowKernel, row_kernels

from fastattn.extension.toolkit import find_toolkit
from fastattn.tune.cycles.machine import REGISTERS
from fastattn.tune.cycles.sass import Function, Instruction

pytestmark = pytest.mark.timeout(900)
REGISTER_UNIT = 8  # a thread gets a multiple of these
PLAIN_LIMIT = 21.0  # instructions for an element: about 20, as they were designed
CLUSTER_BLOCK = 512  # threads of a block whose row belongs to a cluster, and of one of 8192 columns or 16384


def compiled(names: str) -> list[RowKernel]:
    toolkit = find_toolkit()
    if (reason := missing()) or toolkit is None:
        pytest.skip(str(reason))
    if disassembler(toolkit) is None:
        pytest.skip("needs cuobjdump")
    return row_kernels(names)


@pytest.fixture(scope="module")
def kernels() -> list[RowKernel]:
    """All of them."""
    return compiled(SOURCES)


@pytest.fixture(
    scope="module", params=["cross_entropy", pytest.param(SOURCES, marks=pytest.mark.exhaustive, id="all")]
)
def some(request: pytest.FixtureRequest) -> list[RowKernel]:
    """Those of the losses, or all."""
    return compiled(request.param)


def is_general_where_a_plain_one_is(kernel: RowKernel) -> bool:
    """The forward with 16-bit input and result, for calls with a mask, causality or a logarithm."""
    return kernel.family == "softmax_forward" and kernel.bytes == 4 and not kernel.kind.startswith("plain")


def test_instructions_take_less_time_than_bytes(some: list[RowKernel]) -> None:
    """On an A100 and an H100 all of them, on an H200 those of calls that have no faster kernel."""
    assert {kernel.arch for kernel in some} == {A100.arch, H100.arch}
    for kernel in some:
        device = A100 if kernel.arch == A100.arch else H100
        if kernel.arch == H200.arch and not is_general_where_a_plain_one_is(kernel):
            device = H200
        assert 0 < kernel.instructions() <= device.budget(kernel.bytes), (kernel.name, device.name)


@pytest.mark.exhaustive
def test_plain_kernels_issue_about_twenty_instructions_for_an_element(kernels: list[RowKernel]) -> None:
    """Whichever holds the row; what bytes leave time for on an H200 is a quarter more."""
    plain = [kernel for kernel in kernels if kernel.kind.startswith("plain")]
    assert {kernel.held for kernel in plain} == {0, 8, 16, 32}
    assert {
        kernel.name: kernel.instructions() for kernel in plain if kernel.instructions() > PLAIN_LIMIT
    } == {}


@pytest.mark.exhaustive
def test_there_is_a_plain_kernel_for_every_general_one_that_an_h200_outruns(kernels: list[RowKernel]) -> None:
    hopper = [kernel for kernel in kernels if kernel.arch == H200.arch]
    plain = {(kernel.types, kernel.held) for kernel in hopper if kernel.kind.startswith("plain")}
    general = {(kernel.types, kernel.held) for kernel in hopper if is_general_where_a_plain_one_is(kernel)}
    assert plain == general
    assert len(plain) == 8


def test_no_kernel_divides_integers(some: list[RowKernel]) -> None:
    """By numbers that only the launch knows: of lanes, warps, blocks, rows, parts of a row."""
    assert {kernel.name: found for kernel in some if (found := kernel.divisions())} == {}


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("CALL.REL.NOINC `($__internal_0_$__cuda_sm20_div_s64)", True),
        ("CALL.REL.NOINC `($__internal_1_$__cuda_sm20_rem_u64)", True),
        ("CALL.REL.NOINC `($__internal_2_$__cuda_sm3x_div_rn_noftz_f32_slowpath)", False),
        ("I2F.U32.RP R4, R2", True),
        ("I2F.RP R4, R2", True),
        ("I2F.S64 R4, R2", False),
    ],
)
def test_a_division_is_seen(text: str, found: bool) -> None:
    function = Function("", (Instruction(text.split()[0], text),), {})
    assert bool(RowKernel("", "", "", (), 0, function).divisions()) == found


@pytest.mark.exhaustive
def test_two_blocks_of_512_threads_fit_a_multiprocessor(kernels: list[RowKernel]) -> None:
    """Of the kernels whose rows have such blocks (csrc/row_plan.h): all with 16 elements in a thread, or more."""
    reports: list[Kernel] = compile_kernels(names=SOURCES)[1]
    held = [
        k for k in reports if k.name.startswith("softmax") and k.name.endswith((", 16, 1024>", ", 32, 1024>"))
    ]
    assert len(held) == len([kernel for kernel in kernels if kernel.held > 8])
    for kernel in held:
        registers = -(-kernel.registers // REGISTER_UNIT) * REGISTER_UNIT
        assert registers * CLUSTER_BLOCK * 2 <= REGISTERS, kernel.name
