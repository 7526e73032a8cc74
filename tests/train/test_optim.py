"""Which parameters decay, and the learning rate's shape."""

import math
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_lm import make_blocks, make_model
from torch import nn

from fastattn import torch_compat
from fastattn.train.optim import (
    build_optimizer,
    hidden_matrices,
    learning_rate,
    set_learning_rate,
    warmup_of,
)


def test_only_matrices_decay_and_tied_or_frozen_ones_are_not_doubled_or_touched():
    model = nn.ModuleDict(
        {"a": nn.Linear(3, 4), "b": nn.Linear(3, 4), "n": nn.LayerNorm(4), "f": nn.Linear(2, 2)}
    )
    model["b"].weight = model["a"].weight
    model["f"].requires_grad_(False)
    optimizer = build_optimizer(model, lr=0.1, weight_decay=0.3)
    decayed, plain = optimizer.param_groups
    assert [p is model["a"].weight for p in decayed["params"]] == [True]
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.3, 0.0)
    assert len(plain["params"]) == 4
    assert all(p.dim() == 1 for p in plain["params"])


def test_one_step_is_adamw_by_hand():
    model = nn.Linear(2, 2, bias=False).double()
    before = model.weight.detach().clone()
    optimizer = build_optimizer(model, lr=0.1, weight_decay=0.5, betas=(0.9, 0.95), eps=1e-8)
    gradient = torch.tensor([[1.0, -2.0], [0.5, 3.0]], dtype=torch.float64)
    model.weight.grad = gradient.clone()
    optimizer.step()
    expected = before * (1 - 0.1 * 0.5) - 0.1 * gradient / (gradient.abs() + 1e-8)
    torch.testing.assert_close(model.weight.detach(), expected, rtol=1e-10, atol=1e-12)


def rate(step, total=100, **options):
    settings = {"lr": 2.0, "warmup_steps": 10, "min_lr_ratio": 0.1, **options}
    return learning_rate(step, step / total, **settings)


def test_warmup_is_linear_and_reaches_the_peak():
    assert [rate(step) for step in range(10)] == pytest.approx([0.2 * (step + 1) for step in range(10)])
    assert rate(10) == pytest.approx(2.0)


def test_cosine_falls_to_the_floor():
    assert rate(55) == pytest.approx(2.0 * (0.1 + 0.9 * 0.5))
    assert rate(100) == pytest.approx(0.2)
    rates = [rate(step) for step in range(10, 101)]
    assert rates == sorted(rates, reverse=True)
    for step in range(10, 101):
        x = (step - 10) / 90
        assert rate(step) == pytest.approx(2.0 * (0.1 + 0.45 * (1 + math.cos(math.pi * x))))


def test_edges():
    assert rate(0, warmup_steps=0) == pytest.approx(2.0)
    assert rate(0, warmup_steps=1) == pytest.approx(2.0)
    assert learning_rate(5, 1.5, lr=1.0, warmup_steps=0, min_lr_ratio=0.0) == pytest.approx(0.0)
    assert rate(3, total=3, warmup_steps=5) == pytest.approx(2.0 * 4 / 5)


@pytest.mark.parametrize(("given", "share"), [(None, 0.1), (20, 0.02), (5000, 0.5), (100000, 0.5)])
def test_a_run_that_time_ends_has_the_whole_schedule(given, share):
    """A thousand steps fit, which nobody knew: the rate rises over a share of the time, and then decays to the end."""
    steps, longest = warmup_of(given, None)
    rates = [
        learning_rate(step, step / 1000, lr=2.0, warmup_steps=steps, min_lr_ratio=0.1, longest_warmup=longest)
        for step in range(1001)
    ]
    peak = round(1000 * share)
    assert rates[:peak] == sorted(rates[:peak])
    assert rates[peak] == max(rates) == pytest.approx(2.0)
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert rates[-1] == pytest.approx(0.2)
    assert rates[round(peak + (1000 - peak) / 2)] == pytest.approx(1.1)
    assert (
        max(abs(a - b) for a, b in pairwise(rates)) <= max(2.0 / peak, 0.9 * math.pi / (1000 - peak)) + 1e-9
    )


def test_a_run_of_known_steps_has_its_warmup_in_steps():
    assert warmup_of(None, 240) == (24, math.inf)
    assert warmup_of(300, 240) == (300, math.inf)


@pytest.mark.parametrize("decay_ratio", [0.1, 0.5, 1.0])
def test_the_other_schedules_follow_their_formulas(decay_ratio):
    for step in range(10, 101):
        x = (step - 10) / 90
        assert rate(step, schedule="linear") == pytest.approx(2.0 * (0.1 + 0.9 * (1 - x)))
        assert rate(step, schedule="constant") == pytest.approx(2.0)
        height = 1.0 if x <= 1 - decay_ratio else (1 - x) / decay_ratio
        assert rate(step, schedule="wsd", decay_ratio=decay_ratio) == pytest.approx(
            2.0 * (0.1 + 0.9 * height)
        )


