"""A run that resumes with other options trains by them, and names each that changes it."""

import pytest
import torch
import yaml
from tiny_lm import make_blocks, make_data

BEFORE = {"weight_decay": 0.3, "beta1": 0.8, "beta2": 0.9, "eps": 1e-6, "muon_momentum": 0.9}
AFTER = {"weight_decay": 0.0, "beta1": 0.7, "beta2": 0.5, "eps": 1e-3, "muon_momentum": 0.6}


@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
def test_the_optimiser_has_the_options_of_the_resumed_run(make_trainer, sharding):
    """By the files of torch.save and of torch.distributed.checkpoint; vectors stay without decay."""
    options = {"model": make_blocks(), "sharding": sharding, "warmup_steps": 0}
    make_trainer(max_steps=2, **options, **BEFORE).fit()
    resumed = make_trainer(max_steps=4, resume="auto", **options, **AFTER)
    assert resumed.fit().steps == 4
    assert [group["weight_decay"] for group in resumed.optimizer.param_groups] == [0.0, 0.0]
    for group in resumed.optimizer.param_groups:
        assert (tuple(group["betas"]), group["eps"]) == ((0.7, 0.5), 1e-3)
    written = yaml.safe_load((resumed.directory.path / "train_config.yaml").read_text())["train"]
    assert {name: written[name] for name in AFTER} == AFTER


def test_muon_and_adamw_have_their_own(make_trainer):
    make_trainer(model=make_blocks(), max_steps=2, optimizer="muon", **AFTER).fit()
    resumed = make_trainer(model=make_blocks(), max_steps=4, optimizer="muon", resume="auto", **BEFORE)
    resumed.fit()
    muon, matrices, vectors = resumed.optimizer.param_groups
    assert (muon["momentum"], muon["weight_decay"]) == (0.9, 0.3)
    assert "betas" not in muon
    assert (matrices["betas"], matrices["eps"], matrices["weight_decay"]) == ((0.8, 0.9), 1e-6, 0.3)
    assert (vectors["betas"], vectors["weight_decay"]) == ((0.8, 0.9), 0.0)


def test_an_update_of_the_backward_pass_has_them_too(make_trainer):
    free = {"update_in_backward": True, "grad_clip": None, "schedule": "constant", "warmup_steps": 0}
    found = []
    for name, more in (("inside", free), ("after", {**free, "update_in_backward": False})):
        first = make_trainer(model=make_blocks(), out=name, max_steps=2, **more, **BEFORE)
        first.fit()
        second = make_trainer(model=make_blocks(1), out=name, max_steps=4, resume="auto", **more, **AFTER)
        second.fit()
        found.append(second.model.state_dict())
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_each_option_that_changes_the_run_is_named(make_trainer):
    dev = make_data(seed=1)
    earlier = make_trainer(dev=dev, max_steps=2, trackers=(), log_every=1).fit()
    changed = {"max_steps": 4, "weight_decay": 0.5, "schedule": "linear", "grad_clip": 0.5, "eval_every": 2}
    result = make_trainer(dev=dev, resume="auto", log_every=2, keep_checkpoints=3, **changed).fit()
    warned = [r["text"] for r in result.log if r["event"] == "warning"]
    place = f"{earlier.checkpoint} was trained with"
    assert sorted(warned) == [
        f"eval_every: {place} None, this run has 2",
        f"grad_clip: {place} 1.0, this run has 0.5",
        f"max_steps: {place} 2, this run has 4",
        f"schedule: {place} cosine, this run has linear",
        f"weight_decay: {place} 0.1, this run has 0.5",
    ]
