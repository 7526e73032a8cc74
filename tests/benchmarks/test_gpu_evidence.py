"""The evidence run: limits hold, a crash costs one section, what finished is kept, the table fits a screen."""

from __future__ import annotations

import json
import re
import sys
import time
from importlib import import_module
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

import pytest
import torch

import gpu_evidence
from evidence import run as evidence_run
from evidence import sections as plan
from evidence import summary as evidence_summary
from evidence.sections import Run, Section
from fastattn import bench
from measure import processes
from report import charts, schema
from report.tables import BENCHES


def _python(code: str) -> Any:
    return lambda run: [sys.executable, "-c", code]


FINDING = json.dumps({"check": "random", "status": "failed", "detail": "dq is off", "backend": "triton"})
PASSED = json.dumps({"check": "random", "status": "passed", "detail": "", "backend": "torch"})
FAKES = (
    Section("install", 20, _python("print('placed')")),
    Section("good", 20, _python(f"print('noise'); print('''{PASSED}''')")),
    Section("wrong", 20, _python(f"print('''{FINDING}'''); raise SystemExit(1)")),
    Section("crash", 20, _python("import os; os.kill(os.getpid(), 11)")),
    Section("hang", 1, _python("import time; print('began', flush=True); time.sleep(60)")),
    Section("not here", 20, lambda run: "needs two GPUs"),
)


def test_each_section_ends_by_itself_and_is_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(plan, "SECTIONS", FAKES)
    out = tmp_path / "out"
    assert gpu_evidence.main(["--dry-run", "--out", str(out), "--minutes", "2"]) == 1
    report = json.loads((out / "evidence.json").read_text(encoding="utf-8"))
    statuses = {entry["name"]: entry["status"] for entry in report["sections"]}
    assert statuses == {
        "install": "ok", "good": "ok", "wrong": "failed", "crash": "failed", "hang": "timeout", "not here": "skipped"
    }  # fmt: skip
    details = {entry["name"]: entry["detail"] for entry in report["sections"]}
    assert details["crash"].startswith("killed by signal 11")
    assert details["hang"] == "stopped after 1 s; began"
    assert details["wrong"] == "1 failed"
    assert details["not here"] == "needs two GPUs"
    assert "=== good" in (out / "log.txt").read_text(encoding="utf-8")
    assert sorted(file.name for file in out.iterdir()) == ["evidence.json", "log.txt", "table.txt"]
    table = capsys.readouterr().out
    assert "! random triton: dq is off" in table
    schema._no_paths(report, "report")

    assert (
        gpu_evidence.main(
            ["--dry-run", "--out", str(out), "--minutes", "2", "--sections", "good", "--resume"]
        )
        == 0
    )
    resumed = json.loads((out / "evidence.json").read_text(encoding="utf-8"))
    assert [entry["name"] for entry in resumed["sections"]] == ["good", "install"]


@pytest.mark.exhaustive
def test_a_section_in_its_small_form_stores_what_it_measured(tmp_path: Path) -> None:
    assert gpu_evidence.main(["--dry-run", "--out", str(tmp_path), "--sections", "losses"]) == 0
    report = json.loads((tmp_path / "evidence.json").read_text(encoding="utf-8"))
    assert [(entry["name"], entry["status"]) for entry in report["sections"]] == [
        ("install", "ok"),
        ("losses", "ok"),
    ]
    (measured,) = evidence_summary.load_all(tmp_path)
    assert measured["bench"] == "cross-entropy"
    assert {row["status"] for case in measured["cases"] for row in case["rows"]} <= {"ok", "unavailable"}


def test_sections_without_time_left_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "SECTIONS", FAKES[:2])
    gpu_evidence.main(["--dry-run", "--out", str(tmp_path), "--minutes", "0.01"])
    report = json.loads((tmp_path / "evidence.json").read_text(encoding="utf-8"))
    assert [entry["status"] for entry in report["sections"]] == ["not run", "not run"]


def test_a_killed_command_takes_its_children_along(tmp_path: Path) -> None:
    file = tmp_path / "pid"
    child = "import time; time.sleep(60)"
    code = f"import subprocess,sys; p=subprocess.Popen([sys.executable,'-c',{child!r}]);"
    code += f"open({str(file)!r},'w').write(str(p.pid)); p.wait()"
    ended, _ = processes.run([sys.executable, "-c", code], 2.0)
    assert ended.code is None
    pid = int(file.read_text())
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline and _alive(pid):
        time.sleep(0.05)
    assert not _alive(pid)


def _alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rsplit(")", 1)[1].split()[0]
    except OSError:
        return False
    return state != "Z"


def test_a_checkout_that_cannot_be_installed_is_linked(tmp_path: Path) -> None:
    evidence_run.link_checkout(tmp_path)
    package = PathFinder.find_spec("fastattn", [str(tmp_path)])
    assert package is not None
    for name, source in (("kernels", "kernels"), ("ops", "fastattn/ops"), ("backends", "fastattn/backends")):
        spec = PathFinder.find_spec(f"fastattn.{name}", package.submodule_search_locations)
        assert spec is not None
        assert Path(str(spec.origin)).is_relative_to(tmp_path)
        assert Path(str(spec.origin)).resolve() == schema.ROOT / source / "__init__.py"


