"""A warp-specialised Hopper kernel is right in every schedule, and each mistake is reported in each."""

import re
from itertools import product

import pytest
import torch
from cuda_emulation.build import HERE, LANDINGS, EmulationError

SOURCE = "pipeline_kernel.cpp"
SEEDS = range(6)
SCHEDULES = list(product(SEEDS, LANDINGS))
RACE = r"with nothing ordering the two|may still read|nobody wrote"
DEADLOCK = r"deadlock"

# Mistake -> what is reported; "" where the run ends and the product is wrong.
REPORTS = {
    "NoQueryWait": RACE,
    "NoKeyFullWait": RACE,
    "NoValueFullWait": RACE,
    "NoKeyEmptyWait": f"{RACE}|once more than it expects",
    "NoValueEmptyWait": f"{RACE}|once more than it expects",
    "SwappedEmptyParity": DEADLOCK,
    "SwappedFullParity": f"{RACE}|{DEADLOCK}",
    "HalvedExpectTx": "fewer bytes than were copied",
    "KeyReleasedBeforeWait": "overwrites .* wgmma group .* may still read",
    "ValueReleasedBeforeWait": "overwrites .* wgmma group .* may still read",
    "ScoresWaitTooLax": "overwrites .* wgmma group .* may still read",
    "AccumulatorTouched": "accumulators were touched in flight",
    "WeightsTouched": "A registers were touched in flight",
    "NoWgmmaFence": "changed since wgmma_fence",
    "NoProxyFence": "without fence_proxy_async",
    "NoStoreWait": "ends while its bulk stores still read shared memory",
    "NoInitialSync": "with nothing ordering that after its initialisation",
    "NoBarrierInitFence": "without fence_barrier_init",
    "WrongStride": RACE,
    "WrongTranspose": "",
    "UnswizzledEpilogue": "",
    "NoBarrierBeforeStore": RACE,
    "UnalignedBase": "not aligned to 1024 bytes",
    "ArrivalMissing": DEADLOCK,
    "ArrivalTooMany": f"{RACE}|{DEADLOCK}|once more than it expects",
    "TooManyRegisters": "deadlock.*increase_registers",
    "WaitByOneWarp": RACE,
    "NoCommitOfStore": "without committing its bulk stores",
    "ScoresNeverWaited": "overwrites .* wgmma group .* may still read",
}


def linear_attention(emulated, rows: int, keys: int, mistake: int = 0, **schedule) -> float:
    """The largest error of the kernel's (q k^T) v, in units of the largest value."""
    q, k, v = (torch.randn(length, 64).bfloat16() for length in (rows, keys, keys))
    out = torch.full((rows, 64), float("nan"), dtype=torch.bfloat16)
    emulated(SOURCE)("run_pipeline", q, k, v, out, rows, keys, mistake, **schedule)
    expected = (q.double() @ k.double().T).bfloat16().double() @ v.double()
    return ((out.double() - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize(("rows", "keys"), [(1, 1), (64, 64), (128, 65), (129, 200), (300, 449)])
def test_every_schedule_gives_the_product(emulated, rows: int, keys: int) -> None:
    for seed, landing in SCHEDULES:
        resident = 1 + seed % 2
        error = linear_attention(emulated, rows, keys, seed=seed, landing=landing, resident=resident)
        assert error <= 2**-8, (seed, landing)


def test_the_kernel_and_this_file_name_the_same_mistakes() -> None:
    enum = re.search(r"enum Mistake \{([^}]*)\}", (HERE / SOURCE).read_text())
    assert enum is not None
    assert re.findall(r"k(\w+)", enum[1]) == ["None", *REPORTS]


@pytest.mark.parametrize("mistake", REPORTS)
def test_every_schedule_catches(emulated, mistake: str) -> None:
    number = 1 + list(REPORTS).index(mistake)
    for seed, landing in SCHEDULES:
        if REPORTS[mistake]:
            with pytest.raises(EmulationError, match=REPORTS[mistake]):
                linear_attention(emulated, 200, 300, number, seed=seed, landing=landing)
        else:
            error = linear_attention(emulated, 200, 300, number, seed=seed, landing=landing)
            assert not error <= 2**-5, (seed, landing)
