"""Batches by worker processes: the same with any number of workers, and in a run that goes on from a checkpoint."""

import multiprocessing
import os
import signal
import time

import pytest
import torch
from tiny_lm import make_data, make_model, noisy_collate

from fastattn.data.packing import IndexSampler
from fastattn.train import ConfigError
from fastattn.train.loading import WorkerBatches

# More than an epoch of 75 rows before the stop at step 16, and micro-batches on both sides of it.
RUN = {"max_steps": 22, "accumulate": 2, "batch_size": 3, "log_every": 4, "eval_every": 5, "save_every": 5}


def stop_at_16(record):
    if record["event"] == "train" and record["step"] == 16:
        os.kill(os.getpid(), signal.SIGTERM)


def fitted(make_trainer, out, *, seed=0, on_record=None, **options):
    keywords = {"collate": noisy_collate, "on_record": on_record}
    trainer = make_trainer(
        model=make_model(seed=seed), out=out, dev=make_data(seed=1), keywords=keywords, **RUN, **options
    )
    return trainer, trainer.fit()


def test_a_run_with_workers_resumes_with_the_same_bits_at_any_number_of_them(make_trainer):
    straight, expected = fitted(make_trainer, "straight", loader_workers=1)
    _, stopped = fitted(make_trainer, "parts", loader_workers=2, on_record=stop_at_16)
    assert (stopped.steps, stopped.interrupted) == (16, True)
    assert stopped.epochs > 1
    resumed, result = fitted(make_trainer, "parts", seed=5, loader_workers=3, resume="auto")
    assert result.last == expected.last
    for name, value in straight.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value), name


def test_going_on_without_workers_is_refused_for_its_other_draws(make_trainer):
    fitted(make_trainer, "parts", loader_workers=1, on_record=stop_at_16)
    with pytest.raises(ConfigError, match=r"loader_workers: .* was trained with 1, this run has 0"):
        fitted(make_trainer, "parts", resume="auto")


def test_workers_leave_the_generators_of_the_training_alone():
    before = torch.get_rng_state()
    batches = WorkerBatches(make_data(), noisy_collate, IndexSampler(75, 0), 3, 0, 1)
    first = next(batches)
    batches.close()
    assert torch.equal(torch.get_rng_state(), before)
    assert first["labels"].shape == (3, 9)


def test_an_error_in_a_worker_ends_the_run_with_its_message(make_trainer):
    class Broken:
        def __len__(self):
            return 8

        def __getitem__(self, index):
            raise ValueError("row 5 is no row")

    with pytest.raises(ValueError, match="row 5 is no row") as raised:
        make_trainer(train=Broken(), loader_workers=1).fit()
    assert raised.tb is not None  # which holds the loader's iterator
    assert not multiprocessing.active_children()  # an exiting process would wait for them


@pytest.mark.exhaustive  # torch waits for the worker twice, five seconds each
def test_a_worker_that_does_not_come_back_is_killed(make_trainer):
    class Stuck:
        def __len__(self):
            return 8

        def __getitem__(self, index):
            if torch.utils.data.get_worker_info().id == 0:
                raise ValueError("this one fails")
            time.sleep(600)

    with pytest.raises(ValueError, match="this one fails"):
        make_trainer(train=Stuck(), loader_workers=2).fit()
    assert not multiprocessing.active_children()
