"""Training in 16 bit, and losses or gradients that are not finite."""

import copy
import json
import os
import signal
from types import SimpleNamespace

import pytest
import torch
from tiny_lm import make_model
from torch import nn

from fastattn.train import TrainingDiverged


class Spoiled(nn.Module):
    """A model whose loss is NaN on chosen calls."""

    def __init__(self, bad_calls):
        super().__init__()
        self.inner = make_model(dropout=0.0)
        self.bad_calls, self.calls = bad_calls, 0

    def forward(self, input_ids, labels):
        loss = self.inner(input_ids, labels).loss
        self.calls += self.training
        return SimpleNamespace(loss=loss * float("nan") if self.calls in self.bad_calls else loss)


def test_a_bad_number_stops_the_run_loudly_with_weights_unharmed(make_trainer):
    model = Spoiled({7})
    trainer = make_trainer(model=model, save_every=3)
    with pytest.raises(TrainingDiverged, match=r"step 6: loss nan.*gradient of inner\..*checkpoint-6"):
        trainer.fit()
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert trainer.log.records[-1]["event"] == "diverged"
    text = (trainer.directory.path / "log.jsonl").read_text()
    assert json.loads(text.splitlines()[-1])["loss"] == "nan"


def test_bad_numbers_are_skipped_on_request_but_not_for_ever(make_trainer):
    trainer = make_trainer(model=Spoiled({3, 4}), on_nonfinite="skip")
    result = trainer.fit()
    assert result.steps == 20
    warnings = [r for r in result.log if r["event"] == "warning"]
    assert [w["step"] for w in warnings] == [2, 3]
    assert "2 in a row" in warnings[1]["text"]
    with pytest.raises(TrainingDiverged):
        make_trainer(model=Spoiled(set(range(2, 100))), on_nonfinite="skip", max_nonfinite=4, out="b").fit()


def test_a_skipped_step_changes_no_weight(make_trainer):
    model = Spoiled({1})
    before = copy.deepcopy(model.state_dict())
    make_trainer(model=model, on_nonfinite="skip", max_steps=1).fit()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_skipped_step_changes_no_average(make_trainer):
    trainer = make_trainer(model=Spoiled({4}), on_nonfinite="skip", max_steps=4, ema_decay=0.9)
    before, discard = [], trainer.updates.discard

    def skipped():
        discard()
        before[:] = [value.clone() for value in trainer.averaged.values]

    trainer.updates.discard = skipped
    for number in range(1, 5):
        earlier = list(before)
        trainer._train_step()
        same = [torch.equal(a, b) for a, b in zip(earlier, trainer.averaged.values)]
        assert (number == 1) or (all(same) if number == 4 else not any(same))


def test_bfloat16_autocast_reaches_the_model(make_trainer):
    seen = []

    class Recording(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = make_model()

        def forward(self, **batch):
            output = self.inner(**batch)
            seen.append(output.logits.dtype)
            return output

    make_trainer(model=Recording(), precision="bfloat16", max_steps=2).fit()
    assert set(seen) == {torch.bfloat16}


@pytest.fixture
def half_precision(monkeypatch):
    """float16 with loss scaling on the CPU, which a user is refused but which runs the same code as on CUDA."""
    monkeypatch.setattr("fastattn.train.trainer.usable_dtype", lambda precision, device: torch.float16)


def test_loss_scaling_trains_and_resumes_bit_by_bit(make_trainer, half_precision):
    straight = make_trainer(out="straight", max_steps=12)
    assert straight.objective.scaler.is_enabled()
    straight.objective.scaler._growth_interval = 5
    losses = [r["loss"] for r in straight.fit().log if r["event"] == "train"]
    assert losses[-1] < losses[0]
    assert straight.objective.scaler.get_scale() == 4 * 2.0**16

    def interrupt(record):
        if record["event"] == "train" and record["step"] == 7:
            os.kill(os.getpid(), signal.SIGINT)

    parts = {"out": "parts", "max_steps": 12, "log_every": 7}
    first = make_trainer(**parts, keywords={"on_record": interrupt})
    first.objective.scaler._growth_interval = 5
    first.fit()
    second = make_trainer(**parts, resume="auto", model=make_model(seed=3))
    second.fit()
    assert second.objective.scaler.state_dict() == straight.objective.scaler.state_dict()
    assert torch.equal(second.model.head.weight, straight.model.head.weight)


def test_an_overflow_under_loss_scaling_is_no_divergence(make_trainer, half_precision):
    trainer = make_trainer(max_steps=6)
    trainer.objective.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**120)
    before = trainer.model.head.weight.detach().clone()
    trainer._train_step()
    assert torch.equal(before, trainer.model.head.weight)
    assert trainer.objective.scaler.get_scale() == 2.0**119
    trainer.objective.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    trainer._train_step()
    assert not torch.equal(before, trainer.model.head.weight)
