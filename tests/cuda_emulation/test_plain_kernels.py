"""Kernels without asynchronous instructions in the emulation, and the reports of their mistakes."""

import pytest
import torch
from cuda_emulation.build import EmulationError

from numerics import assert_within_rule, plain_in_any_order

SEEDS = range(6)


@pytest.mark.parametrize("threads", [32, 128, 1024])
@pytest.mark.parametrize("seed", SEEDS)
def test_row_sums(emulated, threads: int, seed: int) -> None:
    x = torch.randn(3, 1000)
    y = torch.empty(3)
    emulated("plain_kernels.cpp")("run_row_sum", x, y, 3, 1000, threads, 0, seed=seed)
    golden = x.double().sum(1)
    assert_within_rule(y, plain_in_any_order(lambda: x.sum(1), golden), golden)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("mistake", "report"),
    [
        (1, "reads what nobody wrote|with nothing ordering the two"),
        (2, "deadlock.*block_sync"),
        (3, "diverges: calls shuffle_"),
    ],
    ids=["without_sync", "divergent_sync", "divergent_shuffle"],
)
def test_reports(emulated, mistake: int, report: str, seed: int) -> None:
    x = torch.randn(1, 1000)
    y = torch.empty(1)
    with pytest.raises(EmulationError, match=report):
        emulated("plain_kernels.cpp")("run_row_sum", x, y, 1, 1000, 128, mistake, seed=seed)
