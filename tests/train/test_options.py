"""Averaged weights, activation checkpointing, figures that pick the best model, trackers, and the report of a run."""

import json
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from tiny_lm import make_blocks, make_data, make_model

from fastattn.train import ConfigError, TrainingDiverged
from fastattn.train.averaging import Averaged
from fastattn.train.recompute import recomputing


def test_the_average_follows_its_formula_and_is_what_is_evaluated_and_saved(make_trainer):
    trainer = make_trainer(ema_decay=0.3, max_steps=5, dev=make_data(seed=1))
    expected = [p.detach().clone() for p in trainer.model.parameters()]
    take = trainer.updates.take

    def followed(*arguments):
        update = take(*arguments)
        step = arguments[1]
        for value, parameter in zip(expected, trainer.model.parameters()):
            value.lerp_(parameter.detach(), 1 - min(0.3, (1 + step) / (10 + step)))
        return update

    trainer.updates.take = followed
    result = trainer.fit()
    trained = [p.detach().clone() for p in trainer.model.parameters()]
    for value, average in zip(expected, trainer.averaged.values):
        torch.testing.assert_close(value, average)
    assert not torch.equal(trained[0], expected[0])
    with torch.no_grad():
        for parameter, value in zip(trainer.model.parameters(), trainer.averaged.values):
            parameter.copy_(value)
    trainer.averaged = None
    assert trainer.evaluate().loss == result.last.loss
    assert result.best == result.last
    saved = load_file(trainer.directory.path / "model.safetensors")
    assert torch.equal(saved["head.weight"], trainer.model.head.weight)
    kept = load_file(result.checkpoint / "model.safetensors")
    names = [name for name, _ in trainer.model.named_parameters()]
    assert all(torch.equal(kept[name], value) for name, value in zip(names, trained))


def test_a_short_run_with_a_slow_average_saves_what_was_learnt(make_trainer):
    plain = make_trainer(out="plain", dev=make_data(seed=1), max_steps=40).fit()
    slow = make_trainer(out="slow", dev=make_data(seed=1), max_steps=40, ema_decay=0.999).fit()
    gained = plain.first.loss - plain.last.loss
    assert slow.first.loss - slow.last.loss > 0.5 * gained > 0


def test_an_average_of_16_bit_weights_sees_small_steps():
    model = make_model().bfloat16()
    averaged = Averaged(model, 0.999)
    before = [value.clone() for value in averaged.values]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.5)
    averaged.update(10_000)
    expected = before[0].lerp(model.embed.weight.detach().float(), 0.001)
    torch.testing.assert_close(averaged.values[0], expected)
    assert not torch.equal(averaged.values[0], before[0])


def saved_bytes(run):
    held = {}

    def keep(tensor):
        held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = run()
    total = sum(held.values())
    loss.backward()
    return total


def test_recomputed_blocks_give_the_same_gradients_from_less_memory():
    ids = torch.randint(0, 23, (16, 32), generator=torch.Generator().manual_seed(0))
    found = {}
    for wanted in (False, True):
        model = make_blocks(dropout=0.3)
        with recomputing(model, wanted):
            torch.manual_seed(1)
            held = saved_bytes(lambda: model(ids, ids).loss)  # noqa: B023
        found[wanted] = held, [p.grad for p in model.parameters()]
        assert "forward" not in model.blocks[0].__dict__
    assert found[True][0] < 0.7 * found[False][0]
    for plain, recomputed in zip(found[False][1], found[True][1]):
        assert torch.equal(plain, recomputed)


def test_recomputation_needs_blocks(make_trainer):
    with pytest.raises(ValueError, match="activation_checkpointing: the model has no blocks"):
        make_trainer(activation_checkpointing=True)


def test_a_figure_picks_the_best_model_and_ends_the_run(make_trainer):
    figures = iter([0.1, 0.5, 0.9, 0.2, 0.8, 0.3])
    weights, training = [], []

    def evaluate_with(model):
        weights.append(model.head.weight.detach().clone())
        training.append(model.training)
        return {"accuracy": next(figures)}

    keywords = {"evaluate_with": evaluate_with, "best": ("accuracy", True)}
    result = make_trainer(
        max_steps=50, eval_every=2, patience=3, dev=make_data(seed=1), keywords=keywords
    ).fit()
    assert "no gain in 3 evaluations" in result.stopped
    assert result.steps == 10
    assert result.best.figures == {"accuracy": 0.9}
    assert training == [False] * 6
    records = [r for r in result.log if r["event"] == "eval"]
    assert [r["accuracy"] for r in records] == [0.1, 0.5, 0.9, 0.2, 0.8, 0.3]
    saved = load_file(result.checkpoint.parent / "model.safetensors")
    assert torch.equal(saved["head.weight"], weights[2])