@pytest.mark.parametrize("dry", [True, False])
def test_every_bench_section_selects_cases(
    dry: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run(tmp_path, 9, dry, {}, {"revision": "abc"}, time.monotonic())
    benches: dict[str, set[str]] = {}
    for section in plan.SECTIONS:
        line = section.command(run)
        for name in bench.NAMES:
            script = str(plan.bench_script(name))
            if isinstance(line, list) and script in line:
                options = line[line.index(script) + 1 :]
                assert import_module(Path(script).stem).main([*options, "--list", "--device", "cpu"]) == 0
                assert capsys.readouterr().out.strip()
                assert ("--quick" in options) is dry
                benches.setdefault(name, set()).add(section.name)
    assert benches.keys() == bench.NAMES.keys() - {"serve"}  # whose cases are of a CPU
    both = {"forward", "backward", "cuda-backward-bench"}
    assert benches["attention"] == {*both, "features", "flex", "flex-features"}


def test_the_compiled_providers_of_models_are_not_run_in_small(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    sections = {section.name: section for section in plan.SECTIONS}
    for dry in (True, False):
        run = Run(tmp_path, 9, dry, {}, {"revision": None}, time.monotonic())
        assert not re.search(_pattern(sections["train"].command(run)), "fastattn-compile")
        line = sections["train-compiled"].command(run)
        pattern = line[line.index("--providers") + 1]
        assert bool(re.search(pattern, "fastattn-compile")) is not dry
        assert "--warm" not in line


def _pattern(line: Any) -> str:
    return line[line.index("--providers") + 1]


def test_what_a_machine_lacks_is_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    run = Run(tmp_path, 9, False, {}, {"revision": None}, time.monotonic())
    commands = {section.name: section.command(run) for section in plan.SECTIONS}
    assert commands["build"] == "nvcc is not installed"
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "CPU build" in str(plan._build(run))
    if not Path("/usr/local/cuda/bin/compute-sanitizer").exists():
        assert commands["sanitizer"] == "compute-sanitizer is not installed"


def test_an_exit_status_no_finding_explains_is_told() -> None:
    passed = [{"status": "passed"}]
    ended, last = processes.Ended(9, 1.0), "===== ERROR SUMMARY: 2 errors"
    detail = evidence_run._detail(ended, last, passed)
    assert detail == "exit status 9 after 1 passed: ===== ERROR SUMMARY: 2 errors"
    assert evidence_run._detail(processes.Ended(0, 1.0), "x", passed) == "1 passed"
    late = processes.Ended(None, 9.0, "silent for 9 s in softmax")
    assert evidence_run._detail(late, "x", passed) == "silent for 9 s in softmax; 1 passed"


def _measured(bench_name: str, device: str, **changes: Any) -> dict[str, Any]:
    result = schema.new_result(bench_name, torch.device("cpu"), {"quick": False})
    result["device"] |= {"kind": "cuda", "name": device}
    time_ms = {"median": 100.0, "p20": 99.0, "p80": 101.0, "samples": 5}
    shared = {"status": "ok", "error": None, "within_rule": None, "peak_memory_mib": 1.0, "host_ms": 0.05}
    rows = [
        {**shared, "provider": name, "time_ms": {k: v * factor for k, v in time_ms.items() if k != "samples"} |
         {"samples": 5}, "tflops": 400.0 / factor, "gbps": None, "ceiling_share": 0.8}
        for name, factor in (("fastattn-compile", 1.0), ("transformers-sdpa", 1.5))
    ]  # fmt: skip
    case = {
        "name": "train-16x1024", "label": "a step", "axis": None, "group": "train", "direction": "forward+backward",
        "params": {"batch": 16, "seqlen": 1024}, "dtype": "bfloat16", "flops": 1.0, "bytes": None, "rows": rows,
        "target": {"provider": "fastattn-compile", "against": "transformers-sdpa", "speed": 1.3}, **changes,
    }  # fmt: skip
    return {**result, "cases": [case]}


def test_the_table_gives_ratios_targets_and_mfu() -> None:
    result = _measured("train", "NVIDIA H200")
    report = {"device": result["device"], "versions": result["versions"], "revision": "abc", "sections": []}
    lines = evidence_summary.summary(report, [result])
    assert lines[-2:] == [
        "  train          1 of 1 cases, 1.50x; worst 1.50x train-16x1024, best 1.50x train-16x1024; targets 1/1",
        "                 train-16x1024: 163840 tokens/s, 400 TFLOP/s, MFU 40 % of 989",
    ]
    sections = [{"name": "x", "status": "ok", "seconds": 1.0, "detail": "", "findings": []}] * len(
        plan.SECTIONS
    )
    results = [_measured(name, "NVIDIA H200") for name in BENCHES]
    assert len(evidence_summary.summary({**report, "sections": sections}, results)) < 60


def test_published_results_lie_under_the_name_of_the_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    updated: list[bool] = []
    monkeypatch.setattr(schema, "RESULTS", tmp_path)
    monkeypatch.setattr(charts, "update_docs", lambda: updated.append(True))
    result = _measured("train", "NVIDIA H100 80GB HBM3")
    run = Run(tmp_path, 9, False, {}, {"device": result["device"]}, time.monotonic())
    folder = evidence_run.publish(run, [result])
    assert folder == tmp_path / "nvidia-h100-80gb-hbm3"
    assert schema.load(folder / "train.json") == result
    assert updated == [True]


def test_small_forms_are_not_published(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_evidence.main(["--dry-run", "--publish"]) == 2
    assert "measures nothing" in capsys.readouterr().err
