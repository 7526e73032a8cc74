"""Runs that time ends: the learning rate passes through its whole schedule, with the warmup that was asked for."""

from __future__ import annotations

import math

import pytest


def test_time_ends_a_run_with_the_rate_at_its_floor(make_trainer):
    result = make_trainer(max_steps=None, max_seconds=0.5, log_every=1, min_lr_ratio=0.1).fit()
    assert 0.5 <= result.seconds < 20
    assert "s, " in result.stopped
    rates = [r["lr"] for r in result.log if r["event"] == "train"]
    assert max(rates) == pytest.approx(1e-2, rel=0.2)
    assert min(rates[-1:]) < 4e-3


def test_a_slow_machine_passes_through_the_whole_schedule(make_trainer, monkeypatch):
    """Ten steps fit into the time that was meant for a thousand: the rate still rises, peaks and comes down."""
    now = [0.0]
    monkeypatch.setattr("fastattn.train.trainer.time.monotonic", lambda: now[0])
    tick = {"on_record": lambda record: now.__setitem__(0, now[0] + 1.0)}
    result = make_trainer(
        max_steps=1000,
        max_seconds=10.0,
        warmup_steps=None,
        log_every=1,
        lr=1.0,
        grad_clip=1e-3,
        keywords=tick,
    ).fit()
    rates = [r["lr"] for r in result.log if r["event"] == "train"]
    assert len(rates) == 10
    assert rates[0] == 0.0
    assert rates[1] > 0.98
    assert rates[1:] == sorted(rates[1:], reverse=True)
    assert rates[-1] < 0.16


@pytest.mark.parametrize(
    "limit", [{"max_steps": 10**6}, {"max_steps": None, "max_epochs": 10**5}, {"max_steps": None}]
)
def test_a_warmup_has_its_number_of_steps_also_where_time_ends_the_run(make_trainer, monkeypatch, limit):
    """Forty steps fit; steps or epochs that are never reached do not shorten the warmup of ten."""
    now = [0.0]
    monkeypatch.setattr("fastattn.train.trainer.time.monotonic", lambda: now[0])
    tick = {"on_record": lambda record: now.__setitem__(0, now[0] + 1.0)}
    options = {"max_seconds": 40.0, "warmup_steps": 10, "log_every": 1, "lr": 1.0, "grad_clip": 1e-3, **limit}
    result = make_trainer(keywords=tick, min_lr_ratio=0.0, **options).fit()
    rates = [r["lr"] for r in result.log if r["event"] == "train"]
    assert len(rates) == 40
    assert rates[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[10] == pytest.approx(1.0)
    assert rates[-1] < 0.01


@pytest.mark.parametrize("warmup_steps", [None, 5000])
def test_a_run_that_time_alone_ends_decays_whatever_its_warmup(make_trainer, monkeypatch, warmup_steps):
    """Forty steps fit; a warmup by their number is not over by then."""
    now = [0.0]
    monkeypatch.setattr("fastattn.train.trainer.time.monotonic", lambda: now[0])
    tick = {"on_record": lambda record: now.__setitem__(0, now[0] + 1.0)}
    options = {
        "max_steps": None,
        "max_seconds": 40.0,
        "warmup_steps": warmup_steps,
        "log_every": 1,
        "lr": 1.0,
    }
    result = make_trainer(grad_clip=1e-3, min_lr_ratio=0.1, keywords=tick, **options).fit()
    rates = [r["lr"] for r in result.log if r["event"] == "train"]
    peak = 4 if warmup_steps is None else 20
    assert len(rates) == 40
    assert rates[peak] == max(rates) == pytest.approx(1.0)
    first = 0.0 if warmup_steps is None else 1 / warmup_steps
    assert rates[:peak] == pytest.approx([first, *(step / peak for step in range(1, peak))])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    x = (39 - peak) / (40 - peak)
    assert rates[-1] == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi * x)) / 2)