@pytest.mark.parametrize(
    ("keywords", "complaint"),
    [
        ({"best": ("accuracy", True)}, "best: got 'accuracy', needs evaluate_with"),
        ({"evaluate_with": lambda model: {}}, "evaluate_with: is called at evaluations, needs dev_data"),
        ({"show_with": lambda model: ""}, "show_with: is called at evaluations, needs dev_data"),
    ],
)
def test_evaluations_that_cannot_be_are_refused(make_trainer, tmp_path, keywords, complaint):
    with pytest.raises(ValueError, match=complaint):
        make_trainer(keywords=keywords)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("figures", "complaint"),
    [
        ({"f1": 0.5}, "best: got 'accuracy', needs one of loss, f1"),
        ({"accuracy": "high"}, "evaluate_with: its accuracy is 'high', needs a number"),
        *(
            ({"accuracy": 0.5, name: 0.5}, f"evaluate_with: got a metric '{name}', which the record")
            for name in ("event", "step", "loss", "perplexity", "seconds")
        ),
    ],
)
def test_figures_that_are_none_are_named(make_trainer, figures, complaint):
    keywords = {"evaluate_with": lambda model: figures, "best": ("accuracy", True)}
    with pytest.raises(ValueError, match=complaint):
        make_trainer(dev=make_data(seed=1), keywords=keywords, max_steps=1).fit()


def test_a_text_of_the_model_is_shown_and_logged_and_disturbs_nothing(make_trainer):
    def show_with(model):
        assert not model.training
        torch.rand(3)
        return f"weight {float(model.head.weight[0, 0]):.3f}"

    options = {"dev": make_data(seed=1), "max_steps": 4, "eval_every": 2}
    shown = make_trainer(out="shown", **options, keywords={"show_with": show_with})
    plain = make_trainer(out="plain", **options)
    texts = [r["text"] for r in shown.fit().log if r["event"] == "sample"]
    plain.fit()
    assert len(texts) == 3
    assert len(set(texts)) == 3
    assert torch.equal(shown.model.head.weight, plain.model.head.weight)


def test_an_evaluation_leaves_each_module_in_its_mode(make_trainer):
    trainer = make_trainer(dev=make_data(seed=1), keywords={"show_with": lambda model: str(model.training)})
    trainer.model.train()
    trainer.model.drop.eval()  # as a frozen part is kept
    trainer.evaluate()
    assert trainer.evaluator.shown(trainer.show_with) == "False"
    assert trainer.model.training
    assert not trainer.model.drop.training


def test_a_run_that_diverges_names_the_batch(make_trainer):
    data = [dict(item) for item in make_data()]
    poisoned = 7
    model = make_model(dropout=0.0)

    class Poisoned(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, input_ids, labels):
            loss = self.inner(input_ids, labels).loss
            bad = (input_ids == data[poisoned]["input_ids"]).all(-1).any()
            return SimpleNamespace(loss=loss * float("nan") if bad else loss)

    keywords = {"where": lambda index: f"data.txt: line {index + 1}"}
    options = {"batch_size": 2, "accumulate": 3, "max_steps": 100, "keywords": keywords}
    trainer = make_trainer(model=Poisoned(), train=data, **options)
    with pytest.raises(TrainingDiverged, match="in the batch of training examples") as caught:
        trainer.fit()
    (record,) = [r for r in trainer.log.records if r["event"] == "diverged"]
    assert poisoned in record["examples"]
    assert len(record["examples"]) == 2
    assert record["where"] == [f"data.txt: line {each + 1}" for each in record["examples"]]
    named = [f"{each} ({place})" for each, place in zip(record["examples"], record["where"])]
    assert ", ".join(named) in str(caught.value)


def test_a_process_whose_loss_is_not_finite_is_named_with_its_examples_alone(make_trainer):
    """As the reports of two processes come together on the first, whose own losses and part of gradients are finite."""
    trainer = make_trainer(model=make_blocks())
    names = [name for name, _ in trainer.model.named_parameters()]
    trainer.objective.losses = [torch.tensor(1.0), torch.tensor(2.0)]
    others = (names[3], [[8, 9]], [[6, 7], [8, 9]])
    trainer.distributed.gather = lambda own: [own, others]
    found = trainer.updates.not_finite([[0, 1], [2, 3]])
    assert (found.parameter, found.processes, found.examples) == (names[3], [1], [8, 9])
    for own, other, first in ((4, 2, 2), (2, 4, 2), (None, None, None)):
        reports = [(n and names[n], [], [[4 * rank]]) for rank, n in enumerate((own, other))]
        trainer.distributed.gather = lambda _, reports=reports: reports
        found = trainer.updates.not_finite([[0]])
        assert (found.parameter, found.processes) == (first and names[first], [])
        assert found.examples == [0, 4]  # any of them may be the reason of a gradient


