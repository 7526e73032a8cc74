"""Checkpoints by time: a run that is killed loses at most that time, and its results are those of any other run."""

from types import SimpleNamespace

import pytest
import torch
from tiny_lm import everything, make_data, timeless


class Killed(Exception):
    pass


@pytest.fixture
def clock(monkeypatch):
    """A clock that each record of the log moves by a second."""
    now = SimpleNamespace(seconds=0.0)
    monkeypatch.setattr("fastattn.train.trainer.time.monotonic", lambda: now.seconds)
    return now


def ticking(clock, *, kill_at=None):
    def tick(record):
        clock.seconds += 1.0
        if record["event"] == "train" and record["step"] == kill_at:
            raise Killed

    return {"on_record": tick}


def steps_of(trainer):
    return sorted(int(path.name.partition("-")[2]) for path in trainer.directory.checkpoints())


def test_checkpoints_come_by_time_and_change_no_bit(make_trainer, clock):
    options = {"log_every": 1, "keep_checkpoints": 99, "max_steps": 20, "dev": make_data(seed=1)}
    timed = make_trainer(out="timed", save_seconds=5.0, keywords=ticking(clock), **options)
    found = timed.fit()
    plain = make_trainer(out="plain", save_seconds=None, keywords=ticking(clock), **options)
    expected = plain.fit()
    # the clock of a step is that at its start, and five seconds count from the step after a checkpoint
    assert steps_of(timed) == [6, 12, 18, 20]
    assert steps_of(plain) == [20]
    assert timeless(found.log) == timeless(expected.log)
    wanted, here = everything(plain), everything(timed)
    assert all(torch.equal(wanted[name], here[name]) for name in wanted)


def test_a_run_that_is_killed_goes_on_from_the_last_of_them(make_trainer, clock):
    options = {"log_every": 1, "save_seconds": 5.0, "max_steps": 20}
    whole = make_trainer(out="whole", keywords=ticking(clock), **options)
    whole.fit()
    with pytest.raises(Killed):
        make_trainer(keywords=ticking(clock, kill_at=10), **options).fit()
    resumed = make_trainer(resume="auto", keywords=ticking(clock), **options)
    assert resumed.directory.resume_from.name == "checkpoint-6"
    assert resumed.fit().steps == 20
    assert torch.equal(resumed.model.head.weight, whole.model.head.weight)


def test_one_is_written_without_any_option_about_it(make_trainer, clock):
    slow = {"on_record": lambda record: setattr(clock, "seconds", clock.seconds + 300.0)}
    trainer = make_trainer(log_every=1, max_steps=6, keep_checkpoints=9, keywords=slow)
    trainer.fit()
    assert steps_of(trainer) == [4, 6]
