"""The Hopper forward in clusters of two blocks, which multicast keys and values: results, schedules, errors."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cuda_emulation.attention_forward import Case, check, inputs_of, run
from cuda_emulation.build import LANDINGS, EmulationError, Library
from cuda_emulation.mutations import STARVED, Mutation, breakable_library, every_schedule

# Tiles of 128 queries by 176 keys, of which each block loads 88.
CASES = [
    Case(name, head_dim=128, clusters=True, **shape)
    for name, shape in {
        "two whole tiles": {"seqlen_q": 256, "seqlen_k": 352},
        "three tiles, one block of keys": {"seqlen_q": 300, "seqlen_k": 176},
        "one key": {"seqlen_q": 129, "seqlen_k": 1},
        "one share of the last keys": {"seqlen_q": 200, "seqlen_k": 176 + 88},
        "one key in the second share": {"seqlen_q": 130, "seqlen_k": 89},
        "pairs across query heads": {"heads": 6, "kv_heads": 2, "seqlen_q": 60, "seqlen_k": 200},
        "pairs across query heads, one over": {"heads": 3, "kv_heads": 1, "seqlen_q": 40, "seqlen_k": 90},
        "grouped heads of three tiles": {"heads": 2, "kv_heads": 1, "seqlen_q": 257, "seqlen_k": 100},
        "one tile": {"seqlen_q": 3, "seqlen_k": 200},
        "two clusters": {"batch": 2, "heads": 2, "kv_heads": 2, "seqlen_q": 200, "seqlen_k": 180, "blocks": 4},
        "more clusters than tiles": {"seqlen_q": 140, "seqlen_k": 200, "blocks": 6, "resident": 3},
        "two clusters at once": {"batch": 3, "seqlen_q": 140, "seqlen_k": 200, "blocks": 4, "resident": 2},
        "one cluster, many tiles": {"batch": 2, "heads": 2, "kv_heads": 1, "seqlen_q": 300, "seqlen_k": 190},
    }.items()
] + [
    Case("head dim 72", head_dim=72, clusters=True, seqlen_q=150, seqlen_k=190),
    Case("scale", head_dim=128, clusters=True, seqlen_q=150, seqlen_k=190, options={"scale": 0.5}),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_float64_and_the_bits_without_clusters(emulated, case: Case) -> None:
    for seed in range(3):
        out, lse = check(emulated, case, seed=seed, landing=LANDINGS[(seed + len(case.name)) % 3])
    alone = run(emulated, replace(case, clusters=False), inputs_of(case))
    assert torch.equal(out, alone[0])
    assert torch.equal(lse, alone[1])


# Three tiles and four blocks of keys per head: stages are refilled, and the last tile has no partner in its cluster.
SCHEDULED = Case(
    "schedules", head_dim=128, clusters=True, heads=2, kv_heads=2, seqlen_q=300, seqlen_k=300, blocks=2
)


@pytest.mark.parametrize("landing", LANDINGS)
def test_any_schedule(emulated, landing: str) -> None:
    results = [check(emulated, SCHEDULED, seed=seed, landing=landing) for seed in range(6)]
    for out, lse in results[1:]:
        assert torch.equal(out, results[0][0])
        assert torch.equal(lse, results[0][1])


@pytest.mark.parametrize("starved", STARVED)
def test_starved_it_passes(emulated, starved: int) -> None:
    check(emulated, SCHEDULED, seed=starved, landing=LANDINGS[starved % 3], starved=starved)


RACE = r"with nothing ordering the two|may still read|nobody wrote|once more than it expects|fewer bytes than were"
COPY = """\
tma_load_4d_multicast(static_cast<unsigned char*>(tile) + (panel * kRows + first) * kPanelRowBytes, map, barrier,
                          (1u << kBlocks) - 1, panel * kPanelColumns, row + first, head, batch, policy);"""
READ = "if (thread == 0) bulk_wait_read<0>();"
OWN_OUT = "if (Shape::kOwnOut) release(barriers.values, value_state);"
MUTATIONS = {
    "device/pipeline.cuh": [
        Mutation(
            "stages released to one block",
            "mbarrier_arrive_cluster_read(&empty[state.stage], rank);",
            "if (rank == cluster_rank()) mbarrier_arrive_cluster_read(&empty[state.stage], rank);",
            report=r"deadlock.* of mbarrier",
        ),
        Mutation(
            "both releases to the own block",
            "mbarrier_arrive_cluster_read(&empty[state.stage], rank);",
            "mbarrier_arrive_cluster_read(&empty[state.stage], cluster_rank());",
            report=RACE,
        ),
        Mutation(
            "another block's releases waited for as the own block's",
            "mbarrier_wait_cluster(&empty[state.stage], state.parity ^ 1);",
            "mbarrier_wait(&empty[state.stage], state.parity ^ 1);",
            report="without mbarrier_wait_cluster",
        ),
        Mutation("stages overwritten while read", "wait_empty(state);", report=RACE),
    ],
    "device/panel.cuh": [
        Mutation("both blocks load the same keys", COPY, COPY.replace("row + first", "row")),
        Mutation("both blocks fill the same share", COPY, COPY.replace("kRows + first", "kRows")),
    ],
    "kernels/attention_fwd_sm90.cuh": [
        Mutation("result staged over values that are read", "consumers_sync();", report="may still read"),
        Mutation("values loaded over a result that is read", READ, occurrence=2),
        Mutation("values given back before the result lies there", OWN_OUT, OWN_OUT.partition(") ")[2]),
        Mutation(
            "barriers used before they are there",
            "Shape::kCluster > 1 ? cluster_sync() : block_sync();",
            "block_sync();",
            report="may not have started|not initialised|ordering that after its initialisation|has ended",
        ),
        Mutation(
            "a block ends before it is released to",
            "cluster_sync();",
            report="has ended|may still access its shared memory",
        ),
    ],
    "kernels/attention_fwd_common.cuh": [
        Mutation(
            "blocks of a cluster that see other keys",
            "if constexpr (Shape::kCluster > 1) return block_range<Shape::kBlockN>(0, keys, 0, keys);",
            report="deadlock",
        ),
    ],
}
LINES = [mutation for mutations in MUTATIONS.values() for mutation in mutations]


@pytest.fixture(scope="module")
def breakable(library_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Library:
    folder = tmp_path_factory.mktemp("breakable_clusters")
    return breakable_library(
        "attention_fwd.cpp", MUTATIONS, folder, library_folder, "HEAD_DIM=128", "ELEMENT=bfloat16_t"
    )


COLUMNS = Mutation("columns staged over others that are read", READ, occurrence=1)


def test_columns_staged_over_others_are_noticed(
    library_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """At head dim 256 a result is staged in two halves."""
    library = breakable_library(
        "attention_fwd.cpp", {"kernels/attention_fwd_sm90.cuh": [COLUMNS]},
        tmp_path_factory.mktemp("breakable_columns"), library_folder, "HEAD_DIM=256", "ELEMENT=bfloat16_t",
    )  # fmt: skip
    case = Case("columns", head_dim=256, seqlen_q=200, seqlen_k=100)
    for seed in range(6):
        library("break_line", -1)
        check(lambda *_: library, case, seed=seed, landing=LANDINGS[seed % 3])
        library("break_line", 0)
        with pytest.raises((EmulationError, AssertionError)):
            check(lambda *_: library, case, seed=seed, landing=LANDINGS[seed % 3])


def run_broken(breakable: Library, line: int, seed: int) -> None:
    breakable("break_line", line)
    check(lambda *_: breakable, SCHEDULED, seed=seed, landing=LANDINGS[seed % 3])


def test_whole_it_passes(breakable: Library) -> None:
    for seed in range(3):
        run_broken(breakable, -1, seed)


@pytest.mark.parametrize("line", every_schedule(LINES))
def test_is_noticed(breakable: Library, line: int) -> None:
    for seed in range(6):
        with pytest.raises((EmulationError, AssertionError), match=LINES[line].report):
            run_broken(breakable, line, seed)