def fake_tracker(monkeypatch, name):
    """A module of that name with init, log and finish, which notes its calls."""
    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None)
    module.calls = []

    def init(**options):
        module.calls.append(("init", options))
        return SimpleNamespace(id=options.get("id", "made"), name=f"{options['name']}")

    module.init = init
    module.log = lambda figures, step: module.calls.append(("log", figures, step))
    module.finish = lambda: module.calls.append(("finish",))
    monkeypatch.setitem(sys.modules, name, module)
    return module


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_records_go_to_trackers(make_trainer, monkeypatch, name):
    module = fake_tracker(monkeypatch, name)
    result = make_trainer(trackers=(name,), max_steps=4, log_every=2, dev=make_data(seed=1)).fit()
    assert module.calls[0][1]["name"] == "run"
    assert module.calls[0][1]["config"]["max_steps"] == 4
    assert module.calls[-1] == ("finish",)
    sent = [(figures, step) for kind, *rest in module.calls if kind == "log" for figures, step in [rest]]
    assert len(sent) == len(result.log)
    for (figures, step), record in zip(sent, result.log):
        assert step == record["step"]
        assert figures[f"{record['event']}/seconds"] == record["seconds"]
    assert any("train/loss" in figures for figures, _ in sent)


@pytest.mark.parametrize(("name", "known_by"), [("wandb", {"id": "made"}), ("trackio", {"name": "run"})])
def test_a_resumed_run_is_the_same_run_of_a_tracker(make_trainer, monkeypatch, name, known_by):
    module = fake_tracker(monkeypatch, name)
    options = {"trackers": (name,), "log_every": 1}
    make_trainer(max_steps=2, **options).fit()
    resumed = make_trainer(max_steps=4, resume="auto", **options)
    resumed.fit()
    other = make_trainer(max_steps=1, out="other", **options)
    other.fit()
    (resumed.directory.path / "trackers.json").write_text("{")
    make_trainer(max_steps=5, resume="auto", **options).fit()
    make_trainer(max_steps=1, overwrite=True, **options).fit()
    given = [
        {key: value for key, value in values[0].items() if key not in ("project", "config")}
        for kind, *values in module.calls
        if kind == "init"
    ]
    new = {"name": "run"}
    assert given == [new, {**new, **known_by, "resume": "allow"}, {"name": "other"}, new, new]


def test_a_name_that_trackio_gave_is_the_one_that_it_resumes(make_trainer, monkeypatch):
    """It gives another name where one of the folder's name exists."""
    module = fake_tracker(monkeypatch, "trackio")
    init = module.init
    module.init = lambda **options: (
        init(**options) if "resume" in options else SimpleNamespace(name="dainty-1")
    )
    make_trainer(trackers=("trackio",), max_steps=2).fit()
    make_trainer(trackers=("trackio",), max_steps=3, resume="auto").fit()
    (given,) = [values[0] for kind, *values in module.calls if kind == "init"]
    assert (given["name"], given["resume"]) == ("dainty-1", "allow")


def test_tensorboard_drops_what_came_after_the_checkpoint(make_trainer, monkeypatch):
    made = []

    class Writer:
        def __init__(self, folder, purge_step):
            made.append((folder, purge_step))

        def add_scalar(self, key, value, step):
            pass

        def close(self):
            pass

    for name in ("tensorboard", "torch.utils.tensorboard"):
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        module.SummaryWriter = Writer
        monkeypatch.setitem(sys.modules, name, module)
    trainer = make_trainer(trackers=("tensorboard",), max_steps=2)
    trainer.fit()
    make_trainer(trackers=("tensorboard",), max_steps=4, resume="auto").fit()
    folder = str(trainer.directory.path / "tensorboard")
    assert made == [(folder, 0), (folder, 3)]


def test_tensorboard_gets_a_file(make_trainer):
    pytest.importorskip("tensorboard")
    trainer = make_trainer(trackers=("tensorboard",), max_steps=2)
    trainer.fit()
    assert list((trainer.directory.path / "tensorboard").iterdir())


def test_a_tracker_that_is_not_installed_is_refused(make_trainer, monkeypatch, tmp_path):
    monkeypatch.setattr("fastattn.train.trackers.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="trackers: wandb is not installed"):
        make_trainer(trackers=("wandb",))
    assert not list(tmp_path.iterdir())


def test_a_run_ends_with_its_work_time_and_memory(make_trainer):
    trainer = make_trainer(max_steps=3)
    result = trainer.fit()
    assert result.flops == 3 * 2 * 12 * 23 * result.tokens
    assert result.peak_memory > 2**20
    last = json.loads((trainer.directory.path / "log.jsonl").read_text().splitlines()[-1])
    assert last["event"] == "end"
    assert (last["flops"], last["peak_memory"]) == (result.flops, result.peak_memory)
