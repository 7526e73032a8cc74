"""The forward's kernel with one line changed: the emulation reports it in every schedule it tries."""

from __future__ import annotations

from pathlib import Path

import pytest
from cuda_emulation.attention_forward import Case, check
from cuda_emulation.build import EmulationError, Library
from cuda_emulation.mutations import (
    LANE_NOT_RECONVERGED,
    MORE_REGISTERS,
    STARVED,
    Mutation,
    assert_lane_reported,
    breakable_library,
    every_schedule,
)

KERNEL = [
    Mutation("keys read before they are there", "barriers.keys.wait_full(key_state);", occurrence=1),
    Mutation("values read before they are there", "barriers.values.wait_full(value_state);", occurrence=1),
    Mutation("scores touched in flight", "wgmma_wait<1>();", "wgmma_wait<2>();"),
    Mutation("result touched in flight", "wgmma_wait<0>();", "wgmma_wait<1>();", occurrence=2),
    Mutation("queries never released", "if (Shape::kOwnOut || !blocks.empty()) release_queries();"),
    Mutation("result stored without a fence", "fence_proxy_async();"),
    Mutation("result stored before all wrote it", "warpgroup_sync();", occurrence=2),
    Mutation("result overwritten while it is stored", "bulk_wait_read<0>();"),
    Mutation("a ping-pong barrier nobody arrives at", "if (Shape::kPingPong) ping_pong_arrive();"),
    MORE_REGISTERS,
]
KERNELS = {
    "kernels/attention_fwd_sm90.cuh": KERNEL,
    "kernels/attention_tile_queue.cuh": [
        Mutation("a tile read before it is there", "slots.wait_full(state);"),
        Mutation(
            "a tile passed over",
            "taken = counter_fetch_add(counter, 1);",
            "taken = counter_fetch_add(counter, 2);",
        ),
    ],
    "device/pipeline.cuh": [
        Mutation("stages overwritten while read", "wait_empty(state);"),
        Mutation("a tile overwritten while read", "wait_empty(state);", occurrence=1),
        LANE_NOT_RECONVERGED,
    ],
    "device/panel.cuh": [
        Mutation("values cleared without a fence", "fence_proxy_async();"),
        Mutation("values not cleared", "(zero_rows<kRows, kColumns>(tiles, first_row), ...);"),
    ],
}
MUTATIONS = [mutation for mutations in KERNELS.values() for mutation in mutations]
CASE = Case("packed", seqlen_q=(300, 170), seqlen_k=(300, 400), heads=2, kv_heads=2, leftover=90, blocks=1)


@pytest.fixture(scope="module")
def breakable(library_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Library:
    folder = tmp_path_factory.mktemp("breakable")
    return breakable_library(
        "attention_fwd.cpp", KERNELS, folder, library_folder, "HEAD_DIM=64", "ELEMENT=half_t"
    )


def run(breakable: Library, line: int, seed: int, starved: int = -1) -> None:
    breakable("break_line", line)
    landing = ("eager", "lazy", "random")[seed % 3]
    check(lambda *_: breakable, CASE, seed=seed, landing=landing, starved=starved)


def test_whole_it_passes(breakable: Library) -> None:
    for seed in range(3):
        run(breakable, -1, seed)


@pytest.mark.parametrize("line", every_schedule(MUTATIONS))
def test_is_noticed(breakable: Library, line: int) -> None:
    for seed in range(6):
        with pytest.raises((EmulationError, AssertionError), match=MUTATIONS[line].report):
            run(breakable, line, seed)


@pytest.mark.parametrize("seed", range(3))
def test_a_starved_lane_is_reported(breakable: Library, seed: int) -> None:
    """Without the warp's sync a lane of the producer misses a phase, if it runs only when nothing else can."""
    line = MUTATIONS.index(LANE_NOT_RECONVERGED)
    for first in (0, 15, 30):  # of two lanes, one of which may be the one that issues
        assert_lane_reported(lambda lane: run(breakable, line, seed, starved=lane), (first, first + 1))


@pytest.mark.parametrize("starved", STARVED)
def test_starved_it_passes(breakable: Library, starved: int) -> None:
    run(breakable, -1, seed=starved, starved=starved)
