"""How evenly the kernels' order of tiles spreads attention calls over the multiprocessors."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from cuda_emulation.build import Library

UNBOUNDED = 1 << 29  # kUnbounded
MULTIPROCESSORS = (78, 114, 132)  # H20, H100 PCIe, H100 SXM and H200
PASSES = ("forward", "dk and dv", "dq", "one pass")
IN_CLUSTERS, EDGES_BETWEEN = "forward in clusters", "forward, edges between"
MOST_TILES = 1 << 16
# From one tile's addition to the sums of dq to the next one's, in blocks of queries of 1611 and 3319 cycles: about 2000
# cycles, to add 16 or 32 KB, see them landed, and raise and read a semaphore.
HANDOVER = {64: 1.25, 128: 0.6}
# FlashAttention-3's benchmark: 16k tokens, heads of 2048 columns in all. (batch, heads, key heads, length, head dim)
SHAPES = [
    (16384 // s, 2048 // d, 2048 // d, s, d) for d in (64, 128, 256) for s in (512 << i for i in range(6))
]
SHAPES.append((1, 32, 32, 16384, 128))
# Sections of heads that do not come out even, grouped heads, one section.
OTHERS = [
    (8, 16, 16, 2112, 64), (8, 16, 16, 2112, 128), (3, 12, 12, 1000, 256), (5, 8, 8, 3000, 64),
    (7, 10, 10, 1500, 256), (1, 40, 8, 6000, 128), (2, 32, 8, 4096, 128), (1, 16, 4, 4096, 64),
]  # fmt: skip


class Costs:
    """The costs of a pass's tiles, in the order in which they are taken."""

    def __init__(self, library: Library) -> None:
        self._library = library

    def __call__(
        self, kind: str, shape: tuple[int, ...], *, left: int = UNBOUNDED, right: int = UNBOUNDED
    ) -> list[float]:
        batch, heads, kv_heads, length, head_dim = shape
        sizes = torch.tensor(
            [batch, heads, kv_heads, length, length, length, length, head_dim, 0, left, right]
        )
        return self._costs(kind, sizes, None)

    def packed(self, lengths: list[int], heads: int, head_dim: int) -> list[float]:
        """The costs of a causal packed forward."""
        ends = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
        tokens = sum(lengths)
        sizes = torch.tensor(
            [
                len(lengths),
                heads,
                heads,
                max(lengths),
                max(lengths),
                tokens,
                tokens,
                head_dim,
                0,
                UNBOUNDED,
                0,
            ]
        )
        return [cost for cost in self._costs("forward", sizes, ends) if cost > 0]

    def _costs(self, kind: str, sizes: torch.Tensor, ends: torch.Tensor | None) -> list[float]:
        costs, count = torch.zeros(MOST_TILES, dtype=torch.float64), torch.zeros(1, dtype=torch.int64)
        number = [*PASSES, IN_CLUSTERS, EDGES_BETWEEN].index(kind)
        self._library("tile_costs", number, sizes, ends, ends, MOST_TILES, costs, count)
        return costs[: int(count)].tolist()


@pytest.fixture(scope="module")
def costs(emulated: Callable[..., Library]) -> Costs:
    return Costs(emulated("schedules.cpp"))


def as_taken(costs: list[float], multiprocessors: int) -> float:
    """Mean over largest load where the next free multiprocessor takes the next tile."""
    loads = [0.0] * multiprocessors
    for cost in costs:
        heapq.heapreplace(loads, loads[0] + cost)
    return sum(costs) / multiprocessors / max(loads)


def in_rounds(costs: list[float], multiprocessors: int) -> float:
    """The same where tile i belongs to block i % multiprocessors."""
    loads = [sum(costs[first::multiprocessors]) for first in range(multiprocessors)]
    return sum(costs) / multiprocessors / max(loads)


def short_on(costs: list[float]) -> list[int]:
    """On how many multiprocessors mean over largest load is below 0.97 and below 0.99 of longest-first."""
    return [
        count
        for count in MULTIPROCESSORS
        if as_taken(costs, count) < min(0.97, 0.99 * as_taken(sorted(costs, reverse=True), count))
    ]


