"""Two blocks that multicast tiles are right in every schedule, and each mistake is reported."""

import re
from itertools import product

import pytest
import torch
from cuda_emulation.build import HERE, LANDINGS, EmulationError

SOURCE = "cluster_kernel.cpp"
SCHEDULES = list(product(range(6), LANDINGS))
RACE = r"with nothing ordering the two|may still read|nobody wrote"
DEADLOCK = r"deadlock"
EARLY = r"once more than it expects|without a copy that was issued in it|fewer bytes than were copied"

REPORTS = {
    "NoRemoteRelease": f"{DEADLOCK}.* of mbarrier",
    "ReleasedBeforeRead": f"{RACE}|{EARLY}",
    "ReleasedByOneBlock": RACE,
    "CopiesToSelfOnly": f"{DEADLOCK}.* 4096 bytes missing",
    "CopiesBeyondCluster": "a multicast to blocks 0x7 of a cluster of 2",
    "OwnShareExpected": f"{RACE}|{EARLY}|the block ends while copies",
    "TwiceExpected": f"{DEADLOCK}.* 8192 bytes missing",
    "SharesOverlap": RACE,
    "NoEmptyWait": f"{RACE}|{EARLY}",
    "EmptyWaitOfBlockScope": "without mbarrier_wait_cluster",
    "NoInitialClusterSync": "may not have started|not initialised|ordering that after its initialisation|has ended",
    "NoBarrierInitFence": "without fence_barrier_init",
    "NoFinalClusterSync": "has ended|may still access its shared memory",
    "ArrivesTwice": "arrives at the cluster's barrier twice",
    "WaitsWithoutArrival": "waits at the cluster's barrier without having arrived",
}


def error_of_sums(emulated, clusters: int, tiles: int, mistake: int = 0, **schedule) -> float:
    x = torch.randint(-8, 8, (tiles, 64, 64)).bfloat16()
    out = torch.full((2 * clusters, 64, 64), torch.nan)
    emulated(SOURCE)("run_sum_tiles", x, out, clusters, tiles, mistake, **schedule)
    sums = (x.float() * torch.arange(1, tiles + 1)[:, None, None]).sum(0)
    return (out - torch.arange(1, 2 * clusters + 1)[:, None, None] * sums).abs().max().item()


@pytest.mark.parametrize("tiles", [1, 2, 5])
def test_every_schedule_gives_the_sums(emulated, tiles: int) -> None:
    for seed, landing in SCHEDULES:
        resident = 1 + seed % 2
        assert error_of_sums(emulated, 3, tiles, seed=seed, landing=landing, resident=resident) == 0


@pytest.mark.parametrize("starved", [0, 17, 31, 32, 95, 1024, 1025, 1026])
def test_starved_it_gives_the_sums(emulated, starved: int) -> None:
    """Lanes of the producer and of a consumer, then each warp, in both blocks."""
    for seed in range(3):
        assert error_of_sums(emulated, 2, 5, seed=seed, landing=LANDINGS[seed], starved=starved) == 0


def test_the_kernel_and_this_file_name_the_same_mistakes() -> None:
    enum = re.search(r"enum Mistake \{([^}]*)\}", (HERE / SOURCE).read_text())
    assert enum is not None
    assert re.findall(r"k(\w+)", enum[1]) == ["None", *REPORTS]


@pytest.mark.parametrize("mistake", REPORTS)
def test_every_schedule_catches(emulated, mistake: str) -> None:
    number = 1 + list(REPORTS).index(mistake)
    for seed, landing in SCHEDULES:
        with pytest.raises(EmulationError, match=REPORTS[mistake]):
            error_of_sums(emulated, 1, 6, number, seed=seed, landing=landing)
