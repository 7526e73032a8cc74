"""The backward's kernels with one line changed: the emulation reports it in every schedule it tries."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from cuda_emulation.build import EmulationError, Library
from cuda_emulation.mutations import (
    BARRIERS_NOT_FENCED,
    LANE_NOT_RECONVERGED,
    MORE_REGISTERS,
    STARVED,
    Mutation,
    assert_lane_reported,
    breakable_library,
    every_schedule,
)
from cuda_emulation.test_attention_bwd import check

# the mutations of the forward show in every run that the emulation reports such faults
pytestmark = pytest.mark.exhaustive

KERNELS = {
    "kernels/attention_bwd_dkdv_sm90.cuh": [
        Mutation("queries read before they are there", "queries.wait_full(next);", occurrence=1),
        Mutation("keys read before they are there", "mbarrier_wait(&shared.barriers->keys, 0);"),
        Mutation("queries released while read", "wgmma_wait<1>();", "wgmma_wait<3>();"),
        Mutation(
            "scores touched in flight", "wgmma_wait<kScoreGroups - 1>();", "wgmma_wait<kScoreGroups>();"
        ),
        Mutation(
            "dp touched in flight", "wgmma_wait<kGradientGroups - 1>();", "wgmma_wait<kGradientGroups>();"
        ),
        Mutation("gradients stored in flight", "wgmma_wait<0>();", "wgmma_wait<1>();"),
        MORE_REGISTERS,
        BARRIERS_NOT_FENCED,
    ],
    "kernels/attention_bwd_dq_sm90.cuh": [
        Mutation("keys read before they are there", "keys.wait_full(next);"),
        Mutation("keys released while read", "wgmma_wait<1>();", "wgmma_wait<2>();", occurrence=1),
        Mutation("gradient stored in flight", "wgmma_wait<0>();", "wgmma_wait<1>();", occurrence=1),
        MORE_REGISTERS,
        BARRIERS_NOT_FENCED,
    ],
    "device/pipeline.cuh": [
        Mutation("stages overwritten while read", "wait_empty(state);"),
        Mutation(
            "too few bytes expected",
            "mbarrier_arrive_expect_tx(&arrived, bytes);",
            "mbarrier_arrive_expect_tx(&arrived, bytes - 16);",
        ),
        LANE_NOT_RECONVERGED,
    ],
    "device/panel.cuh": [
        Mutation("keys zeroed without a fence", "fence_proxy_async();"),
        Mutation("keys not zeroed", "(zero_rows<kRows, kColumns>(tiles, first_row), ...);"),
    ],
}
MUTATIONS = [mutation for kernel in KERNELS.values() for mutation in kernel]
CASE = "key lengths, several blocks"
# Of its heads one takes the tiles of keys from the last to the first, the other from the first to the last.
ONE_PASS_CASE = "key lengths, causal, several blocks"


@pytest.fixture(scope="module")
def breakable(library_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Library:
    folder = tmp_path_factory.mktemp("breakable")
    return breakable_library(
        "attention_bwd.cpp", KERNELS, folder, library_folder, "HEAD_DIM=64", "ELEMENT=half_t"
    )


def run(breakable: Library, line: int, seed: int, starved: int = -1) -> None:
    breakable("break_line", line)
    schedule = {"seed": seed, "landing": ("eager", "lazy", "random")[seed % 3], "starved": starved}
    check(lambda *_: breakable, CASE, torch.float16, with_dlse=True, **schedule)


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


UNORDERED = "adds to global memory .* wrote, with nothing ordering the two"
SHARED_LINES = {
    "kernels/attention_bwd_fused_common.cuh": [
        Mutation(
            "the dq semaphore is not waited for",
            "semaphore_wait(params.dq_semaphore + first + block, before);",
            report=UNORDERED,
        ),
        Mutation(
            "every head adds from its last tile of keys on",
            "return walk.step > 0 ? seen.end - 1 - key_block : key_block - seen.begin;",
            "return seen.end - 1 - key_block;", report="livelock.* in semaphore_load_acquire",
        ),
        Mutation(
            "dq overwritten before it is taken",
            "named_pair_sync<kDqTaken>(which, Shape::kDqThreads);",
        ),
        Mutation("dq taken before it is written", "named_pair_sync<kDqWritten>(which, kThreads);"),
        Mutation("dq handed over without a fence", "fence_proxy_async();"),
        Mutation(
            "dq added without a fence after the semaphore's wait", "fence_proxy_async_global();",
            report="adds to global memory .* wrote, without fence_proxy_async_global",
        ),
        Mutation(
            "the dq semaphore released without a fence", "fence_proxy_async_global();", occurrence=1,
            report="releases a semaphore without fence_proxy_async_global",
        ),
        Mutation(
            "the dq semaphore released before dq has landed", "bulk_wait<0>();",
            report="releases a semaphore while its bulk stores may not have reached",
        ),
    ],
    "device/sync.cuh": [
        Mutation(
            "a turn taken without acquire", "return emulator::semaphore_load(semaphore);",
            "return emulator::relaxed_load(semaphore);", report=UNORDERED,
        ),
        Mutation(
            "the dq semaphore added to without release", "emulator::semaphore_add(semaphore, value);",
            "emulator::counter_fetch_add(semaphore, value);", report=UNORDERED,
        ),
    ],
}  # fmt: skip
TILES_BY_NUMBER = Mutation(
    "tiles by the number of the block",
    "st_shared(&shared.barriers->ticket, counter_fetch_add(params.ticket, 1));",
    "counter_fetch_add(params.ticket, 1); st_shared(&shared.barriers->ticket, block_index().x);",
    report="livelock.* in semaphore_load_acquire",
)
ONE_PASS = {
    64: {
        **SHARED_LINES,
        "kernels/attention_bwd_fused_deferred.cuh": [
            Mutation("ds read before both wrote it", "await_ds();"),
            Mutation("ds of the last block read before both wrote it", "await_ds();", occurrence=1),
            Mutation("ds read without a fence", "fence_proxy_async();"),
            Mutation("dq stored in flight", "wgmma_wait<1>();", "wgmma_wait<2>();", occurrence=2),
            Mutation(
                "keys overwritten while dq reads them", "named_barrier_sync(kKeysRead, kConsumerThreads);"
            ),
        ],
        "kernels/attention_bwd_fused_sm90.cuh": [TILES_BY_NUMBER, MORE_REGISTERS, BARRIERS_NOT_FENCED],
    },
    128: {
        **SHARED_LINES,
        "kernels/attention_bwd_fused_sm90.cuh": [
            Mutation("ds read before both wrote it", "named_barrier_sync(kDsWritten, kConsumerThreads);"),
            Mutation("ds read without a fence", "fence_proxy_async();"),
            TILES_BY_NUMBER,
            MORE_REGISTERS,
            BARRIERS_NOT_FENCED,
        ],
    },
}
SPLIT = {
    "kernels/attention_bwd_dkdv_split_sm90.cuh": [
        Mutation("scores read before they are there", "queries.wait_full(next);"),
        Mutation("dout read before it is there", "queries.wait_full(next);", occurrence=1),
        Mutation("queries released while dv reads dout", "wgmma_wait<1>();", "wgmma_wait<2>();"),
        Mutation(
            "queries released while dk reads them", "wgmma_wait<1>();", "wgmma_wait<2>();", occurrence=1
        ),
        Mutation("dp touched in flight", "wgmma_wait<0>();", "wgmma_wait<1>();", occurrence=2),
        Mutation(
            "probabilities overwritten before they are taken",
            "named_barrier_sync(kProbabilitiesTaken, kSplitThreads);",
        ),
        Mutation(
            "probabilities taken before they are written",
            "named_barrier_sync(kProbabilitiesWritten, kSplitThreads);",
        ),
        MORE_REGISTERS,
        BARRIERS_NOT_FENCED,
    ]
}
SPLIT_LINES = [mutation for mutations in SPLIT.values() for mutation in mutations]
ONE_PASS_LINES = [
    pytest.param(head_dim, line, mutation.report, id=f"{head_dim}: {mutation.name}")
    for head_dim, kernels in ONE_PASS.items()
    for line, mutation in enumerate(mutation for mutations in kernels.values() for mutation in mutations)
]


@pytest.fixture(scope="module")
def breakable_split(library_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Library:
    folder = tmp_path_factory.mktemp("breakable_split")
    return breakable_library(
        "attention_bwd.cpp", SPLIT, folder, library_folder, "HEAD_DIM=256", "ELEMENT=half_t"
    )


@pytest.mark.parametrize("line", range(len(SPLIT_LINES)), ids=[mutation.name for mutation in SPLIT_LINES])
def test_warpgroups_that_share_keys_need_the_line(breakable_split: Library, line: int) -> None:
    breakable_split("break_line", line)
    options = {"with_dlse": True, "head_dim": 256}
    for seed, landing in enumerate(("eager", "lazy", "random")):
        with pytest.raises((EmulationError, AssertionError), match=SPLIT_LINES[line].report):
            check(lambda *_: breakable_split, CASE, torch.float16, seed=seed, landing=landing, **options)


@pytest.fixture(scope="module")
def breakable_one_pass(library_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Library]:
    return {
        head_dim: breakable_library(
            "attention_bwd.cpp", kernels, tmp_path_factory.mktemp(f"breakable_{head_dim}"), library_folder,
            f"HEAD_DIM={head_dim}", "ELEMENT=half_t",
        )
        for head_dim, kernels in ONE_PASS.items()
    }  # fmt: skip


@pytest.mark.parametrize(("head_dim", "line", "report"), ONE_PASS_LINES)
def test_one_pass_needs_the_line(
    breakable_one_pass: dict[int, Library], head_dim: int, line: int, report: str | None
) -> None:
    """Without the line, some schedule is reported or gives other bits."""
    library = breakable_one_pass[head_dim]
    library("break_line", line)
    options = {"with_dlse": True, "head_dim": head_dim, "one_pass": True}
    try:
        results = [
            check(
                lambda *_: library, ONE_PASS_CASE, torch.float16, seed=seed, resident=4 - seed % 3, **options
            )
            for seed in range(6)
        ]
    except (EmulationError, AssertionError) as error:
        reported = str(error)
    else:
        reported = ""
        assert not all(torch.equal(a.query, results[0].query) for a in results)
    assert re.search(report or "", reported), reported


@pytest.mark.parametrize("starved", STARVED)
@pytest.mark.parametrize("head_dim", ONE_PASS)
def test_starved_one_pass_passes(breakable_one_pass: dict[int, Library], head_dim: int, starved: int) -> None:
    library = breakable_one_pass[head_dim]
    library("break_line", -1)
    options = {"with_dlse": True, "head_dim": head_dim, "one_pass": True, "resident": 2}
    check(lambda *_: library, ONE_PASS_CASE, torch.float16, seed=starved, starved=starved, **options)
