"""Two gloo processes train as one would on the same global batch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from fastattn.train import distributed
from fastattn.train.distributed import Distributed, gradient_sync

WORKER = Path(__file__).with_name("ddp_worker.py")


def launch(folder, processes):
    folder.mkdir()
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={processes}",
    ]
    alone = [sys.executable]
    command = [*(torchrun if processes > 1 else alone), str(WORKER), str(folder)]
    done = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-4000:]
    weights = torch.load(folder / "weights.pt", weights_only=True)
    return json.loads((folder / "report.json").read_text()), weights


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ddp")
    return launch(folder / "one", 1), launch(folder / "two", 2)


def test_two_processes_get_the_weights_and_losses_of_one(runs):
    (one, weights_one), (two, weights_two) = runs
    for name, value in weights_one.items():
        torch.testing.assert_close(weights_two[name], value, rtol=1e-9, atol=1e-11)
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-6)
    assert two["last"] == pytest.approx(one["last"], rel=1e-9)
    assert (two["targets"], two["tokens"]) == (one["targets"], one["tokens"])


def test_a_signal_to_one_process_stops_all_and_the_run_resumes_bit_by_bit(runs):
    _, (two, _) = runs
    assert two["stopped"] == [3, True, 8]
    assert two["same_bits"]
    assert two["ranks_agree"]


def test_alone_the_collectives_are_identities(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    alone = Distributed(torch.device("cpu"))
    model = nn.Linear(2, 2)
    assert (alone.rank, alone.world_size, alone.is_main) == (0, 1, True)
    assert alone.wrap(model, torch.device("cpu")) is model
    assert alone.sum([1.5, 2.0], torch.device("cpu")) == [1.5, 2.0]
    assert alone.gather("x") == ["x"]
    alone.barrier()
    with gradient_sync(model, wanted=False):
        pass


def test_a_process_leaves_the_group_although_a_peer_has_failed(monkeypatch):
    left = []

    def failed(timeout):
        left.append(timeout)
        raise RuntimeError("a peer has not come")

    monkeypatch.setattr(distributed.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed.dist, "get_backend", lambda: "gloo")
    monkeypatch.setattr(distributed.dist, "monitored_barrier", failed)
    monkeypatch.setattr(distributed.dist, "destroy_process_group", lambda: left.append("destroyed"))
    monkeypatch.delenv("RANK", raising=False)
    alone = Distributed.__new__(Distributed)
    alone._owned = True
    alone.close()
    alone.close()  # once only
    assert left == [distributed.LEAVING, "destroyed"]
