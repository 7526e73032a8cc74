"""Checkpoints: a resumed run ends with the bits of one never stopped; a directory is never left half-written."""

import errno
import json
import os
import random
import signal
import tempfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_lm import TinyLM, everything, make_blocks, make_data, make_model, noisy_collate, timeless

from fastattn.models.checkpoint.save import TOKENIZER_FILES
from fastattn.train import ConfigError
from fastattn.train.checkpoint import UNFINISHED, RunDirectory
from fastattn.train.log import read_log

# What `fastattn train`, a tracker and a large model leave besides.
OF_A_COMMAND = (
    "report.json",
    "run.yaml",
    "loss.png",
    "trackers.json",
    "adapter/adapter_model.safetensors",
    "tensorboard/events",
)
OF_A_COMMAND += ("model-00001-of-00002.safetensors", "model.safetensors.index.json")


RUN = {"max_steps": 22, "accumulate": 2, "batch_size": 3, "log_every": 4, "eval_every": 5, "save_every": 5}


def stop_at(step):
    """A callback that asks the run to stop once the log has this step."""

    def interrupt(record):
        if record["event"] == "train" and record["step"] == step:
            os.kill(os.getpid(), signal.SIGTERM)

    return interrupt


def train_in_parts(make_trainer, out="parts", **keywords):
    """Run to step 8, stop, and go on in a new trainer whose model starts from other weights."""
    keywords = {"collate": noisy_collate, **keywords}
    first = make_trainer(
        out=out, dev=make_data(seed=1), **RUN, keywords={**keywords, "on_record": stop_at(8)}
    )
    assert first.fit().steps == 8
    torch.rand(3), random.random(), np.random.rand()  # noqa: NPY002
    second = make_trainer(
        model=make_model(seed=5), out=out, dev=make_data(seed=1), resume="auto", **RUN, keywords=keywords
    )
    return second, second.fit()


@pytest.fixture
def straight(make_trainer):
    trainer = make_trainer(out="straight", dev=make_data(seed=1), **RUN, keywords={"collate": noisy_collate})
    return trainer, trainer.fit()


def test_resumed_run_ends_with_the_same_bits(make_trainer, straight):
    trainer, expected = straight
    resumed, result = train_in_parts(make_trainer)
    wanted, found = everything(trainer), everything(resumed)
    assert wanted.keys() == found.keys()
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)
    assert timeless(result.log) == timeless(expected.log)
    assert timeless(read_log(resumed.directory.path / "log.jsonl")) == timeless(result.log)
    assert (result.first, result.best, result.last) == (expected.first, expected.best, expected.last)
    assert result.tokens == expected.tokens


