"""Each part of csrc/device does in the emulation what the PTX manual says, and reports its misuse."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from itertools import product

import pytest
import torch
from cuda_emulation.build import HERE, LANDINGS, EmulationError

from numerics import assert_within_rule, plain_in_any_order

SOURCE = "device_kernels.cpp"
SEEDS = range(3)
SCHEDULES = list(product(SEEDS, LANDINGS))
PRODUCTS = [
    (dtype, n, a_across, b_across, False)
    for dtype in (torch.float16, torch.bfloat16)
    for n in (8, 80, 128, 256)
    for a_across in (False, True)
    for b_across in (False, True)
] + [(torch.bfloat16, n, False, b_across, True) for n in (8, 80, 128, 256) for b_across in (False, True)]


@pytest.mark.parametrize(("dtype", "n", "a_across", "b_across", "a_in_registers"), PRODUCTS)
def test_wgmma(
    emulated, dtype: torch.dtype, n: int, a_across: bool, b_across: bool, a_in_registers: bool
) -> None:
    """Against a float64 product, for every layout of the operands."""
    a, b = torch.randn(64, 128).to(dtype), torch.randn(128, n).to(dtype)
    out = torch.full((64, n), torch.nan)
    stored_a = a.t().contiguous() if a_across else a
    stored_b = b if b_across else b.t().contiguous()
    flags = (dtype == torch.bfloat16, n, a_across, b_across, a_in_registers)
    emulated(SOURCE)("run_product", *map(int, flags), stored_a, stored_b, a, out)
    golden = a.double() @ b.double()
    assert_within_rule(out, plain_in_any_order(lambda: a.float() @ b.float(), golden), golden)


@pytest.mark.newer_triton
@pytest.mark.parametrize("across", [False, True])
def test_descriptors_are_those_of_triton(emulated, across: bool) -> None:
    """The fields and k-steps of B, 128 columns and 64 values of K, equal those in Triton's PTX."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("needs triton")
    command = [sys.executable, str(HERE / "triton_product.py"), str(int(across))]
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    ptx = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    ours = torch.zeros(4, dtype=torch.int64)
    emulated(SOURCE)("run_describe", ours)
    along_k, across_k, along_step, across_step = ours.tolist()
    base, step = (across_k, across_step) if across else (along_k, along_step)
    if not across:  # the field for panels is not used along K, and Triton leaves it empty
        base, step = (x & ~(0x3FFF << 16) for x in (base, step))
    constants = {int(number) for number in re.findall(r"(?:or|add)\.\w+\s.*, (\d+);", ptx)}
    whole = constants | {(base >> 32 << 32) + lower for lower in constants}
    assert {base + i * (step - base) for i in range(4)} <= whole


