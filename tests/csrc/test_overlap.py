"""What the assembler made of the attention loops: the softmax lies where the tensor cores are busy."""

import re
import subprocess
from typing import NamedTuple

import pytest
from csrc.compile_report import SAMPLE, compile_kernels, disassembler, missing

from fastattn.extension.toolkit import find_toolkit

SHAPE = re.compile(r"attention_fwd_sm90INS_12ForwardShapeI\S*?Li(\d+)ELi(\d+)ELi(\d+)ELb([01])ELi(\d+)E")
ONE_PRODUCT_LEFT = "WARPGROUP.DEPBAR.LE gsb0, 0x1"
NONE_LEFT = "WARPGROUP.DEPBAR.LE gsb0, 0x0"
BACKWARD = {  # kernel: its shape; a thread has half as many exponentials as the last number
    "attention_bwd_dkdv_kernel": re.compile(r"KeyGradientsShapeI\S*?Li(\d+)ELi(\d+)ELi(\d+)E"),
    "attention_bwd_dq_kernel": re.compile(r"QueryGradientShapeI\S*?Li(\d+)ELi(\d+)ELi(\d+)E"),
    "attention_bwd_fused_kernel": re.compile(r"FusedGradientsShapeI\S*?Li(\d+)ELi(\d+)ELi(\d+)E"),
}
pytestmark = pytest.mark.timeout(900)


class Count(NamedTuple):
    """Kernels of one selection of sources."""

    forward: int
    clustered: int  # of the forward
    with_dp: int  # of the backward, with an overlap to look for
    with_maps: int  # of both directions


@pytest.fixture(
    scope="module", params=[SAMPLE, pytest.param("attention_", marks=pytest.mark.exhaustive, id="all")]
)
def names(request: pytest.FixtureRequest) -> str:
    """Which sources are compiled: those of one dtype and head dim, or all."""
    return str(request.param)


@pytest.fixture(scope="module")
def count(names: str) -> Count:
    """The kernels that these sources have."""
    return Count(4, 1, 5, 4 + 5) if names == SAMPLE else Count(16, 2, 2 * (5 + 6 + 2), 16 + 2 * (5 + 5 + 5))


@pytest.fixture(scope="module")
def every_code(names: str) -> dict[str, str]:
    """The instructions of their attention kernels, by name."""
    toolkit = find_toolkit()
    if (reason := missing()) or toolkit is None:
        pytest.skip(str(reason))
    tool = disassembler(toolkit)
    if tool is None:
        pytest.skip("needs cuobjdump")
    functions = {}
    for made in compile_kernels(names=names)[0]:
        text = subprocess.run(
            [tool, "-sass", str(made.path)], capture_output=True, text=True, check=True
        ).stdout
        functions |= dict(re.findall(r"Function : (\S+)\n(.*?)(?=Function :|\Z)", text, re.DOTALL))
    return functions


@pytest.fixture(scope="module")
def code(every_code: dict[str, str]) -> dict[str, str]:
    """Those of the forward."""
    return {name: text for name, text in every_code.items() if "attention_fwd" in name}


def test_exponentials_run_between_the_waits_for_the_two_products(code: dict[str, str], count: Count) -> None:
    """After the second wait nothing would overlap them."""
    assert len(code) == count.forward
    for name, text in code.items():
        match = SHAPE.search(name)
        assert match is not None
        keys, capped = int(match.group(3)), match.group(4) == "1"
        hidden = [part.split(NONE_LEFT)[0] for part in text.split(ONE_PRODUCT_LEFT)[1:]]
        assert len(hidden) == 3, name  # masked steps at the causal end, whole ones, those at both bounds
        for part in hidden:
            assert part.count("MUFU.EX2") >= (2 if capped else 1) * keys // 2, name


def test_a_step_at_the_causal_end_compares_one_bound(code: dict[str, str]) -> None:
    """One comparison for each score of a thread there, two at a window's left edge, none where every key is seen."""
    few = 8  # of the loop itself, and of addresses
    for name, text in code.items():
        scores = int(SHAPE.search(name).group(3)) // 2
        steps = [part.split(NONE_LEFT)[0] for part in text.split(ONE_PRODUCT_LEFT)[1:]]
        at_end, whole, at_both = (len(re.findall(r"\bISETP\.", step)) for step in steps)
        assert whole <= few, name
        assert scores // 2 < at_end <= scores + few, name
        assert at_both > scores + few, name


def test_clusters_multicast_and_release_without_a_fence(code: dict[str, str], count: Count) -> None:
    """A fence of the device stands where a block begins and ends, and before no release of a stage."""
    clustered = {name: text for name, text in code.items() if int(SHAPE.search(name).group(5)) > 1}
    assert len(clustered) == count.clustered
    for name, text in code.items():
        multicast = text.count("UTMALDG.4D.MULTICAST")
        assert (multicast > 0) == (name in clustered), name
        assert text.count("UCGABAR_ARV") == text.count("UCGABAR_WAIT") == (2 if name in clustered else 0), (
            name
        )
        assert text.count("MEMBAR.ALL.GPU") == (2 if name in clustered else 0), name


def test_products_are_issued_back_to_back(code: dict[str, str]) -> None:
    """Both products of a step are issued before any wait."""
    for name, text in code.items():
        parts = text.split(ONE_PRODUCT_LEFT)[:-1]
        assert parts, name
        for part in parts:
            issued = re.findall(r"HGMMA\.64x(\d+)x16", part.split("WARPGROUP.DEPBAR")[-1])
            assert len(set(issued)) == (
                1 if SHAPE.search(name).group(1) == SHAPE.search(name).group(3) else 2
            ), name


def test_the_backward_s_exponentials_run_while_dp_is_multiplied(
    every_code: dict[str, str], count: Count
) -> None:
    """Half of them at least lie between the wait for the scores and the one for dp."""
    found = 0
    for name, text in every_code.items():
        kernel = next((kernel for kernel in BACKWARD if kernel in name), None)
        if kernel is None or "KeyGradientsE2E" in name:  # gradients of values alone have no dp
            continue
        match = BACKWARD[kernel].search(name)
        assert match is not None, name
        exponentials = int(match.group(3)) // 2
        between = [part.split("WARPGROUP.DEPBAR")[0] for part in text.split(ONE_PRODUCT_LEFT)[1:]]
        assert max(part.count("MUFU.EX2") for part in between) >= exponentials // 2, name
        found += 1
    assert found == count.with_dp


def test_tensor_maps_are_prefetched_and_loads_say_what_is_read_again(
    every_code: dict[str, str], count: Count
) -> None:
    """Before the first copy; the backward keeps in L2 what every block of a head reads, not what one block reads."""
    found = 0
    for name, text in every_code.items():
        if "UTMALDG" not in text:
            continue
        before_first_copy = text.split("UTMALDG")[0]
        assert before_first_copy.count("UTMACCTL.PF") == 4, name
        if "attention_bwd" in name:
            assert "0x12f00000" in text, name  # evict_first
            assert "0x14f00000" in text, name  # evict_last
        found += 1
    assert found == count.with_maps
