"""The attention bench: its cases are what they claim, and every provider computes the same thing."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import bench_attention
from cases.attention import AttentionCase, AttentionWorkload, cases_for, gpu_cases
from inputs.attention import permitted_pairs
from measure import command, harness
from measure.options import build_parser
from report import schema

CPU = torch.device("cpu")
BRIEF = harness.Budget(seconds=0, least_rounds=1, most_rounds=1, least_sample_seconds=0, memory=False)
CEILINGS: dict[str, Any] = {"matmul_tflops": {}, "copy_gbps": None}


def _case(name: str, **changes: Any) -> AttentionCase:
    sizes = {"batch": 1, "heads": 4, "kv_heads": 2, "seqlen_q": 96, "seqlen_k": 96, "head_dim": 16}
    return AttentionCase(
        **{"name": name, "group": "test", "peers": ("sdpa", "composite"), **sizes, **changes}
    )


FEATURES = {
    "full": {},
    "causal": {"causal": True},
    "causal, fewer queries": {"causal": True, "seqlen_q": 40},
    "window": {"window": (20, 3)},
    "documents": {"documents": 3},
    "causal documents": {"documents": 5, "causal": True},
    "alibi": {"alibi": True, "causal": True},
    "softcap": {"softcap": 2.0, "causal": True},
    "bias": {"bias": True},
    "mask": {"random_mask": True, "batch": 2},
    "bf16": {"causal": True, "dtype": torch.bfloat16},
}


@pytest.mark.parametrize("direction", ["forward", "backward", "forward+backward"])
@pytest.mark.parametrize("name", FEATURES)
def test_every_provider_keeps_to_the_error_rule(name: str, direction: str) -> None:
    case = _case(name, direction=direction, **FEATURES[name])
    entry = harness.run_case(case, CPU, BRIEF, CEILINGS)
    rows = {row["provider"]: row for row in entry["rows"]}
    assert rows["fastattn"]["within_rule"] is True
    for row in rows.values():
        if row["status"] == "unavailable":
            assert (row["provider"], name) == ("sdpa", "softcap")
            continue
        assert row["within_rule"], row
        names = {"out", "dq", "dk", "dv"} if direction != "backward" else {"dq", "dk", "dv"}
        names = {"out"} if direction == "forward" else names | ({"dbias"} if name == "bias" else set())
        assert row["error"].keys() == names


def test_a_peer_with_its_own_dropout_mask_is_not_judged() -> None:
    entry = harness.run_case(_case("dropout", dropout_p=0.3), CPU, BRIEF, CEILINGS)
    judged = {row["provider"]: row["within_rule"] for row in entry["rows"]}
    assert judged == {"fastattn": True, "sdpa": None, "composite": None}


@pytest.mark.parametrize("name", ["full", "causal", "causal, fewer queries", "alibi", "documents"])
def test_a_peer_that_is_given_the_dense_mask_computes_the_same(name: str) -> None:
    case = replace(_case(name, **FEATURES[name]), peers=("sdpa-dense",))
    entry = harness.run_case(case, CPU, BRIEF, CEILINGS)
    assert [(row["status"], row["within_rule"]) for row in entry["rows"]] == [("ok", True)] * 2


def test_what_a_dense_mask_could_say_is_to_be_as_fast_in_no_more_memory() -> None:
    targets = {case.name: case.target for case in cases_for(CPU)}
    for name in ("alibi-causal-2048", "random-mask-2048", "gqa-causal-2048", "bias-grad-1024"):
        assert (targets[name]["speed"], targets[name]["memory"]) == (1.0, 1.0)
    speeds = [targets[n]["speed"] for n in ("dense-causal-2048", "window-255-8192", "packed-causal-8192")]
    assert speeds == [0.98, 13.8, 10.0]


@pytest.mark.parametrize("name", [name for name in FEATURES if name not in ("mask", "bf16")])
def test_permitted_pairs_count_the_mask(name: str) -> None:
    case = _case(name, **FEATURES[name])
    mask = AttentionWorkload(case, CPU).dense_mask().expand(1, 1, case.seqlen_q, case.seqlen_k)
    pairs = permitted_pairs(case.seqlen_q, case.seqlen_k, case.causal, case.window, case.documents)
    assert pairs == int(mask.sum())
    assert case.flops == 3.5 * 4 * 16 * 4 * pairs


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_cases_have_names_of_their_own_and_small_forms(device: str) -> None:
    cases = cases_for(torch.device(device))
    assert len({case.name for case in cases}) == len(cases)
    for case in cases:
        small = case.small()
        assert small.seqlen_k <= 160
        assert replace(small, **{n: getattr(case, n) for n in _sizes()}) == replace(case, target=None)


def _sizes() -> tuple[str, ...]:
    return "batch", "heads", "kv_heads", "seqlen_q", "seqlen_k", "window"


def test_the_grid_is_16k_tokens_of_width_2048() -> None:
    grid = [case for case in gpu_cases() if case.group in ("forward", "backward")]
    assert len(grid) == 2 * 3 * 2 * 6
    assert {case.batch * case.seqlen_q for case in grid} == {16384}
    assert {case.heads * case.head_dim for case in grid} == {2048}


def test_a_quick_run_prints_stores_and_exports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stored, table = tmp_path / "x.json", tmp_path / "x.csv"
    options = [
        "--device",
        "cpu",
        "--only",
        "^dense-causal-512$",
        "--quick",
        "--out",
        str(stored),
        "--csv",
        str(table),
    ]
    assert bench_attention.main(options) == 0
    result = schema.load(stored)
    assert [case["name"] for case in result["cases"]] == ["dense-causal-160"]
    assert {row["provider"]: row["status"] for row in result["cases"][0]["rows"]} == {
        "fastattn": "ok",
        "sdpa": "ok",
    }
    assert result["settings"]["quick"] is True
    assert len(table.read_text(encoding="utf-8").splitlines()) == 3
    printed = capsys.readouterr().out
    assert "dense-causal-160  [forward+backward, float32]" in printed
    assert "the small form of dense-causal-512" in printed
    again = ["--device", "cpu", "--only", "^gqa-causal-2048$", "--providers", "sdpa$", "--quick", "--merge"]
    assert bench_attention.main([*again, "--out", str(stored), "--revision", str(result["revision"])]) == 0
    assert [len(case["rows"]) for case in schema.load(stored)["cases"]] == [2, 1]


def test_a_ceiling_is_the_better_of_two_measurements() -> None:
    row = {"provider": "fastattn", "tflops": 3.0, "gbps": None, "ceiling_share": 1.5}
    moved = {"provider": "fastattn", "tflops": None, "gbps": 2.5, "ceiling_share": 2.0}
    result = {
        "ceilings": {"matmul_tflops": {"float32": 2.0, "bfloat16": 9.0}, "copy_gbps": 5.0},
        "cases": [
            {"dtype": "float32", "rows": [row, {"provider": "flex", "status": "failed"}]},
            {"dtype": "float32", "rows": [moved]},
        ],
    }
    command._raise_ceilings(result, {"matmul_tflops": {"float32": 6.0, "bfloat16": 8.0}, "copy_gbps": 4.0})
    assert result["ceilings"] == {"matmul_tflops": {"float32": 6.0, "bfloat16": 9.0}, "copy_gbps": 5.0}
    assert (row["ceiling_share"], moved["ceiling_share"]) == (0.5, 0.5)


def test_warming_hands_each_process_its_share(tmp_path: Path) -> None:
    script = tmp_path / "bench.py"
    script.write_text(
        f"import sys; open({str(tmp_path)!r} + '/' + sys.argv[-1] + '.txt', 'w').write(' '.join(sys.argv))"
    )
    options = build_parser("attention").parse_args(["--device", "cpu", "--providers", "flex", "--warm", "2"])
    command.warm(script, ["a", "b", "c"], options)
    arguments = {file.stem: file.read_text().split()[1:] for file in tmp_path.glob("*.txt")}
    common = ["--device", "cpu", "--providers", "flex", "--warm-cases"]
    assert arguments == {"c": [*common, "a", "c"], "b": [*common, "b"]}


def test_warming_runs_what_compiles_and_leaves_failures_to_the_measured_run() -> None:
    ran: list[str] = []

    class Recorder:
        def providers(self, device: torch.device) -> list[str]:
            return ["fastattn-triton", "sdpa", "flex", "fastattn-torch"]

        def small(self) -> Recorder:
            return self

        def open(self, device: torch.device) -> Recorder:
            return self

        def step(self, provider: str) -> Any:
            ran.append(provider)
            raise RuntimeError("no such kernel")

    command.warm_cases([Recorder()], CPU, "triton|flex|sdpa")
    assert ran == ["flex"]


def test_a_bench_names_its_file_in_a_folder(tmp_path: Path) -> None:
    assert command.destination("a/b.json", "varlen", ".json") == Path("a/b.json")
    assert command.destination(str(tmp_path), "cross-entropy", ".csv") == tmp_path / "cross-entropy.csv"


def test_an_unknown_case_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_attention.main(["--device", "cpu", "--only", "nosuchcase"]) == 2
    assert "no case matches nosuchcase" in capsys.readouterr().err


def test_partial_runs_do_not_replace_the_stored_results() -> None:
    result = schema.new_result("attention", CPU, {})
    full = build_parser("attention").parse_args([])
    assert command._json_path("attention", result, full) == (
        schema.RESULTS / schema.folder_name(result["device"]) / "attention.json"
    )
    for partial in (["--quick"], ["--only", "x"], ["--providers", "x"], ["--no-memory"], ["--no-errors"]):
        chosen = build_parser("attention").parse_args(partial)
        assert command._json_path("attention", result, chosen) is None
    assert json.loads(json.dumps(result)) == result