OPTIONS = {
    "muon": {"optimizer": "muon", "muon_lr": 3e-3, "schedule": "wsd"},
    "averaged": {"ema_decay": 0.8, "schedule": "linear"},
    "recomputed": {"activation_checkpointing": True},
    "all": {"optimizer": "muon", "ema_decay": 0.8, "activation_checkpointing": True},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_a_run_with_other_options_resumes_with_the_same_bits(make_trainer, name):
    options = {**RUN, **OPTIONS[name], "dev": make_data(seed=1)}
    keywords = {"collate": noisy_collate}
    whole = make_trainer(model=make_blocks(), out="whole", **options, keywords=keywords)
    expected = whole.fit()
    make_trainer(model=make_blocks(), **options, keywords={**keywords, "on_record": stop_at(8)}).fit()
    resumed = make_trainer(model=make_blocks(seed=5), resume="auto", **options, keywords=keywords)
    result = resumed.fit()
    wanted, found = everything(whole), everything(resumed)
    assert wanted.keys() == found.keys()
    assert all(torch.equal(wanted[key], found[key]) for key in wanted)
    assert (result.first, result.best, result.last) == (expected.first, expected.best, expected.last)
    top = (resumed.directory.path / "model.safetensors").read_bytes()
    assert top == (whole.directory.path / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("before", "after", "complaint"),
    [
        ({}, {"optimizer": "muon"}, "optimizer: .* was trained with adamw, this run has muon"),
        ({"optimizer": "muon"}, {}, "optimizer: .* was trained with muon, this run has adamw"),
        ({}, {"ema_decay": 0.5}, "ema_decay: .* was trained with None, this run has 0.5"),
        ({"ema_decay": 0.5}, {}, "ema_decay: .* was trained with 0.5, this run has None"),
    ],
)
def test_state_that_the_run_has_no_use_for_or_lacks_is_refused(make_trainer, before, after, complaint):
    make_trainer(model=make_blocks(), max_steps=2, **before).fit()
    with pytest.raises(ConfigError, match=complaint):
        make_trainer(model=make_blocks(), max_steps=4, resume="auto", **after).fit()


@pytest.mark.parametrize(
    "forgotten",
    [
        "fastattn.train.snapshot.restore_random_state",
        "fastattn.train.snapshot.read_model",
        "fastattn.train.trainer.IndexSampler.load_state_dict",
        "fastattn.torch_compat.optimizers._AdamW.load_state_dict",
    ],
)
def test_nothing_of_the_state_is_idle(make_trainer, straight, monkeypatch, forgotten):
    """Each part of a checkpoint matters: without restoring it the bits differ, so the test above can fail."""
    monkeypatch.setattr(forgotten, lambda *args: None)
    resumed, _ = train_in_parts(make_trainer)
    assert not torch.equal(straight[0].model.head.weight, resumed.model.head.weight)


def test_a_run_killed_between_checkpoints_repeats_the_lost_steps(make_trainer, straight):
    class Killed(Exception):
        pass

    def kill(record):
        if record["event"] == "train" and record["step"] == 8:
            raise Killed

    keywords = {"collate": noisy_collate}
    with pytest.raises(Killed):
        make_trainer(dev=make_data(seed=1), **RUN, keywords={**keywords, "on_record": kill}).fit()
    resumed = make_trainer(dev=make_data(seed=1), resume="auto", **RUN, keywords=keywords)
    assert resumed.directory.resume_from.name == "checkpoint-5"
    result = resumed.fit()
    assert torch.equal(straight[0].model.head.weight, resumed.model.head.weight)
    assert timeless(result.log) == timeless(straight[1].log)


def test_auto_starts_afresh_where_there_is_nothing(make_trainer):
    result = make_trainer(resume="auto", max_steps=2).fit()
    assert result.steps == 2
    assert [r["step"] for r in result.log if r["event"] == "train"] == [1, 2]


def test_a_finished_run_resumes_to_nothing_more(make_trainer):
    make_trainer(max_steps=4).fit()
    again = make_trainer(max_steps=4, resume="auto").fit()
    assert (again.steps, again.stopped) == (4, "done after 4 steps")
    assert make_trainer(max_steps=6, resume="auto").fit().steps == 6


def test_checkpoints_can_be_resumed_by_path_into_another_directory(make_trainer):
    first = make_trainer(max_steps=4).fit()
    result = make_trainer(max_steps=6, resume=str(first.checkpoint), out="other").fit()
    assert result.steps == 6
    assert result.checkpoint.parent.name == "other"


def test_a_run_that_goes_on_in_another_directory_has_a_best_model_there(make_trainer):
    """Also where no later evaluation is a gain: the model of the checkpoint is the first candidate."""
    dev = make_data(seed=1)
    earlier = make_trainer(dev=dev, max_steps=4, out="one").fit()
    other = make_trainer(
        dev=dev, max_steps=8, lr=50.0, grad_clip=None, resume=str(earlier.checkpoint), out="two"
    )
    result = other.fit()
    assert result.last.loss > earlier.last.loss
    assert result.best == earlier.last
    assert (other.directory.path / "model.safetensors").read_bytes() == (
        earlier.checkpoint / "model.safetensors"
    ).read_bytes()


def test_only_the_newest_checkpoints_are_kept(make_trainer):
    trainer = make_trainer(max_steps=11, save_every=2, keep_checkpoints=3)
    trainer.fit()
    assert [c.name for c in trainer.directory.checkpoints()] == [
        "checkpoint-8",
        "checkpoint-10",
        "checkpoint-11",
    ]


def test_checkpoint_holds_what_its_users_need(make_trainer):
    result = make_trainer(max_steps=2).fit()
    names = {path.name for path in result.checkpoint.iterdir()}
    assert names == {"model.safetensors", "optimizer.pt", "generators.pt", "trainer_state.json"}
    assert not list(result.checkpoint.parent.glob(UNFINISHED + "*"))
    assert {"log.jsonl", "train_config.yaml", "model.safetensors"} <= {
        path.name for path in result.checkpoint.parent.iterdir()
    }


@pytest.mark.parametrize(
    ("changed", "complaint"),
    [
        ({"seed": 1}, "seed: .* with 0, this run has 1"),
        ({"batch_size": 5}, "batch_size"),
        ({"accumulate": 3}, "accumulate"),
    ],
)
def test_another_order_of_data_is_refused(make_trainer, changed, complaint):
    make_trainer(max_steps=2).fit()
    with pytest.raises(ConfigError, match=complaint):
        make_trainer(max_steps=4, resume="auto", **changed).fit()


def test_another_size_of_data_is_refused(make_trainer):
    make_trainer(max_steps=2).fit()
    with pytest.raises(ValueError, match="saved with length 75, this run has 38"):
        make_trainer(max_steps=4, resume="auto", train=make_data(tokens=300)).fit()


def test_a_write_that_fails_leaves_the_earlier_checkpoint(make_trainer, monkeypatch):
    trainer = make_trainer(max_steps=4, save_every=2)
    real = torch.save

    def full_disk(value, path):
        if "checkpoint-4" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")
        real(value, path)

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="No space left"):
        trainer.fit()
    assert [c.name for c in trainer.directory.checkpoints()] == ["checkpoint-2"]
    assert not list(trainer.directory.path.glob(UNFINISHED + "*"))