def wave_bound(tiles: int, multiprocessors: int) -> float:
    return tiles / multiprocessors / -(-tiles // multiprocessors)


@pytest.mark.parametrize("kind", PASSES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_causal_calls_are_as_even_as_longest_first(costs: Costs, shape: tuple[int, ...], kind: str) -> None:
    found = costs(kind, shape, right=0)
    if not found:
        assert kind == "one pass"
        pytest.skip("no such pass at this head dim")
    assert short_on(found) == []


@pytest.mark.parametrize("kind", PASSES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_full_calls_reach_their_wave_bound(costs: Costs, shape: tuple[int, ...], kind: str) -> None:
    found = costs(kind, shape)
    if not found:
        pytest.skip("no such pass at this head dim")
    spread = in_rounds if kind == "forward" else as_taken
    for multiprocessors in MULTIPROCESSORS:
        bound = wave_bound(len(found), multiprocessors)
        assert spread(found, multiprocessors) == pytest.approx(bound, rel=1e-12)


WINDOWS = ({"left": 1024, "right": 0}, {"left": 300, "right": 300})
WINDOWED = [*OTHERS, *SHAPES[1::3]]


@pytest.mark.parametrize("window", [{"right": 0}, *WINDOWS], ids=str)
@pytest.mark.parametrize("shape", WINDOWED, ids=str)
def test_the_forward_with_other_heads_and_windows(
    costs: Costs, shape: tuple[int, ...], window: dict[str, int]
) -> None:
    found = costs("forward", shape, **window)
    assert short_on(found) == []


def test_what_the_page_says_of_edges_last(costs: Costs) -> None:
    """Each windowed call on each device, with the blocks at the edges of windows last and in their place."""
    changes, before, now = [], [], []
    for shape in WINDOWED:
        for window in WINDOWS:
            last, between = (costs(kind, shape, **window) for kind in ("forward", EDGES_BETWEEN))
            short, still_short = short_on(between), short_on(last)
            assert not still_short
            for count in MULTIPROCESSORS:
                changes.append(as_taken(last, count) / as_taken(between, count) - 1)
                if count in short:
                    before.append(as_taken(between, count))
                    now.append(as_taken(last, count))
    less, more = sorted(-100 * c for c in changes if c < -5e-4), max(100 * c for c in changes)
    said = (
        f"{len(less)} of {len(changes)} calls and devices {less[0]:.1f} to {less[-1]:.1f} % less even and "
        f"{sum(c > 5e-4 for c in changes)} up to {more:.1f} % more than without edges last, which left {len(before)} "
        f"below 0.97 and below 0.99 of longest-first ({min(before):.3f} to {max(before):.3f}, now {min(now):.3f} and "
        "more); none is now"
    )
    page = Path(__file__).parents[2] / "docs" / "hopper.md"
    assert f"| {said} |" in page.read_text(encoding="utf-8"), said


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_packed_sequences_of_very_different_lengths(costs: Costs, head_dim: int) -> None:
    """At the end at most one tile is missing anywhere: the order knows no lengths, but takes none twice or late."""
    lengths = [4096, 100, 2500, 31, 1, 900, 3000, 64, 5000, 128, 700, 10]
    found = costs.packed(lengths, 2048 // head_dim, head_dim)
    for multiprocessors in MULTIPROCESSORS:
        balance = as_taken(found, multiprocessors)
        mean = sum(found) / multiprocessors
        assert balance >= mean / (mean + max(found))
        assert balance > in_rounds(found, multiprocessors)


def one_pass_end(
    library: Library, shape: tuple[int, ...], multiprocessors: int, handover: float, *, left: int, right: int
) -> float:
    batch, heads, kv_heads, length, head_dim = shape
    sizes = torch.tensor([batch, heads, kv_heads, length, length, length, length, head_dim, 0, left, right])
    end = torch.zeros(1, dtype=torch.float64)
    library("one_pass_end", sizes, None, None, multiprocessors, handover, end)
    return float(end)


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape[-1] <= 128], ids=str)
def test_waiting_for_the_sums_of_dq_costs_little(
    emulated: Callable[..., Library], shape: tuple[int, ...]
) -> None:
    """Tiles that start together wait for one another: for less than the cycle model can tell apart."""
    library = emulated("schedules.cpp")
    for multiprocessors in MULTIPROCESSORS:
        window = {"left": UNBOUNDED, "right": 0}
        at_once, waiting = (
            one_pass_end(library, shape, multiprocessors, handover, **window)
            for handover in (0.0, HANDOVER[shape[-1]])
        )
        assert at_once <= waiting < 1.03 * at_once


@pytest.mark.parametrize(
    "window",
    [(UNBOUNDED, UNBOUNDED), (UNBOUNDED, 0), (1024, 0), (300, 300), (UNBOUNDED, 100), (100, UNBOUNDED)],
    ids=str,
)
@pytest.mark.parametrize("shape", [shape for shape in OTHERS if shape[-1] <= 128], ids=str)
def test_no_tile_waits_for_one_drawn_later(
    emulated: Callable[..., Library], shape: tuple[int, ...], window: tuple[int, int]
) -> None:
    left, right = window
    assert one_pass_end(emulated("schedules.cpp"), shape, 132, 0.6, left=left, right=right) > 0


@pytest.mark.parametrize(
    ("kind", "window"),
    [
        ("forward", {"right": 0}), ("forward", {"left": 1024, "right": 0}), ("forward", {"left": 300, "right": 300}),
        ("forward", {"left": 200, "right": 700}), ("one pass", {}), ("one pass", {"right": 0}),
    ],
    ids=str,
)  # fmt: skip
def test_every_tile_is_there_once(costs: Costs, kind: str, window: dict[str, int]) -> None:
    """The costs of a call are those of its parts: no tile is lost or repeated by the sections' order."""
    for head_dim in (64, 128):
        one_head = costs(kind, (1, 1, 1, 2112, head_dim), **window)
        for batch in (1, 2, 5, 8):
            whole = costs(kind, (batch, 16, 16, 2112, head_dim), **window)
            assert sorted(whole) == sorted(one_head * batch * 16)


def test_the_edges_of_a_window_come_last(costs: Costs) -> None:
    found = costs(
        "forward", (2, 8, 8, 8192, 256), left=300, right=300
    )  # blocks of 128 queries: 3 and 3 at the edges
    edges = 2 * 8 * 6
    assert found[-edges:] == sorted(found[-edges:], reverse=True)
    assert max(found[-edges:]) <= min(found[:-edges])
    lengths = costs("forward", (2, 8, 8, 384, 256), left=300, right=300)  # nothing between them
    assert len(lengths) == 2 * 8 * 3


def test_sections_but_the_last_begin_with_the_shortest(costs: Costs) -> None:
    found = costs("forward", (4, 16, 16, 4096, 128), right=0)  # 16 heads to a section
    blocks = len(found) // 4
    assert found[:blocks] == sorted(found[:blocks])
    assert found[blocks : 2 * blocks] == found[:blocks]
    assert found[-blocks:] == sorted(found[:blocks], reverse=True)


L2_BYTES = 32 << 20  # what a section's heads may read and add to: most of the L2 cache


@pytest.mark.parametrize("head_dim", [40, 64, 72, 128, 200])
@pytest.mark.parametrize(("heads", "kv_heads"), [(16, 16), (16, 4), (8, 1)])
@pytest.mark.parametrize("length", [2048, 4096, 8192, 16384])
def test_sections_of_the_passes_over_keys_fit_the_l2_cache(
    emulated: Callable[..., Library], length: int, heads: int, kv_heads: int, head_dim: int
) -> None:
    """With q and dout and, in one pass, the float32 sums of dq, as many heads as have room, or one key head."""
    batch = 4
    sizes = torch.tensor(
        [batch, heads, kv_heads, length, length, length, length, head_dim, 0, UNBOUNDED, UNBOUNDED]
    )
    found = torch.zeros(2, dtype=torch.int64)
    emulated("schedules.cpp")("key_sections", sizes, found)
    two_passes, one_pass = found.tolist()
    read = 2 * 2 * head_dim * length * (heads // kv_heads)  # bytes for each key head: q and dout, 16-bit
    sums = 4 * (64 if head_dim <= 64 else 128) * length * (heads // kv_heads)
    for section, each in ((two_passes, read), (one_pass, read + sums)):
        if section == one_pass and head_dim > 128:
            assert section == 0, "there is no such pass"
            continue
        assert section * each <= L2_BYTES or section == 1
        assert section == batch * kv_heads or (section + 1) * each > L2_BYTES
    if 1 < two_passes < batch * kv_heads and head_dim <= 128:
        assert one_pass < two_passes


class Clusters(NamedTuple):
    """A full call at head dim 128 in clusters of two blocks."""

    runs: list[bool]  # whether the call runs in clusters, for each device
    tiles: torch.Tensor  # (tile numbers, 2 blocks, (sequence, key head, query head, first query))


def clusters_of(
    library: Library, shape: tuple[int, ...], length: int, devices: list[tuple[int, int]]
) -> Clusters:
    """`shape`: (batch, heads, key heads); `devices`: (multiprocessors, clusters that have room)."""
    sizes = torch.tensor([*shape, length, length, length, length, 128, 0, UNBOUNDED, UNBOUNDED])
    multiprocessors, resident = torch.tensor(devices).T.contiguous()
    runs, count = torch.zeros(len(devices), dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    tiles = torch.zeros(MOST_TILES, 4, dtype=torch.int64)
    library(
        "clusters_of", sizes, len(devices), multiprocessors, resident, runs, MOST_TILES, tiles, count
    )  # fmt: skip
    return Clusters([bool(run) for run in runs], tiles[: int(count)].reshape(-1, 2, 4))


CLUSTERED = [
    ((16384 // length, heads, kv_heads), length)
    for length in (128, 129, 300, 512, 1000, 2048, 2176, 4096, 16384)
    for heads, kv_heads in ((16, 16), (16, 4), (15, 5), (8, 1))
]


@pytest.mark.parametrize(("shape", "length"), CLUSTERED, ids=str)
def test_clusters_take_every_tile_once(
    emulated: Callable[..., Library], shape: tuple[int, ...], length: int
) -> None:
    """Both blocks of a cluster read the same keys; at most one block per key head has nothing to store."""
    tiles = clusters_of(emulated("schedules.cpp"), shape, length, [(132, 66)]).tiles
    assert torch.equal(tiles[:, 0, :2], tiles[:, 1, :2])
    rows = tiles.reshape(-1, 4)
    batch, heads, kv_heads = shape
    assert torch.equal(rows[:, 1], rows[:, 2] // (heads // kv_heads))
    stored = sorted(map(tuple, rows[rows[:, 3] < length].tolist()))
    group = heads // kv_heads
    wanted = [
        (b, h // group, h, first)
        for b in range(batch)
        for h in range(heads)
        for first in range(0, length, 128)
    ]
    assert stored == sorted(wanted)
    assert len(rows) - len(stored) == batch * kv_heads * (group * -(-length // 128) % 2)


@pytest.mark.parametrize(("shape", "length"), CLUSTERED, ids=str)
def test_clusters_run_only_where_they_cost_no_round(
    emulated: Callable[..., Library], costs: Costs, shape: tuple[int, ...], length: int
) -> None:
    """Also where some multiprocessors are left over. A call ends no later than in rounds of single blocks."""
    devices = [(count, count // 2 - lost) for count in MULTIPROCESSORS for lost in (0, 1, 3)]
    found = clusters_of(emulated("schedules.cpp"), shape, length, devices)
    call = (*shape, length, 128)
    alone, together = costs("forward", call), costs(IN_CLUSTERS, call)
    assert len(together) == len(found.tiles)
    for (multiprocessors, resident), runs in zip(devices, found.runs):
        longest = max(sum(alone[first::multiprocessors]) for first in range(multiprocessors))
        longest_pair = max(sum(together[first::resident]) for first in range(resident))
        pairs = length > 128 or shape[1] > shape[2]  # a key head has more than one tile
        assert runs == (pairs and longest_pair <= longest)


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape[4] == 128], ids=str)
def test_full_calls_in_clusters_reach_their_wave_bound(costs: Costs, shape: tuple[int, ...]) -> None:
    """On as many clusters as the device holds, one per pair of multiprocessors or fewer."""
    found = costs(IN_CLUSTERS, shape)
    assert len(found) == -(-shape[0] * shape[1] * -(-shape[3] // 128) // 2)
    for multiprocessors in MULTIPROCESSORS:
        for resident in (multiprocessors // 2, multiprocessors // 2 - 3):
            bound = wave_bound(len(found), resident)
            assert in_rounds(found, resident) == pytest.approx(bound, rel=1e-12)


def test_benchmarks_of_even_lengths_run_in_clusters(emulated: Callable[..., Library]) -> None:
    """FlashAttention-3's full calls at head dim 128, wherever pairs of multiprocessors take as many rounds."""
    for batch, heads, kv_heads, length, head_dim in SHAPES:
        if head_dim != 128:
            continue
        tiles = batch * heads * (length // 128)
        for count in MULTIPROCESSORS:
            (runs,) = clusters_of(
                emulated("schedules.cpp"), (batch, heads, kv_heads), length, [(count, count // 2)]
            ).runs
            assert runs == (-(-tiles // 2 // (count // 2)) <= -(-tiles // count))
            assert runs or count != 132


def test_no_clusters_where_none_has_room(emulated: Callable[..., Library]) -> None:
    assert clusters_of(emulated("schedules.cpp"), (1, 16, 16), 4096, [(132, 0), (1, 0)]).runs == [False] * 2
