"""Updates in the backward pass: the bits of updates after it, from a few gradients at a time."""

import gc
import math
import weakref
from types import SimpleNamespace

import pytest
import torch
from tiny_lm import everything, make_blocks, make_data, timeless

from fastattn.models import GPT, GPTConfig
from fastattn.train import ConfigError, TrainConfig, TrainingDiverged
from fastattn.train.in_backward import UpdatesInBackward

FREE = {"grad_clip": None}  # of what updates in the backward pass refuse
OPTIONS = {
    "adamw": {},
    "muon": {"optimizer": "muon", "muon_lr": 3e-3},
    "averaged": {"ema_decay": 0.8},
    "recomputed": {"activation_checkpointing": True},
    "bfloat16": {"precision": "bfloat16"},
    "flops counted": {"peak_tflops": 1.0},  # by a backward pass that is no step
}


def make_gpt(seed=0):
    torch.manual_seed(seed)
    return GPT(GPTConfig(vocab_size=23, n_positions=16, n_embd=16, n_layer=2, n_head=2))


def frozen_blocks(seed=0):
    model = make_blocks(seed)
    model.blocks[0].requires_grad_(False)
    return model


@pytest.mark.parametrize("make", [make_blocks, make_gpt, frozen_blocks])
@pytest.mark.parametrize("name", OPTIONS)
def test_bits_of_updates_after_the_pass(make_trainer, name, make):
    options = {**FREE, **OPTIONS[name], "max_steps": 9, "eval_every": 4, "dev": make_data(seed=1)}
    after = make_trainer(model=make(), out="after", **options)
    expected = after.fit()
    inside = make_trainer(model=make(), out="inside", update_in_backward=True, **options)
    result = inside.fit()
    wanted, found = everything(after), everything(inside)
    assert wanted.keys() == found.keys()
    assert all(torch.equal(wanted[key], found[key]) for key in wanted)
    logs = [
        [{k: v for k, v in r.items() if k != "mfu"} for r in timeless(each.log)]
        for each in (result, expected)
    ]
    assert logs[0] == logs[1]


@pytest.mark.parametrize("first", [False, True])
def test_a_run_goes_on_the_other_way(make_trainer, first):
    options = {**FREE, "save_every": 5, "max_steps": 10, "optimizer": "muon", "schedule": "constant"}
    whole = make_trainer(model=make_blocks(), out="whole", **options)
    whole.fit()
    make_trainer(model=make_blocks(), **{**options, "max_steps": 5}, update_in_backward=first).fit()
    resumed = make_trainer(model=make_blocks(seed=5), resume="auto", **options, update_in_backward=not first)
    assert resumed.fit().steps == 10
    wanted, found = everything(whole), everything(resumed)
    assert all(torch.equal(wanted[key], found[key]) for key in wanted)


def test_gradients_are_dropped_one_by_one(make_trainer, monkeypatch):
    held = []
    update = UpdatesInBackward._update

    def seen(self, name, part, number, parameter):
        held.append(sum(p.grad is not None for p in trainer.model.parameters()))
        update(self, name, part, number, parameter)

    monkeypatch.setattr(UpdatesInBackward, "_update", seen)
    trainer = make_trainer(model=make_gpt(), max_steps=3, update_in_backward=True, **FREE)
    trainer.fit()
    assert len(held) == 3 * len(list(trainer.model.parameters()))
    assert set(held) == {1}


def test_other_passes_leave_gradients(make_trainer):
    trainer = make_trainer(model=make_blocks(), max_steps=3, update_in_backward=True, **FREE)
    before = [p.detach().clone() for p in trainer.model.parameters()]
    batch = trainer.batches.of(trainer.train_data, range(4))
    trainer.objective.loss(trainer.model, batch).backward()
    assert all(p.grad is not None for p in trainer.model.parameters())
    assert all(torch.equal(p, old) for p, old in zip(trainer.model.parameters(), before))


def test_a_trained_model_does_not_keep_the_optimiser(make_trainer):
    trainer = make_trainer(model=make_blocks(), max_steps=3, update_in_backward=True, **FREE)
    trainer.fit()
    model, optimizer = trainer.model, weakref.ref(trainer.optimizer)
    del trainer
    gc.collect()
    assert optimizer() is None
    assert model.head.weight.isfinite().all()


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_what_is_not_finite_ends_the_run_with_its_name(make_trainer, where):
    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad * math.nan

    model = make_blocks()
    forward = model.forward
    calls = []

    def breaks(input_ids, labels):
        calls.append(1)
        out = forward(input_ids, labels)
        if len(calls) < 3:
            return out
        return SimpleNamespace(loss=Broken.apply(out.loss) if where == "gradient" else out.loss * math.nan)

    model.forward = breaks
    trainer = make_trainer(model=model, max_steps=5, update_in_backward=True, **FREE)
    with pytest.raises(
        TrainingDiverged, match=r"step 2: .*first in the gradient of embed\.weight; in the batch of"
    ):
        trainer.fit()


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("grad_clip", 1.0),
        ("accumulate", 2),
        ("on_nonfinite", "skip"),
        ("sharding", "fsdp"),
        ("precision", "float16"),
    ],
)
def test_options_that_need_all_gradients_are_refused(option, value):
    options = {"output_dir": "out", "max_steps": 1, **FREE, option: value}
    TrainConfig(**options)
    with pytest.raises(ConfigError, match=f"^update_in_backward: got {option}={value}"):
        TrainConfig(**options, update_in_backward=True)


def test_several_processes_are_refused(make_trainer, monkeypatch, tmp_path):
    monkeypatch.setattr("fastattn.train.trainer.Distributed", lambda device: SimpleNamespace(active=True))
    with pytest.raises(ConfigError, match=r"^update_in_backward: needs one process"):
        make_trainer(model=make_blocks(), update_in_backward=True, **FREE)
    assert not list(tmp_path.iterdir())