def test_what_a_crash_left_unfinished_is_no_checkpoint_and_is_removed(make_trainer):
    trainer = make_trainer(max_steps=2)
    trainer.fit()
    folder = trainer.directory.path
    (folder / f"{UNFINISHED}checkpoint-9").mkdir()
    (folder / "checkpoint-7").mkdir()
    (partial := folder / "train_config.yaml.123-0a1b2c3d.partial").touch()
    again = make_trainer(max_steps=3, resume="auto")
    assert again.directory.resume_from.name == "checkpoint-2"
    again.fit()
    assert not (folder / f"{UNFINISHED}checkpoint-9").exists()
    assert not partial.exists()


@pytest.mark.parametrize("name", [*TOKENIZER_FILES, *OF_A_COMMAND])
def test_overwriting_a_run_leaves_nothing_of_it(name, make_trainer):
    trainer = make_trainer(max_steps=1)
    trainer.fit()
    (trainer.directory.path / name).parent.mkdir(exist_ok=True)
    (trainer.directory.path / name).touch()
    directory = RunDirectory(trainer.directory.path, overwrite=True)
    directory.prepare()
    assert not list(directory.path.iterdir())


def test_a_report_of_an_earlier_end_goes_when_the_run_goes_on(make_trainer):
    path = make_trainer(max_steps=1).fit().checkpoint.parent / "report.json"
    path.touch()
    make_trainer(max_steps=2, resume="auto").fit()
    assert not path.exists()


def test_a_directory_with_a_run_is_refused_unless_asked(make_trainer):
    first = make_trainer(max_steps=3, save_every=1)
    first.fit()
    folder = first.directory.path
    (folder / "notes.txt").write_text("mine")
    before = sorted(folder.rglob("*"))
    with pytest.raises(ConfigError, match=r"output_dir: .* already holds a run.*resume.*overwrite"):
        make_trainer(max_steps=3)
    assert sorted(folder.rglob("*")) == before
    with pytest.raises(ConfigError, match="overwrite: cannot be combined"):
        make_trainer(overwrite=True, resume="auto")
    again = make_trainer(max_steps=1, overwrite=True)
    assert sorted(folder.rglob("*")) == before
    again.fit()
    assert [c.name for c in again.directory.checkpoints()] == ["checkpoint-1"]
    assert (folder / "notes.txt").read_text() == "mine"


