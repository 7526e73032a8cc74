"""Row kernels in a block and in a cluster with one line changed, which the emulation reports; kernels' divisions."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from cuda_emulation.build import EmulationError, Library
from cuda_emulation.mutations import Mutation, breakable_library, every_schedule

from numerics import assert_within_rule

RACE = "nobody wrote|nothing ordering the two"
ROWS = [
    Mutation("a block that says nothing of its start", "cluster_arrive();", report="without having arrived"),
    Mutation("another block's start not waited for", "cluster_wait();", report="arrives .* twice"),
    Mutation("another block's sums not waited for", "cluster_sync();", report=RACE),
    Mutation("another warp's sums not waited for", "block_sync();", report=RACE),
    Mutation(
        "sums kept in their block",
        "st_shared(map_shared(shared + rank * kWarpThreads + warp, lane), value);",
        "st_shared(map_shared(shared + rank * kWarpThreads + warp, rank), value);",
        report=RACE,
    ),
]
PLAIN = [
    Mutation(
        "the sum where the maximum is",
        "sum = reduce_row<Sum, kWithinWarp<Elements>>(sum, mine, 1);",
        "sum = reduce_row<Sum, kWithinWarp<Elements>>(sum, mine, 0);",
        report="without having arrived",
    ),
    Mutation("a row with NaN left out", "store_undefined_row<RowView<In, Out, int>>(p, plan, kVectors);"),
    Mutation(
        "elements not scaled",
        "powers[i][j] = exp2_approx((powers[i][j] - largest) * base_2_scale);",
        "powers[i][j] = exp2_approx(powers[i][j] - largest);",
    ),
]
KERNELS = {"kernels/rows.cuh": ROWS, "kernels/softmax_plain.cuh": PLAIN}
MUTATIONS = ROWS + PLAIN


@pytest.fixture(scope="module")
def breakable(library_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Library:
    return breakable_library(
        "softmax_rows.cpp", KERNELS, tmp_path_factory.mktemp("breakable"), library_folder
    )


def check(library: Library, shape: tuple[int, int, int, int], scale: float, **schedule: int) -> None:
    """The softmax of a slice of (outer, mid, inner, columns); the first of several rows holds a NaN."""
    outer, mid, inner, columns = shape
    x = torch.randn(outer, mid + 1, inner, columns).half()[:, :mid]
    if outer > 1:
        x[0, 0, 0, columns // 2] = torch.nan
    y = torch.full(shape, 0.5, dtype=torch.float16)
    library("run_softmax", x, y, *shape, x.stride(0), x.stride(1), 1, scale, **schedule)
    golden, plain = (x.double() * scale).softmax(-1), (x * scale).softmax(-1)
    unknown = golden.isnan()
    assert torch.equal(y.isnan(), unknown)
    assert_within_rule(*(t.masked_fill(unknown, 0) for t in (y, plain, golden)))


def run(library: Library, line: int, seed: int) -> None:
    """A cluster of two blocks, then blocks of four rows in two warps each."""
    library("break_line", line)
    check(library, (1, 1, 1, 16600), 0.3, seed=seed, resident=2)
    check(library, (2, 3, 2, 600), 0.3, seed=seed)


def test_whole_it_passes(breakable: Library) -> None:
    for seed in range(3):
        run(breakable, -1, seed)


@pytest.mark.parametrize("line", every_schedule(MUTATIONS))
def test_is_noticed(breakable: Library, line: int) -> None:
    for seed in range(3):
        with pytest.raises((EmulationError, AssertionError), match=MUTATIONS[line].report):
            run(breakable, line, seed)


def test_quotients(breakable: Library) -> None:
    """Of the smallest and largest numbers of 31 bits and of 63, on both sides of every multiple near powers of two."""
    draw = random.Random(0)
    cases = []
    for bits in (31, 63):
        largest = 2**bits - 1
        divisors = {largest, largest - 1, 3, 7, 641, 10**6, *(draw.randrange(1, largest) for _ in range(50))}
        divisors |= {2**k + more for k in range(1, bits) for more in (-1, 0, 1)}
        for divisor in sorted(divisors):
            near = {0, 1, largest, largest // divisor * divisor, draw.randrange(largest)}
            near |= {divisor * draw.randrange(1 + largest // divisor) for _ in range(4)}
            numerators = {n + more for n in near for more in (-1, 0, 1) if 0 <= n + more <= largest}
            cases += [(numerator, divisor, largest) for numerator in sorted(numerators)]
    numerators, divisors_of, largest_of = (torch.tensor(column) for column in zip(*cases))
    quotients = torch.full_like(numerators, -1)
    breakable("run_quotients", numerators, divisors_of, largest_of, quotients, len(cases))
    assert quotients.tolist() == [numerator // divisor for numerator, divisor, _ in cases]


def test_a_plan_has_powers_of_two(breakable: Library) -> None:
    threads = torch.zeros(1, dtype=torch.int64)
    for lanes, warps, blocks in ((32, 16, 2), (1, 1, 1), (8, 32, 8)):
        breakable("run_plan", lanes, warps, blocks, threads)
        assert threads.item() == lanes * warps * blocks
    for lanes, warps, blocks in ((24, 1, 1), (32, 3, 1), (32, 16, 6), (0, 1, 1), (32, -1, 1)):
        with pytest.raises(EmulationError, match="have to be powers of two"):
            breakable("run_plan", lanes, warps, blocks, threads)
