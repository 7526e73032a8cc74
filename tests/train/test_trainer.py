"""The training loop: exact accumulation, reproducible runs, evaluation, limits, signals."""

import json
import math
import os
import signal
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_lm import VOCAB, make_data, make_model
from torch import nn

from fastattn.constants import IGNORE_INDEX
from fastattn.data import BestFitDataset
from fastattn.train import ConfigError


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def ragged_batch(rows, seed=0):
    """Rows with very different numbers of labels, one of them with none."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCAB, (rows, 9), generator=generator)
    labels = ids.clone()
    labels[:, 0] = IGNORE_INDEX
    for row in range(rows):
        labels[row, 1 + (row * 5) % 9 :] = IGNORE_INDEX
    return {"input_ids": ids, "labels": labels}


@pytest.mark.parametrize("parts", [1, 2, 4, 8])
def test_accumulated_gradient_is_that_of_one_big_batch(make_trainer, parts):
    whole = ragged_batch(8)
    assert len({int((row != IGNORE_INDEX).sum()) for row in whole["labels"]}) > 4
    assert any((row == IGNORE_INDEX).all() for row in whole["labels"])
    model = make_model(dropout=0.0).double()
    expected_loss = model(**whole).loss
    expected_loss.backward()
    expected = gradients(model)
    model.zero_grad()

    trainer = make_trainer(model=model)
    size = 8 // parts
    batches = [{k: v[i : i + size] for k, v in whole.items()} for i in range(0, 8, size)]
    loss, tokens = trainer.objective.accumulate(batches)
    assert tokens == whole["input_ids"].numel()
    assert loss == pytest.approx(expected_loss.item(), rel=1e-6)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-11, atol=1e-13)


def test_averaging_micro_batch_means_would_be_caught():
    whole = ragged_batch(8)
    model = make_model(dropout=0.0).double()
    model(**whole).loss.backward()
    expected = gradients(model)
    model.zero_grad()
    for i in (1, 2, 3, 4):
        part = {k: v[i : i + 1] for k, v in whole.items()}
        (model(**part).loss / 4).backward()
    assert (gradients(model)["head.weight"] - expected["head.weight"]).abs().max() > 1e-3


def test_a_model_that_shifts_labels_itself_is_counted_by_its_targets(make_trainer):
    model = make_model()
    model.shifts_labels = True
    ids = torch.randint(0, VOCAB, (2, 9))
    assert make_trainer(model=model).objective.count_targets({"input_ids": ids, "labels": ids}) == 16
    model.shifts_labels = False
    assert (
        make_trainer(model=model, out="other").objective.count_targets({"input_ids": ids, "labels": ids})
        == 18
    )


def test_batch_size_and_accumulation_are_interchangeable(make_trainer):
    models = [make_model(dropout=0.0) for _ in range(2)]
    big = make_trainer(model=models[0], batch_size=8, out="a").fit()
    small = make_trainer(model=models[1], batch_size=2, accumulate=4, out="b").fit()
    assert big.tokens == small.tokens
    for a, b in zip(models[0].parameters(), models[1].parameters()):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_loss_comes_down_and_is_logged(make_trainer):
    seen = []
    trainer = make_trainer(
        dev=make_data(seed=1), max_steps=60, eval_every=20, log_every=7, keywords={"on_record": seen.append}
    )
    result = trainer.fit()
    assert result.stopped == "done after 60 steps"
    assert result.last.perplexity < 0.5 * result.first.perplexity
    assert result.first.perplexity == pytest.approx(math.exp(result.first.loss))
    records = [json.loads(line) for line in (trainer.directory.path / "log.jsonl").read_text().splitlines()]
    assert records == result.log == seen
    assert [r["step"] for r in records if r["event"] == "train"] == [1, *range(7, 60, 7), 60]
    assert [r["step"] for r in records if r["event"] == "eval"] == [0, 20, 40, 60]
    for record in records:
        if record["event"] == "train":
            assert {"loss", "lr", "grad_norm", "tokens", "tokens_per_second", "seconds"} <= record.keys()
            assert record["tokens"] == record["step"] * 4 * 9


def test_same_seed_same_bits_and_another_seed_another_run(make_trainer):
    def train(out, seed):
        model = make_model()
        make_trainer(model=model, out=out, seed=seed).fit()
        return model.head.weight.detach()

    first = train("a", 0)
    torch.rand(5)
    assert torch.equal(first, train("b", 0))
    assert not torch.equal(first, train("c", 1))


def test_evaluation_is_exact_and_disturbs_nothing(make_trainer):
    model = make_model().double()
    data = make_data(tokens=100)
    trainer = make_trainer(model=model, batch_size=5)
    before = torch.get_rng_state()
    model.train()
    evaluation = trainer.evaluate(data)
    assert model.training
    assert torch.equal(before, torch.get_rng_state())
    model.eval()
    items = list(data)
    whole = {key: torch.stack([item[key] for item in items]) for key in items[0]}
    assert evaluation.loss == pytest.approx(model(**whole).loss.item(), rel=1e-12)
    assert evaluation.targets == data.num_targets()


def test_evaluation_can_be_cut_short_and_needs_data(make_trainer):
    trainer = make_trainer(eval_batches=2)
    assert trainer.evaluate(make_data()).targets == 2 * 4 * 8
    with pytest.raises(ValueError, match="no dev_data"):
        trainer.evaluate()
    unlabelled = [{"input_ids": torch.zeros(9, dtype=torch.long), "labels": torch.full((9,), IGNORE_INDEX)}]
    with pytest.raises(ValueError, match="all labels are -100"):
        trainer.evaluate(unlabelled)


def test_an_evaluation_of_some_batches_is_of_rows_from_all_of_the_data(make_trainer):
    """Packed rows begin with the longest documents: their first batches alone would be another set."""
    documents = [[1 + number % 20] * (30 - number // 2) for number in range(60)]
    tokens = np.concatenate([np.asarray(each, np.int64) for each in documents])
    ends = np.cumsum([len(each) for each in documents])
    rows = BestFitDataset(tokens, np.stack((np.append(0, ends[:-1]), ends), 1), 31)
    seen = []

    class Recorded:
        def __len__(self):
            return len(rows)

        def __getitem__(self, index):
            seen.append(index)
            return {name: rows[index][name] for name in ("input_ids", "labels")}

    trainer = make_trainer(eval_batches=2, batch_size=4)
    some = trainer.evaluate(Recorded())
    assert len(seen) == 8
    assert seen == sorted(set(seen))
    gaps = {b - a for a, b in pairwise([*seen, len(rows) + seen[0]])}
    assert max(gaps) - min(gaps) <= 1
    assert trainer.evaluate(Recorded()) == some
    seen.clear()
    make_trainer(eval_batches=99, batch_size=4, out="all").evaluate(Recorded())
    assert seen == list(range(len(rows)))


def test_the_best_model_is_kept_at_the_top(make_trainer):
    trainer = make_trainer(dev=make_data(seed=1), max_steps=12, eval_every=4, lr=3.0, warmup_steps=0)
    result = trainer.fit()
    assert result.best.loss < result.last.loss
    saved = make_model(seed=9)
    saved.load_state_dict(load_file(trainer.directory.path / "model.safetensors"))
    trainer.model.load_state_dict(saved.state_dict())
    assert trainer.evaluate().loss == pytest.approx(result.best.loss, rel=1e-6)


def test_epochs_decide_the_number_of_steps(make_trainer):
    train = make_data()
    result = make_trainer(train=train, max_steps=None, max_epochs=2, batch_size=5).fit()
    assert result.steps == math.ceil(2 * len(train) / 5)
    assert make_trainer(max_steps=3, max_epochs=100, out="b").fit().steps == 3


def test_early_stopping(make_trainer):
    options = {"dev": make_data(seed=1), "max_steps": 1000, "eval_every": 2, "patience": 3}
    result = make_trainer(lr=5.0, warmup_steps=0, **options).fit()
    assert result.steps < 1000
    assert "no gain in 3 evaluations" in result.stopped


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_after_the_step_with_a_checkpoint(make_trainer, number):
    def interrupt(record):
        if record["event"] == "train" and record["step"] == 5:
            os.kill(os.getpid(), number)

    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    result = make_trainer(max_steps=50, log_every=5, keywords={"on_record": interrupt}).fit()
    assert result.interrupted
    assert result.steps == 5
    assert number.name in result.stopped
    assert result.checkpoint.name == "checkpoint-5"
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers


def test_a_second_ctrl_c_does_not_wait(make_trainer):
    def interrupt(record):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        make_trainer(keywords={"on_record": interrupt}).fit()


def test_gradients_are_clipped_to_the_norm_and_the_log_has_the_norm_before(make_trainer):
    trainer = make_trainer(grad_clip=0.01)
    trainer.objective.accumulate([ragged_batch(8)])
    before = math.sqrt(sum(float(p.grad.square().sum()) for p in trainer.model.parameters()))
    assert trainer.objective.clip_gradients(trainer.config.grad_clip) == pytest.approx(before, rel=1e-5)
    after = math.sqrt(sum(float(p.grad.square().sum()) for p in trainer.model.parameters()))
    assert after == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("share", [0.5, 1 - 1e-6, 1.0, 1 + 1e-6, 1 + 1e-5, 2.0])
def test_clipping_gives_torchs_bits(make_trainer, monkeypatch, share):
    """Also where nothing is clipped, which leaves the gradients alone."""
    trainer = make_trainer()
    trainer.objective.accumulate([ragged_batch(8)])
    norm = float(torch.nn.utils.get_total_norm([p.grad for p in trainer.model.parameters()]))
    copies = [torch.nn.Parameter(p.detach().clone()) for p in trainer.model.parameters()]
    for copy, parameter in zip(copies, trainer.model.parameters()):
        copy.grad = parameter.grad.clone()
    torch.nn.utils.clip_grad_norm_(copies, share * norm)
    if share > 1 + 1e-4:
        monkeypatch.setattr(torch.nn.utils, "clip_grads_with_norm_", None)
    assert trainer.objective.clip_gradients(share * norm) == norm
    for copy, parameter in zip(copies, trainer.model.parameters()):
        assert torch.equal(copy.grad, parameter.grad)


def test_a_step_without_any_label_is_reported(make_trainer):
    blank = [{"input_ids": torch.zeros(9, dtype=torch.long), "labels": torch.full((9,), IGNORE_INDEX)}]
    result = make_trainer(train=blank, max_steps=1).fit()
    assert any("all labels are -100" in r.get("text", "") for r in result.log)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_cuda_runs_learn_and_resume_bit_by_bit(make_trainer, precision):
    options = {
        "device": "cuda",
        "precision": precision,
        "deterministic": True,
        "max_steps": 40,
        "save_every": 15,
    }
    straight = make_trainer(out="straight", dev=make_data(seed=1), **options)
    result = straight.fit()
    assert result.last.perplexity < 0.6 * result.first.perplexity

    def interrupt(record):
        if record["event"] == "train" and record["step"] == 20:
            os.kill(os.getpid(), signal.SIGTERM)

    parts = {"out": "parts", "dev": make_data(seed=1), **options}
    make_trainer(**parts, keywords={"on_record": interrupt}).fit()
    second = make_trainer(**parts, model=make_model(seed=3), resume="auto")
    second.fit()
    assert torch.equal(second.model.head.weight, straight.model.head.weight)


def test_deterministic_algorithms_are_for_the_run_only(make_trainer):
    seen = []
    record = {"on_record": lambda record: seen.append(torch.are_deterministic_algorithms_enabled())}
    make_trainer(deterministic=True, max_steps=1, keywords=record).fit()
    make_trainer(max_steps=1, out="b", keywords=record).fit()
    assert set(seen[:1]) == {True}
    assert not seen[-2]
    assert not torch.are_deterministic_algorithms_enabled()


def test_compiled_training_uses_the_compiled_model_and_saves_the_plain_one(make_trainer, monkeypatch):
    class Compiled(nn.Module):
        calls = 0

        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, **batch):
            Compiled.calls += 1
            return self.inner(**batch)

    monkeypatch.setattr(torch, "compile", Compiled)
    dev = make_data(seed=1)
    trainer = make_trainer(compile=True, dev=dev, max_steps=2)
    trainer.fit()
    assert Compiled.calls == 2 + 2 * math.ceil(len(dev) / 4)
    saved = load_file(trainer.directory.path / "model.safetensors")
    assert saved.keys() == make_model().state_dict().keys()


def test_flops_utilisation_is_logged_when_the_peak_is_known(make_trainer):
    result = make_trainer(peak_tflops=0.001, max_steps=3, log_every=1).fit()
    record = next(r for r in result.log if r["event"] == "train")
    flops_per_token = 3 * 2 * 12 * VOCAB
    assert record["mfu"] == pytest.approx(record["tokens_per_second"] * flops_per_token / 1e9, rel=0.01)
    assert "mfu" not in make_trainer(max_steps=1, out="b").fit().log[0]


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"precision": "float16"}, "precision: got float16 on cpu"),
        ({"device": "warp"}, "device: 'warp' is not available"),
        ({"device": "meta"}, "device: got 'meta'"),
    ],
)
def test_what_the_machine_lacks_is_refused_before_anything_is_written(
    make_trainer, tmp_path, options, complaint
):
    with pytest.raises(ConfigError, match=complaint):
        make_trainer(**options)
    assert not list(tmp_path.iterdir())


def test_bad_arguments_are_refused(make_trainer):
    with pytest.raises(ValueError, match="train_data: is empty"):
        make_trainer(train=[])
    with pytest.raises(ValueError, match="dev_data: is empty"):
        make_trainer(dev=[])
    with pytest.raises(ValueError, match="no parameter requires a gradient"):
        make_trainer(model=nn.Identity())
    with pytest.raises(TypeError, match='dict of tensors with "labels"'):
        make_trainer(train=[torch.zeros(3)] * 4).fit()

    class Lossless(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = make_model()

        def forward(self, **batch):
            return SimpleNamespace(loss=None)

    with pytest.raises(TypeError, match="output's loss is None"):
        make_trainer(model=Lossless(), out="b").fit()