def test_a_model_folder_is_not_overwritten_by_accident(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    for resume in ("never", "auto"):
        with pytest.raises(ConfigError, match="already holds a run"):
            RunDirectory(tmp_path, resume=resume)


def test_auto_starts_again_where_a_run_ended_before_its_first_checkpoint(make_trainer):
    class Killed(Exception):
        pass

    def kill(record):
        if record["event"] == "train":
            raise Killed

    with pytest.raises(Killed):
        make_trainer(keywords={"on_record": kill}).fit()
    with pytest.raises(ConfigError, match="already holds a run"):
        make_trainer()
    assert make_trainer(resume="auto", max_steps=2).fit().steps == 2


def test_a_trainer_runs_once(make_trainer):
    trainer = make_trainer(max_steps=1)
    trainer.fit()
    with pytest.raises(RuntimeError, match="runs once"):
        trainer.fit()


def test_going_back_behind_a_newer_checkpoint_is_refused(make_trainer):
    result = make_trainer(max_steps=4, save_every=2).fit()
    older = result.checkpoint.with_name("checkpoint-2")
    with pytest.raises(ConfigError, match="also holds the newer checkpoint-4"):
        make_trainer(max_steps=6, resume=str(older))
    assert make_trainer(max_steps=6, resume=str(older), out="other").fit().steps == 6


def test_resuming_from_what_is_no_checkpoint_is_refused(make_trainer, tmp_path):
    with pytest.raises(ConfigError, match=r"resume: .*nowhere is not a checkpoint"):
        make_trainer(resume=str(tmp_path / "nowhere"))


def test_unwritable_places_are_refused_before_anything_is_made(make_trainer, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"output_dir: .*file cannot be created.*is a file"):
        RunDirectory(tmp_path / "file")
    with pytest.raises(ConfigError, match=r"output_dir: .*a/b cannot be created.*file is a file"):
        RunDirectory(tmp_path / "file" / "a" / "b")

    def denied(*args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(tempfile, "TemporaryFile", denied)
    with pytest.raises(ConfigError, match=r"output_dir: .*run cannot be written \(Permission denied\)"):
        make_trainer()
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_full_disk_is_noticed_before_the_run(make_trainer, tmp_path, monkeypatch):
    size = sum(p.numel() * 4 for p in make_model().parameters())
    free = size + 3 * (3 * size)
    for left, fits in ((free, True), (free - 1, False)):
        usage = SimpleNamespace(free=left)
        monkeypatch.setattr("fastattn.train.checkpoint.shutil.disk_usage", lambda path, usage=usage: usage)
        if fits:
            make_trainer(keep_checkpoints=2)
        else:
            with pytest.raises(ConfigError, match=r"output_dir: .* GB free, needs .* and 3 checkpoints"):
                make_trainer(keep_checkpoints=2)
    assert not list(tmp_path.iterdir())


def test_tied_weights_survive(make_trainer):
    def tied(seed):
        model = TinyLM()
        torch.manual_seed(seed)
        torch.nn.init.normal_(model.embed.weight)
        model.head.weight = model.embed.weight
        return model

    first = make_trainer(model=tied(0), max_steps=3)
    first.fit()
    second = make_trainer(model=tied(1), max_steps=3, resume="auto")
    second.fit()
    assert second.model.head.weight is second.model.embed.weight
    assert torch.equal(first.model.head.weight, second.model.head.weight)


def test_a_pretrained_style_model_is_saved_and_read_by_its_own_methods(make_trainer):
    class Own(TinyLM):
        def save_pretrained(self, folder):
            torch.save(self.state_dict(), folder / "own.pt")
            (folder / "model.safetensors").write_bytes(b"")
            (folder / "config.json").write_text(json.dumps({"model_type": "own"}))

        @classmethod
        def from_pretrained(cls, folder):
            model = cls()
            model.load_state_dict(torch.load(folder / "own.pt", weights_only=True))
            return model

    first = make_trainer(model=Own(), max_steps=3)
    first.fit()
    assert json.loads((first.directory.path / "config.json").read_text()) == {"model_type": "own"}
    second = make_trainer(model=Own(), max_steps=3, resume="auto")
    second.fit()
    assert torch.equal(first.model.head.weight, second.model.head.weight)