def test_muon_takes_the_matrices_of_blocks_and_nothing_else():
    model = make_blocks()
    expected = {f"blocks.{i}.{j}.weight" for i in range(2) for j in (0, 3)}
    taken = {id(p) for p in hidden_matrices(model)}
    assert {name for name, p in model.named_parameters() if id(p) in taken} == expected
    muon, decayed, plain = build_optimizer(model, lr=0.1, weight_decay=0.3, name="muon").param_groups
    assert {id(p) for p in muon["params"]} == taken
    assert [p is model.embed.weight for p in decayed["params"]] == [True]
    assert all(p.dim() == 1 for p in plain["params"])
    assert (muon["weight_decay"], decayed["weight_decay"], plain["weight_decay"]) == (0.3, 0.3, 0.0)
    embedded = make_blocks()
    embedded.blocks.append(embedded.embed)
    assert len(hidden_matrices(embedded)) == 4


def test_a_step_of_both_is_torchs_muon_and_adamw_apart():
    joined, apart = make_blocks(), make_blocks()
    optimizer = build_optimizer(joined, lr=0.02, weight_decay=0.1, name="muon", muon_momentum=0.9)
    matrices = hidden_matrices(apart)
    rest = [p for p in apart.parameters() if all(p is not m for m in matrices)]
    muon = torch.optim.Muon(matrices, lr=0.04, weight_decay=0.1, momentum=0.9, adjust_lr_fn="match_rms_adamw")
    groups = [
        {"params": [p for p in rest if (p.dim() < 2) == flat], "weight_decay": 0.0 if flat else 0.1}
        for flat in (False, True)
    ]
    adamw = torch.optim.AdamW(groups, lr=0.02, betas=(0.9, 0.95), fused=True)
    for step in range(3):
        ids = torch.randint(0, 23, (4, 9), generator=torch.Generator().manual_seed(step))
        for model in (joined, apart):
            torch.manual_seed(step)
            model(ids, ids).loss.backward()
        set_learning_rate(optimizer, 0.02, 2.0)
        optimizer.step()
        optimizer.zero_grad()
        muon.step()
        adamw.step()
        muon.zero_grad()
        adamw.zero_grad()
    for a, b in zip(joined.parameters(), apart.parameters()):
        assert torch.equal(a, b)


def test_muon_refuses_a_model_without_blocks():
    with pytest.raises(ValueError, match="optimizer: muon needs trainable matrices in blocks"):
        build_optimizer(make_model(), lr=0.1, name="muon")
    frozen = make_blocks()
    frozen.blocks.requires_grad_(False)
    with pytest.raises(ValueError, match="optimizer: muon needs trainable matrices in blocks"):
        build_optimizer(frozen, lr=0.1, name="muon")


def test_a_state_of_other_groups_is_refused():
    optimizer = build_optimizer(make_blocks(), lr=0.1, name="muon")
    state = optimizer.state_dict()
    with pytest.raises(ValueError, match="state_dict: holds 2 groups, needs 3"):
        optimizer.load_state_dict({**state, "param_groups": state["param_groups"][:2]})


@pytest.mark.parametrize(
    ("made", "cls"), [(torch_compat.adamw, torch.optim.AdamW), (torch_compat.muon, torch.optim.Muon)]
)
def test_optimisers_take_the_steps_of_torchs_own(made: Any, cls: Any) -> None:
    """With hooks, a closure, and a state that either reads of the other."""
    torch.manual_seed(0)
    start = torch.randn(4, 3)
    found = {}
    for kind in (made, cls):
        weight = nn.Parameter(start.clone())
        optimizer = kind([weight], lr=0.1)
        calls: list[str] = []
        optimizer.register_step_pre_hook(lambda *given, calls=calls: calls.append("pre"))
        optimizer.register_step_post_hook(lambda *given, calls=calls: calls.append("post"))

        def loss(optimizer: Any = optimizer, weight: Any = weight) -> torch.Tensor:
            optimizer.zero_grad()
            value = weight.square().sum()
            value.backward()
            return value

        losses = [float(optimizer.step(loss)) for _ in range(3)]
        assert not weight.requires_grad or weight.is_leaf
        found[kind] = losses, weight.detach(), optimizer.state_dict(), calls
    (losses, weight, state, calls), (other_losses, other_weight, other_state, _) = found[made], found[cls]
    assert (losses, calls) == (other_losses, ["pre", "post"] * 3)
    assert torch.equal(weight, other_weight)
    fresh = cls([nn.Parameter(start.clone())], lr=0.5)
    fresh.load_state_dict(state)
    ours = made([nn.Parameter(start.clone())], lr=0.5)
    ours.load_state_dict(other_state)
    assert fresh.param_groups[0]["lr"] == ours.param_groups[0]["lr"] == 0.1
    for name, value in other_state["state"][0].items():
        assert torch.equal(ours.state_dict()["state"][0][name], value)
        assert torch.equal(fresh.state_dict()["state"][0][name], value)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_steps_do_not_import_the_compiler(tmp_path: Path, name: str) -> None:
    """Which takes about as long as the rest of the package; a process of its own, as others import it."""
    program = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
from tiny_lm import make_blocks, make_data
from fastattn.train import TrainConfig, Trainer
config = TrainConfig(output_dir={str(tmp_path)!r}, max_steps=2, batch_size=4, optimizer={name!r})
trainer = Trainer(make_blocks(), config, make_data(), make_data(seed=1))
after, steps = trainer._after_step, []
trainer._after_step = lambda: (steps.append("torch._dynamo" in sys.modules), after())
trainer.fit()
assert steps == [False, False], steps
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
