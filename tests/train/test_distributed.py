"""Two and four gloo processes train as one on the same global batch, by DDP and by FSDP2."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from training_cases import rows, save_encoder, write

from fastattn.models import GPT, families
from fastattn.train import distributed
from fastattn.train.distributed import Distributed, gradient_sync

WORKER = Path(__file__).with_name("processes_worker.py")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
EXACT = {"rtol": 1e-9, "atol": 1e-11}  # float64: sums over rows and processes in another order
FLOAT32 = {
    "rtol": 1e-5,
    "atol": 1e-6,
}  # of weights about 0.1 after eight steps: GPT's fused loss is a float32
COUNTS = (1, 2, 4)


def launch(command):
    done = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The worker's report and folder by the number of processes; each reads the checkpoints of those before it."""
    folder = tmp_path_factory.mktemp("processes")
    found = {}
    for count in COUNTS:
        command = [*TORCHRUN, f"--nproc-per-node={count}"] if count > 1 else [sys.executable]
        launch([*command, str(WORKER), str(folder / str(count)), str(folder)])
        found[count] = json.loads((folder / str(count) / "report.json").read_text()), folder / str(count)
    return found


def weights(path):
    return torch.load(path, weights_only=True)


def close(found, expected, bounds=EXACT):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, **bounds)


@pytest.mark.exhaustive
@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
@pytest.mark.parametrize("count", COUNTS)
def test_processes_get_the_weights_losses_and_norms_of_one(runs, count, sharding):
    (one, alone), (many, folder) = runs[1], runs[count]
    one, many = one["ddp"], many[sharding]
    close(weights(folder / sharding / "weights.pt"), weights(alone / "ddp" / "weights.pt"))
    close(weights(folder / sharding / "gpt.pt"), weights(alone / "ddp" / "gpt.pt"), FLOAT32)
    for figure in ("losses", "samples"):  # rounded to float32, and to six places
        assert many[figure] == pytest.approx(one[figure], rel=1e-6)
    assert many["norms"] == pytest.approx(one["norms"], rel=1e-9)
    assert many["last"] == pytest.approx(one["last"], rel=1e-9)
    assert many["figures"] == pytest.approx(one["figures"], rel=1e-9)
    assert (many["targets"], many["tokens"]) == (one["targets"], one["tokens"])


@pytest.mark.exhaustive
@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
@pytest.mark.parametrize("count", COUNTS)
def test_all_processes_stop_alike_and_resume_bit_by_bit(runs, count, sharding):
    """After a signal to the last of them, and where evaluations gain no more."""
    report = runs[count][0][sharding]
    resumed = report["resumed"]
    assert resumed["steps"] == [3, True, 8]
    if sharding == "fsdp" or count <= 2:
        assert resumed["equal"]
    assert (
        resumed["apart"] <= EXACT["atol"]
    )  # DDP orders its buckets anew after its first step, and so sums of more
    assert report["early"] == 4
    assert report["timed"]["often"] == [f"checkpoint-{step}" for step in (2, 4, 6, 8)]
    assert report["timed"]["once"] == ["checkpoint-8"]
    assert report["timed"]["apart"] <= EXACT["atol"]


@pytest.mark.exhaustive
@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
@pytest.mark.parametrize("count", COUNTS)
def test_a_loss_that_is_not_finite_is_named_with_its_process(runs, count, sharding):
    found = runs[count][0][sharding]["diverged"]
    assert found["right"]
    assert found["processes"] == (None if count == 1 else [count - 1])
    assert found["named"] == "embed.weight"
    assert (f"; of process {count - 1};" in found["text"]) == (count > 1)


@pytest.mark.exhaustive
@pytest.mark.parametrize(("count", "source"), [(1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (4, 4)])
def test_a_sharded_checkpoint_reloads_at_another_number_of_processes(runs, count, source):
    """The steps after it are those of one process to rounding."""
    close(weights(runs[count][1] / f"from{source}.pt"), weights(runs[1][1] / "from1.pt"))


@pytest.mark.exhaustive
@pytest.mark.parametrize("count", COUNTS)
def test_a_damaged_part_is_found_and_one_that_cannot_be_written_ends_the_run(runs, count):
    report = runs[count][0]
    assert report["damaged"] == ["checkpoint-2", 8, True]
    message, folders = report["full"]
    assert "No space left on device" in message
    assert f"process {count - 1}" in message
    assert folders == ["checkpoint-2"]


@pytest.mark.exhaustive
@pytest.mark.parametrize("count", COUNTS)
def test_the_folder_of_a_sharded_run_loads_without_processes(runs, count):
    folder = runs[count][1] / "fsdp" / "gpt"
    expected = GPT.from_pretrained(runs[1][1] / "ddp" / "gpt").state_dict()
    close(GPT.from_pretrained(folder).state_dict(), expected, FLOAT32)
    parts = {path.name for path in (folder / "checkpoint-8" / "shards").iterdir()}
    assert parts == {".metadata", *(f"__{rank}_0.distcp" for rank in range(count))}


@pytest.mark.exhaustive
@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
def test_the_command_trains_under_torchrun(tmp_path, sharding):
    """`fastattn train` writes what one process writes: the report once, and a folder that loads."""
    encoder = save_encoder(tmp_path / "encoder")
    found = {}
    for name, count in (("one", 1), ("two", 2)):
        words = ["train", "tag", "--train", write(tmp_path / "train.conll", rows("tag")), "--model", encoder]
        words += ["--dev", tmp_path / "train.conll", "--out", tmp_path / name, "--json"]
        words += ["--train.max_steps=4", f"--train.batch_size={4 // count}", "--train.device=cpu"]
        words += [f"--train.sharding={sharding}", "--train.ema_decay=0.5", "--train.lr=1e-3"]
        start = [sys.executable] if count == 1 else [*TORCHRUN, "--nproc-per-node=2"]
        done = launch([*start, "-m", "fastattn", *map(str, words)])
        found[name] = json.loads(done.stdout)
        assert json.loads((tmp_path / name / "report.json").read_text()) == found[name]
    one, two = found["one"], found["two"]
    assert two["last"]["loss"] == pytest.approx(one["last"]["loss"], rel=1e-4)  # float32
    assert two["tokens"] == one["tokens"]
    assert two["metrics"] == pytest.approx(one["metrics"], rel=1e-4)
    assert type(families.load(tmp_path / "two")) is type(families.load(tmp_path / "one"))


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
