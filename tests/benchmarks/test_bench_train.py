"""The benches of whole models run every case in its small form and their providers agree."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cases import first_step, lookup, train_runs
from cases import generate as bench_generate
from cases import models as bench_models
from cases import train as bench_train
from numerics import assert_within_rule
from peers import trained
from report import figures

CPU = torch.device("cpu")


STEPS = [case for case in bench_train.cases_for(CPU) if isinstance(case, bench_train.TrainCase)]


@pytest.mark.parametrize("case", STEPS, ids=lambda case: case.name)
def test_losses_agree(case: Any) -> None:
    pytest.importorskip("transformers")
    workload = case.small().open(CPU)
    judgement = workload.judge("fastattn")
    assert (judgement is None) == bool(case.dropout)
    for provider in case.providers(CPU):
        loss = workload.step(provider)()["loss"].double()
        if judgement is not None and case.dtype == torch.float32:
            torch.testing.assert_close(loss, judgement.golden["loss"], rtol=1e-5, atol=0)
        elif judgement is not None:
            plain = judgement.plain()["loss"]
            assert_within_rule(loss, plain, judgement.golden["loss"], dtype=case.dtype)


@pytest.mark.parametrize("case", train_runs.run_cases(), ids=lambda case: case.name)
def test_training_as_it_is_run_has_the_peers_work(case: Any) -> None:
    """In small: the same texts and documents go through every provider, and each step updates or makes something."""
    pytest.importorskip("transformers")
    if case.group == "fine-tune":
        pytest.importorskip("accelerate")
    workload = case.small().open(CPU)
    first, second = ({n: workload.step(n)() for n in case.providers(CPU)} for _ in range(2))
    for name, found in first.items():
        for key, value in found.items():
            assert torch.isfinite(value.double()).all()
            if case.group in (
                "packed",
                "padded",
                "pairs",
            ):  # the same loss of the same texts by every provider
                torch.testing.assert_close(value, first["fastattn"][key])
            assert value.shape == second[name][key].shape
    if case.group == "packed":
        step = workload.step("fastattn")
        assert step()["loss"] > step()["loss"]
        assert sum(map(len, workload.documents)) == sum(
            int((row["segment_ids"] >= 0).sum()) for row in workload.rows
        )


def test_a_new_process_comes_to_its_first_step() -> None:
    entry = first_step.first_step_case(True)
    (row,) = entry["rows"]
    assert row["status"] == "ok"
    assert row["time_ms"]["median"] > 0


@pytest.mark.parametrize("case", bench_generate.cases_for(CPU), ids=lambda case: case.name)
def test_generated_tokens_agree(case: Any) -> None:
    pytest.importorskip("transformers")
    workload = case.small().open(CPU)
    names = [
        name
        for name in case.providers(CPU)
        if not name.startswith(figures.FLOOR) and name != bench_generate.INT8
    ]
    ours, *others = (workload.step(name)()["ids"] for name in names)
    for theirs in others:
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("case", bench_models.cases_for(CPU), ids=lambda case: case.name)
def test_encoders_agree(case: Any) -> None:
    pytest.importorskip("transformers")
    if bench_models.SENTENCES in case.providers(CPU):
        pytest.importorskip("sentence_transformers")
    workload = case.small().open(CPU)
    names = [name for name in case.providers(CPU) if not name.startswith(figures.FLOOR)]
    ours, *others = (workload.step(name)() for name in names)
    int8 = bench_models.INT8 in case.providers(CPU)
    for theirs in others:
        for key, result in ours.items():
            if int8:  # its weights are rounded
                assert torch.cosine_similarity(result, theirs[key]).mean() > bench_models.LEAST_COSINE
            else:
                torch.testing.assert_close(result, theirs[key])


@pytest.mark.parametrize("text", ["code", "prose"])
@pytest.mark.parametrize("sampled", [False, True])
def test_lookup_is_measured_on_the_text_of_a_trained_model(
    text: str, sampled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In small: the trained form of a case makes the same tokens with prompt lookup and without, and counts guesses."""
    for name, value in {
        "STEPS": 1,
        "BATCH": 2,
        "CHARACTERS": 20_000,
        "MODEL": {**trained.SMALL, "vocab_size": 300},
    }.items():
        monkeypatch.setattr(trained, name, value)
    monkeypatch.setattr(lookup, "trained", trained.trained.__wrapped__)
    case = lookup.LookupCase("x", text, do_sample=sampled, new_tokens=8, count=2)
    workload = case.open(CPU)
    assert workload.prompts.shape == (case.count, case.prompt)
    ours, without = (workload.step(name)()["ids"] for name in case.providers(CPU))
    assert torch.equal(ours, without)
    assert 1 <= case.found["tokens_per_step"] <= 8
    assert 0 <= case.found["right"] <= 1
    assert case.params.items() >= case.found.items()
    assert workload.model.decoder.__func__ is type(workload.model).decoder  # counting left nothing behind


def test_a_step_updates_the_providers_own_weights_only() -> None:
    case = bench_train.TrainCase("x", "train", 1, 24, update=True, peers=()).small()
    workload = case.open(CPU)
    before = {name: value.clone() for name, value in workload.pair.model.state_dict().items()}
    step = workload.step("fastattn")
    first, second = step()["loss"], step()["loss"]
    assert first != second
    for name, value in workload.pair.model.state_dict().items():
        assert torch.equal(value, before[name])


def test_products_count_every_matrix_of_a_block_once() -> None:
    from peers.gpt import GPTPair, product_weights

    pair = GPTPair("", CPU)
    width, layers, vocabulary = pair.config.n_embd, pair.config.n_layer, pair.config.vocab_size
    numbers = sum(weight.numel() for weight in product_weights(pair.model))
    assert numbers == layers * 12 * width**2 + vocabulary * width
