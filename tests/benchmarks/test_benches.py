"""Every bench: cases of both devices have names, labels and small forms whose providers compute the same."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fastattn import bench
from measure import calls, harness
from report import schema

CPU = torch.device("cpu")
DEVICES = ("cpu", "cuda")
BRIEF = harness.Budget(seconds=0, least_rounds=1, most_rounds=1, least_sample_seconds=0, memory=False)
CEILINGS: dict[str, Any] = {"matmul_tflops": {"float32": 1.0, "bfloat16": 1.0}, "copy_gbps": 1.0}
SLOW_TO_COMPILE = "compile|flex"
JUDGED = ("varlen", "decode", "softmax", "cross-entropy")
MODULES = {name: import_module(bench.script(name).stem) for name in bench.NAMES}


def _forms(name: str) -> list[Any]:
    """The cases of a CPU, and of the GPU's one of each group and direction, in their small forms, each once."""
    cases = list(MODULES[name].cases_for(CPU))
    kinds = {(c.group, c.direction, c.dtype): c for c in MODULES[name].cases_for(torch.device("cuda"))}
    forms = [case.small() for case in [*cases, *kinds.values()]]
    return list({(f.label, f.group, f.direction, tuple(f.providers(CPU))): f for f in forms}.values())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", bench.NAMES)
def test_cases_can_be_told_apart_and_stored(name: str, device: str) -> None:
    cases = MODULES[name].cases_for(torch.device(device))
    assert len({case.name for case in cases}) == len({case.label for case in cases}) == len(cases)
    for case in cases:
        assert case.target is None or case.target["provider"] in case.providers(torch.device(device))
        assert case.small().target is None
        assert json.dumps([case.params, case.axis])
        assert case.flops is None or case.flops > 0
        assert case.bytes is None or case.bytes > 0
        assert not (case.flops and case.bytes)


@pytest.mark.parametrize(
    ("name", "case"), [pytest.param(n, c, id=f"{n}-{c.label}") for n in JUDGED for c in _forms(n)]
)
def test_providers_keep_to_the_error_rule(name: str, case: Any) -> None:
    """Ours keeps the rule; peers that run on a CPU are near it, so that all compute the same thing."""
    only = f"^(?!.*({SLOW_TO_COMPILE}))(fastattn-torch|fastattn$|sdpa|torch)"
    entry = harness.run_case(case, CPU, BRIEF, CEILINGS, only=only)
    ran = [row for row in entry["rows"] if row["status"] == "ok"]
    # a GPU's forms name their backends, none of which an "auto" call on a CPU would be: those rows say so
    assert {row["status"] for row in entry["rows"]} <= {"ok", "unavailable", "failed"}
    assert ran or case.dtype == torch.bfloat16
    for row in ran:
        if row["provider"].startswith("fastattn"):
            assert row["within_rule"], row
        elif row["error"] is None:
            assert case.dropout_p, row  # each draws its own
        else:
            # another's kernel is not ours to hold to the rule: it is to compute the same thing
            assert max(row["error"].values()) < (0.06 if case.dtype == torch.bfloat16 else 2e-5), row


