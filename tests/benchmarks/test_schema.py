"""What a result file must be, on save and on load."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from report import schema

ROW = {
    "provider": "fastattn",
    "status": "ok",
    "time_ms": {"median": 2.0, "p20": 1.5, "p80": 2.5, "samples": 5},
    "error": {"out": 1e-6},
    "within_rule": True,
    "tflops": 0.1,
    "gbps": None,
    "host_ms": None,
    "ceiling_share": 0.5,
    "peak_memory_mib": 3.5,
}
CASE = {
    "name": "dense",
    "label": "a dense call",
    "axis": {"name": "sequence length", "value": 8, "line": "causal"},
    "group": "dense",
    "params": {"seqlen_q": 8},
    "direction": "forward",
    "dtype": "float32",
    "flops": 1e6,
    "bytes": None,
    "target": {"provider": "fastattn", "against": "sdpa", "speed": 1.0},
    "rows": [ROW, {"provider": "sdpa", "status": "unavailable", "reason": "none"}],
}


def _result() -> dict[str, Any]:
    result = schema.new_result("attention", torch.device("cpu"), {"quick": True})
    result["cases"] = [copy.deepcopy(CASE)]
    return result


def test_a_saved_result_loads_equal(tmp_path: Path) -> None:
    result = _result()
    schema.save(result, tmp_path / "cpu" / "attention.json")
    assert schema.load(tmp_path / "cpu" / "attention.json") == result
    assert [file.name for file in (tmp_path / "cpu").iterdir()] == ["attention.json"]


def test_a_new_result_says_where_it_comes_from() -> None:
    result = _result()
    assert result["versions"]["torch"] == torch.__version__
    assert result["device"]["kind"] == "cpu"
    assert result["device"]["threads"] == torch.get_num_threads()
    assert schema.folder_name(result["device"]).partition("-")[0] == "cpu"
    names = {"AMD EPYC, AVX2": "cpu-amd", "Intel(R) Xeon(R) Processor": "cpu-intel", "Some CPU": "cpu"}
    assert {name: schema.folder_name({"kind": "cpu", "name": name}) for name in names} == names
    assert schema.folder_name({"kind": "cuda", "name": "NVIDIA H100 80GB HBM3"}) == "nvidia-h100-80gb-hbm3"


def _set(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(result: dict[str, Any]) -> None:
        *outer, last = path.split("/")
        target: Any = result
        for step in outer:
            target = target[int(step) if step.isdigit() else step]
        target[int(last) if last.isdigit() else last] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set("version", 99), "format, version"),
        (_set("bench", 3), "bench"),
        (_set("cases/0/label", None), "label"),
        (_set("cases/0/axis/value", "8"), "axis"),
        (_set("cases/0/rows/0/gbps", "fast"), "gbps"),
        (_set("date", "yesterday"), "does not match"),
        (_set("dirty", "no"), "dirty"),
        (_set("device/threads", True), "threads"),
        (_set("versions/torch", None), "torch"),
        (_set("cases/0/direction", "sideways"), "direction"),
        (_set("cases/0/rows/0/status", "fine"), "status"),
        (
            _set("cases/0/rows/0/time_ms", {"median": 3.0, "p20": 1.0, "p80": 2.0, "samples": 5}),
            "p20 <= median",
        ),
        (_set("cases/0/rows/0/time_ms", {"median": 0.0, "p20": 0.0, "p80": 0.0, "samples": 5}), "0 < p20"),
        (_set("cases/0/rows/0/error", {"out": float("nan")}), "finite"),
        (_set("cases/0/rows/1", {"provider": "sdpa", "status": "failed"}), "reason"),
        (_set("cases/0/rows/0/peak_memory_mib", "little"), "peak_memory_mib"),
        (_set("settings", {"file": "/some/body/else"}), "without a machine's paths"),
        (_set("cases", [copy.deepcopy(CASE), copy.deepcopy(CASE)]), "distinct names"),
        (_set("cases", ["dense"]), "distinct names"),
    ],
)
def test_a_wrong_result_is_refused_by_field(
    change: Callable[[dict[str, Any]], None], message: str, tmp_path: Path
) -> None:
    result = _result()
    change(result)
    with pytest.raises(ValueError, match=message):
        schema.save(result, tmp_path / "attention.json")
    assert not (tmp_path / "attention.json").exists()
    (tmp_path / "attention.json").write_text(json.dumps(result), encoding="utf-8")
    with pytest.raises(ValueError, match=r"attention\.json: .*" + message):
        schema.load(tmp_path / "attention.json")


@pytest.mark.parametrize("text", ["", "[]", "{", '{"format": "fastattn-bench"}'])
def test_what_is_not_a_result_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"x\.json"):
        schema.load(tmp_path / "x.json")


def test_paths_are_cut_to_their_last_part() -> None:
    assert schema.without_paths("cannot open /usr/lib/libx.so.1: no") == "cannot open libx.so.1: no"
    assert schema.without_paths("12 GB/s, and/or 3/4") == "12 GB/s, and/or 3/4"


def test_merge_replaces_cases_of_the_same_name() -> None:
    earlier, later = _result(), _result()
    earlier["cases"].append({**CASE, "name": "other"})
    later["cases"][0]["rows"][0]["tflops"] = 9.0
    merged = schema.merge(earlier, later)
    assert [case["name"] for case in merged["cases"]] == ["dense", "other"]
    assert merged["cases"][0]["rows"][0]["tflops"] == 9.0


def test_results_of_two_commits_do_not_merge() -> None:
    earlier, later = _result(), _result()
    later["revision"] = "another"
    with pytest.raises(ValueError, match="revision"):
        schema.merge(earlier, later)