def swizzled(box: torch.Tensor, swizzle: int) -> torch.Tensor:
    """The floats of a box as they lie in shared memory: 16-byte units exchanged by the 128-byte row they are in."""
    units = box.reshape(-1, 4)
    where = torch.arange(len(units))
    return units[where ^ (where // 8 & ((1 << swizzle) - 1))].reshape(-1)


BOXES = [
    # sizes, box, coordinates; fastest first
    ((64, 10), (32, 8), (0, 0)),
    ((60, 10), (32, 8), (32, 5)),  # past the end of both
    ((64, 10), (32, 8), (-4, -3)),
    ((64, 10), (32, 8), (64, 10)),  # outside the tensor
    ((32, 6, 5), (32, 4, 3), (0, 4, -1)),
    ((32, 6, 5, 3), (32, 3, 2, 2), (-8, 4, 4, 2)),
    ((36, 3, 2, 3, 2), (32, 2, 2, 2, 2), (12, 2, 1, 1, 1)),
]


@pytest.mark.parametrize(("sizes", "box", "at"), BOXES)
@pytest.mark.parametrize("landing", LANDINGS)
def test_boxes(emulated, sizes: tuple[int, ...], box: tuple[int, ...], at: tuple[int, ...], landing) -> None:
    """Out-of-bounds elements read as zeros and are not written; every swizzle lies as documented."""
    source = torch.randn(sizes[::-1])
    wanted = source
    for dim, (size, count, first) in enumerate(zip(sizes[::-1], box[::-1], at[::-1])):
        where = torch.arange(first, first + count)
        exists = ((where >= 0) & (where < size)).reshape(-1, *[1] * (len(sizes) - 1 - dim))
        wanted = wanted.index_select(dim, where.clamp(0, size - 1)) * exists
    for swizzle, add in ((0, False), (3, False), (3, True)):
        target = torch.randn(sizes[::-1])
        expected = target.clone()
        inside = tuple(slice(max(c, 0), max(c + n, 0)) for c, n in zip(at[::-1], box[::-1]))
        expected[inside] = source[inside] + (target[inside] if add else 0)
        image = torch.empty(wanted.numel())
        emulated(SOURCE)(
            "run_move_box", len(sizes), source, target, torch.tensor(sizes), torch.tensor(box),
            torch.tensor(at, dtype=torch.int32), swizzle, image, int(add), landing=landing,
        )  # fmt: skip
        assert torch.equal(image, swizzled(wanted, swizzle))
        assert torch.equal(target, expected)


@pytest.mark.parametrize("swizzle", [1, 2])
def test_narrow_swizzles(emulated, swizzle: int) -> None:
    source = torch.randn(6, 64)
    columns = 4 * 2**swizzle
    image = torch.empty(8 * columns)
    emulated(SOURCE)(
        "run_move_box", 2, source, torch.empty_like(source), torch.tensor([64, 6]), torch.tensor([columns, 8]),
        torch.tensor([8, 1], dtype=torch.int32), swizzle, image, 0,
    )  # fmt: skip
    wanted = torch.nn.functional.pad(source, (0, 0, 0, 8))[1:9, 8 : 8 + columns].contiguous()
    assert torch.equal(image, swizzled(wanted, swizzle))


@pytest.mark.parametrize(
    ("sizes", "box"),
    [((63, 4), (32, 4)), ((64, 4), (64, 4)), ((64, 4), (30, 4)), ((64, 400), (32, 300)), ((64, 0), (32, 4))],
    ids=["stride", "wider than the swizzle", "row not of 16 bytes", "box over 256", "empty"],
)
def test_the_encoder_refuses(emulated, sizes: tuple[int, int], box: tuple[int, int]) -> None:
    with pytest.raises(EmulationError, match="encode_tiled refuses"):
        emulated(SOURCE)(
            "run_move_box", 2, torch.empty(64, 400), torch.empty(64, 400), torch.tensor(sizes), torch.tensor(box),
            torch.zeros(2, dtype=torch.int32), 3, torch.empty(1), 0,
        )  # fmt: skip


@pytest.mark.parametrize("last", [0, 5, 16])
def test_cp_async(emulated, last: int) -> None:
    x = torch.randint(1, 255, (16 * 70,), dtype=torch.uint8)
    expected = x.clone()
    expected[16 * 69 + last :] = 0
    for seed, landing in SCHEDULES:
        y = torch.zeros_like(x)
        emulated(SOURCE)("run_copy_async", x, y, 70, last, 1, seed=seed, landing=landing)
        assert torch.equal(y, expected)
        with pytest.raises(EmulationError, match=r"nothing ordering the two|in flight"):
            emulated(SOURCE)("run_copy_async", x, y, 70, last, 0, seed=seed, landing=landing)


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("transposed", [False, True])
def test_stmatrix(emulated, count: int, transposed: bool) -> None:
    matrices = torch.randint(-(2**15), 2**15, (count, 8, 8), dtype=torch.int16)
    # Lane l holds row l // 4, columns 2 (l % 4) and the next.
    fragments = matrices.reshape(count, 32, 2).contiguous()
    y = torch.empty_like(matrices)
    for seed in SEEDS:
        emulated(SOURCE)("run_store_matrices", fragments, y, count, int(transposed), seed=seed)
        assert torch.equal(y, matrices.transpose(1, 2) if transposed else matrices)


@pytest.mark.parametrize(
    ("mistake", "report"),
    [
        (0, None),
        (1, "may not have started|uses an mbarrier|nothing ordering that after its initialisation|has ended"),
        (2, "nothing ordering the two|nobody wrote"),
        (3, "has ended|may still access its shared memory"),
    ],
)
def test_clusters(emulated, mistake: int, report: str | None) -> None:
    x = torch.randn(8)
    for seed in range(6):
        y = torch.empty(8)
        call = {"seed": seed, "resident": 1 + seed % 2}
        if report is None:
            emulated(SOURCE)("run_cluster_sum", x, y, 8, 4, mistake, **call)
            torch.testing.assert_close(y, x.reshape(2, 4).sum(1).repeat_interleave(4))
        else:
            with pytest.raises(EmulationError, match=report):
                emulated(SOURCE)("run_cluster_sum", x, y, 8, 4, mistake, **call)


@pytest.mark.parametrize("resident", [1, 2, 7])
def test_blocks_in_an_order(emulated, resident: int) -> None:
    """The last block's store remains; additions include every block's value."""
    for seed, landing in SCHEDULES:
        y, semaphore, ticket = (
            torch.zeros(8),
            torch.zeros(1, dtype=torch.int32),
            torch.zeros(1, dtype=torch.int32),
        )
        call = {"seed": seed, "landing": landing, "resident": resident}
        for right in (0, 1):  # by acquire and release, by fences
            emulated(SOURCE)("run_ordered_sum", y, semaphore.zero_(), ticket.zero_(), 7, right, **call)
            assert y.tolist() == [6] * 4 + [21] * 4
            y.zero_()


UNORDERED = r"overwrites global memory that block .*, thread 0 wrote, with nothing ordering the two"
TURN_MISTAKES = {
    "NoWait": "releases a semaphore while its bulk stores may not have reached",
    "NoFenceBefore": "overwrites global memory that block .* wrote, without fence_proxy_async_global",
    "NoFenceAfter": "releases a semaphore without fence_proxy_async_global",
    "RelaxedLoad": UNORDERED,
    "RelaxedAdd": UNORDERED,
    "NoDeviceFenceBefore": UNORDERED,
    "NoDeviceFenceAfter": UNORDERED,
    "ReadsWhatItWrites": "ld_global_16 reads what TMA writes",
}


@pytest.mark.parametrize("mistake", TURN_MISTAKES)
def test_global_memory_is_ordered(emulated, mistake: str) -> None:
    number = 2 + list(TURN_MISTAKES).index(mistake)
    for resident, (seed, landing) in product((1, 3), SCHEDULES):
        y, semaphore, ticket = (
            torch.zeros(8),
            torch.zeros(1, dtype=torch.int32),
            torch.zeros(1, dtype=torch.int32),
        )
        with pytest.raises(EmulationError, match=TURN_MISTAKES[mistake]):
            emulated(SOURCE)(
                "run_ordered_sum",
                y,
                semaphore,
                ticket,
                4,
                number,
                seed=seed,
                landing=landing,
                resident=resident,
            )


def test_waiting_for_a_block_that_never_starts_is_a_livelock(emulated) -> None:
    y, semaphore, ticket = torch.zeros(8), torch.zeros(1, dtype=torch.int32), torch.ones(1, dtype=torch.int32)
    with pytest.raises(EmulationError, match=r"livelock.*semaphore_load_acquire"):
        emulated(SOURCE)("run_ordered_sum", y, semaphore, ticket, 2, 0, resident=2)


@pytest.mark.parametrize(
    ("mistake", "report"),
    [
        (0, None),
        (1, "not in shared memory"),
        (2, "not aligned to 4 bytes"),
        (3, "nobody wrote"),
        (4, "arrives twice"),
        (5, "60 threads are not whole warps"),
    ],
)
def test_shared_memory_and_named_barriers(emulated, mistake: int, report: str | None) -> None:
    for seed in SEEDS:
        y = torch.full((32,), -1, dtype=torch.int32)
        if report is None:
            emulated(SOURCE)("run_hand_over", y, mistake, seed=seed)
            assert y.tolist() == list(range(32))
        else:
            with pytest.raises(EmulationError, match=report):
                emulated(SOURCE)("run_hand_over", y, mistake, seed=seed)


@pytest.mark.parametrize(
    ("min_blocks", "kept", "wanted", "report"),
    [
        (2, 24, 232, None),  # a launch gives each of 2 x 256 threads 128
        (2, 24, 240, r"deadlock.*increase_registers from 128 registers each, \d+ being free"),
        (2, 32, 232, "deadlock.*increase_registers"),
        (1, 240, 256, None),  # no thread starts with more than 248
        (3, 24, 136, None),  # 80
        (3, 24, 144, "deadlock.*increase_registers"),
        (2, 30, 128, "not a multiple of 8 from 24 to 256"),
        (2, 16, 128, "not a multiple of 8 from 24 to 256"),
        (2, 24, 264, "not a multiple of 8 from 24 to 256"),
        (2, 136, 128, "decrease_registers<136> with 128 registers"),
        (2, 128, 120, "increase_registers<120> with 128 registers"),
    ],
)
def test_registers_of_a_block(emulated, min_blocks: int, kept: int, wanted: int, report: str | None) -> None:
    for seed in SEEDS:
        if report is None:
            emulated(SOURCE)("run_exchange_registers", min_blocks, kept, wanted, seed=seed)
            continue
        with pytest.raises(EmulationError, match=report):
            emulated(SOURCE)("run_exchange_registers", min_blocks, kept, wanted, seed=seed)


def test_blocks_start_in_any_order(emulated) -> None:
    """Blocks start shuffled, last one first, or by number, as the ticket that each draws shows."""
    orders = []
    for seed in range(6):
        y, ticket = torch.full((9,), -1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
        emulated(SOURCE)("run_draw_tickets", y, ticket, 9, seed=seed)
        assert sorted(y.tolist()) == list(range(9))
        orders.append(y.tolist())
    assert orders[1] == orders[4] == orders[2][::-1] == list(range(9))[::-1]
    assert orders[0] not in orders[1:]
    assert orders[3] not in orders[4:]


@pytest.mark.parametrize(
    ("place", "report"),
    [
        (0, None),
        (1, "the tensor map is not aligned to 64 bytes"),
        (2, "the tensor map is in shared memory"),
        (3, "more than 1048575 bytes in a phase"),
        (4, "more than 1048575 bytes in a phase"),
    ],
)
def test_maps_and_transaction_counts(emulated, place: int, report: str | None) -> None:
    x, copies = torch.randn(8, 32), torch.zeros(1024, dtype=torch.uint8)
    copies = copies[-copies.data_ptr() % 64 :]
    if report is None:
        emulated(SOURCE)("run_load_by_map", x, copies, place)
        return
    with pytest.raises(EmulationError, match=report):
        emulated(SOURCE)("run_load_by_map", x, copies, place)


@pytest.mark.parametrize(
    ("change", "report"),
    [
        ({}, None),
        ({"shared_bytes": 48 * 1024}, None),
        ({"shared_bytes": 48 * 1024 + 1}, "need cudaFuncAttributeMaxDynamicSharedMemorySize"),
        ({"shared_bytes": 60 * 1024, "max_shared_bytes": 60 * 1024}, None),
        ({"shared_bytes": 60 * 1024 + 1, "max_shared_bytes": 60 * 1024}, "need cudaFuncAttribute"),
        ({"shared_bytes": 228 * 1024, "max_shared_bytes": 228 * 1024}, "233472 bytes of shared memory"),
        ({"x": 0}, "an empty grid"),
        ({"x": 1 << 31}, "a grid of 2147483648 x 1 x 1 blocks"),
        ({"y": 1 << 16}, "a grid of 8 x 65536 x 1 blocks"),
        ({"z": 1 << 16}, "a grid of 8 x 1 x 65536 blocks"),
        ({"threads": 0}, "a block has 1 to 1024 threads"),
        ({"threads": 1025}, "a block has 1 to 1024 threads"),
        ({"threads": 1024, "min_blocks": 3}, "3 blocks of 1024 threads on a multiprocessor"),
        ({"cluster": 8}, None),
        ({"cluster": 16, "x": 16}, "a cluster of 16 blocks"),
        ({"cluster": 3}, "the grid is not a multiple of the cluster"),
        ({"many_parameters": 1}, "4100 bytes of parameters"),
    ],
    ids=str,
)
def test_launches_that_the_driver_refuses(emulated, change: dict[str, int], report: str | None) -> None:
    launch = {
        "x": 8,
        "y": 1,
        "z": 1,
        "threads": 32,
        "min_blocks": 1,
        "shared_bytes": 0,
        "max_shared_bytes": 0,
    }
    launch |= {"cluster": 1, "many_parameters": 0} | change
    if report is None:
        emulated(SOURCE)("run_launch", *launch.values())
        return
    with pytest.raises(EmulationError, match=f"the launch is refused: .*{report}"):
        emulated(SOURCE)("run_launch", *launch.values())