@pytest.mark.parametrize(
    "name", ["varlen", "decode", "train", "generate", "models", "swap", "overhead", "cross-entropy"]
)
def test_the_command_stores_a_result(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if name in ("train", "generate", "models", "swap"):
        pytest.importorskip("transformers")
    case = MODULES[name].cases_for(CPU)[0].name
    options = ["--device", "cpu", "--quick", "--only", f"^{case.replace('+', '.')}$", "--out", str(tmp_path)]
    only = ["--providers", f"^(?!.*({SLOW_TO_COMPILE}))"]
    assert MODULES[name].main([*options, *only, "--csv", str(tmp_path)]) == 0
    (stored,) = schema.load(tmp_path / f"{name}.json")["cases"]
    assert [row["status"] for row in stored["rows"]] == ["ok"] * len(stored["rows"])
    assert len((tmp_path / f"{name}.csv").read_text(encoding="utf-8").splitlines()) == 1 + len(stored["rows"])
    assert stored["label"]
    assert case in capsys.readouterr().out


def test_lengths_of_a_packed_batch_span_what_they_say() -> None:
    case = MODULES["varlen"].cases_for(CPU)[0]
    assert (min(case.lengths), max(case.lengths), len(case.lengths)) == (8, 128, 32)
    assert case.params["tokens"] == sum(case.lengths)
    assert case.flops == 4.0 * 64 * 12 * sum(n * n for n in case.lengths)


def test_a_training_step_counts_its_products_and_pairs() -> None:
    case = next(c for c in MODULES["train"].cases_for(CPU) if c.group == "train")
    weights, tokens = 12 * 12 * 768**2 + 50257 * 768, 512
    attention = 3.5 * 12 * 4 * 768 * tokens * (tokens + 1) / 2
    assert case.flops == 6.0 * weights * tokens + attention


def test_generated_bytes_are_the_weights_once_per_token() -> None:
    case = MODULES["generate"].cases_for(CPU)[0]
    assert case.bytes == 24 * 4 * (12 * 12 * 768**2 + 50257 * 768)


def test_floors_of_models_count_tokens_that_are_no_padding() -> None:
    """Operations of a case, and those that its row of products runs."""
    cases = {case.name: case for case in MODULES["models"].cases_for(CPU)}
    lengths = cases["bert-base-32x8-128-padded"].lengths
    assert (len(lengths), int(lengths.min()), int(lengths.max())) == (32, 8, 128)
    products = 2.0 * 12 * 12 * 768**2 * int(lengths.sum())
    attention = 4.0 * 12 * 768 * sum(int(n) ** 2 for n in lengths)
    assert cases["bert-base-32x8-128-padded"].flops == products + attention
    training = cases["bert-base-2-layers-training"]
    assert training.flops == 3 * (products + attention) / 6
    llama = cases["llama-decode-ragged"]
    block = 576 * (576 + 2 * 192 + 576) + 3 * 576 * 1536
    assert llama.bytes == 16 * 4.0 * (30 * block + 32000 * 576)
    step = training.small().open(CPU).step("floor-weight-products")
    counter = FlopCounterMode(display=False)
    with counter:
        step()
    assert counter.get_total_flops() == 6 * 2 * (4 * 64 * 64 + 2 * 64 * 128) * int(
        training.small().lengths.sum()
    )


def test_on_a_gpu_overhead_is_held_against_flex_attention_too() -> None:
    """Its providers run wherever torch compiles; launches are counted by their names in a profile."""
    from measure import launches

    cases = {case.name: case for case in MODULES["overhead"].cases_for(torch.device("cuda"))}
    with_flex = [name for name, case in cases.items() if "flex" in case.providers(torch.device("cuda"))]
    assert {name.rsplit("-forward")[0] for name in with_flex} == {"attention", "attention-window"}
    for name in with_flex:
        assert "flex" not in cases[name].providers(CPU)
    profile = [
        "aten::add",
        "cudaLaunchKernel",
        "cuLaunchKernelEx",
        "cudaMemsetAsync",
        "cudaDeviceSynchronize",
    ]
    assert launches.among(profile) == 2


def test_a_forward_in_grad_mode_records_a_graph_and_runs_no_backward() -> None:
    """The three directions of the overhead: no_grad, grad mode, and with the backward."""
    made: list[torch.Tensor] = []

    def call(x: torch.Tensor) -> torch.Tensor:
        made.append(x * 2)
        return made[-1]

    x = torch.ones(3)
    keys = {}
    for direction in ("forward", "forward-grad", "forward+backward"):
        keys[direction] = set(calls.results_of(call, calls.leaves_of({"dx": x}, direction), x, direction))
    assert [out.requires_grad for out in made] == [False, True, True]
    assert keys == {"forward": {"out"}, "forward-grad": {"out"}, "forward+backward": {"out", "dx"}}
    names = {case.name for case in MODULES["overhead"].cases_for(CPU)}
    assert {f"{op}-{direction}" for op in ("attention", "cross-entropy") for direction in keys} <= names
