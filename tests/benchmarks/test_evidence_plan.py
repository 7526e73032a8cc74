"""The plan of the minutes on a GPU: its order, its limits, what a failed probe leaves out, and what is carried."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest

import checkout
import gpu_evidence
from evidence import carried, probes, sections
from evidence import run as evidence_run
from evidence.sections import FIRST, FIRST_SECONDS, LAST, SECTIONS, THEN, Run, Section, switches
from fastattn.extension import load
from fastattn.extension.info import MARKER, BuildInfo, abi_tag, library_name
from measure import processes

ROOT = checkout.ROOT
BACKWARD = "cuda.attention_bwd,cuda.varlen_bwd,cuda.one_pass"


def make_run(out: Path, dry: bool = False, disabled: str = "", **changes: Any) -> Run:
    report = {"revision": None, "sections": [], "disabled": disabled}
    return Run(out, 9, dry, {}, report, time.monotonic(), **changes)


def line_of(name: str, run: Run) -> list[str]:
    line = next(section for section in SECTIONS if section.name == name).command(run)
    assert isinstance(line, list), line
    return line


def test_the_first_ten_minutes_fit_and_come_in_order_of_importance() -> None:
    assert FIRST_SECONDS == 500.0
    assert sum(section.limit for section in FIRST) <= FIRST_SECONDS
    assert [section.name for section in FIRST] == [
        "install", "build", "probe", "correctness", "gpu-tests", "ops", "forward", "backward", "decode", "bitwise"
    ]  # fmt: skip
    assert [section.name for section in THEN][:5] == ["features", "varlen", "softmax", "train", "tuning"]
    assert (*FIRST, *THEN, *LAST) == SECTIONS
    assert len({section.name for section in SECTIONS}) == len(SECTIONS)


def test_the_cuda_backward_is_alone_and_last(tmp_path: Path) -> None:
    assert all(section.cuda_backward for section in LAST)
    run = make_run(tmp_path)
    for section in (*FIRST, *THEN):
        assert not section.cuda_backward
        assert switches(section, run) == BACKWARD
    assert {switches(section, run) for section in LAST} == {""}


def test_what_a_probe_found_wrong_is_left_out_of_every_section(tmp_path: Path) -> None:
    run = make_run(tmp_path, disabled="cuda.softmax_fwd,cuda.one_pass")
    for section in SECTIONS:
        names = switches(section, run).split(",")
        assert {"cuda.softmax_fwd", "cuda.one_pass"} <= set(names)
        assert len(set(names)) == len(names)
        given = evidence_run.section_environment(section, run).get("FASTATTN_DISABLE")
        assert given == (None if section.name in evidence_run.REPEATED else ",".join(names))


def test_triton_and_torch_run_before_the_extension(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    for name in ("correctness",):
        assert line_of(name, run)[-4:-2] == ["triton", "torch"]
    assert "gpu and not cuda_backend" in line_of("gpu-tests", run)
    places = {section.name: place for place, section in enumerate(SECTIONS)}
    assert places["correctness"] < places["cuda-forward"] < places["cuda-backward"]
    assert places["gpu-tests"] < places["cuda-tests"] < places["cuda-backward-tests"]


def test_the_gpu_tests_are_files_that_collect_and_none_stops_the_others(tmp_path: Path) -> None:
    line = line_of("gpu-tests", make_run(tmp_path))
    chosen = [word for word in line if word.startswith("tests")]
    assert chosen == list(sections.GPU_TESTS)
    assert all((ROOT / word).exists() for word in chosen)
    assert not [word for word in line if "maxfail" in word]
    assert "--timeout-method=thread" in line
    marked = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "tests").rglob("test_*.py")
        if "pytest.mark.gpu" in path.read_text(encoding="utf-8")
    }
    marked -= {"tests/benchmarks/test_evidence_plan.py"}
    assert all(any(path.startswith(word) for word in chosen) for path in marked), marked
    assert not [word for word in chosen if "transformers" in word]


@pytest.mark.slow
def test_the_extensions_tests_are_known_by_their_parameters() -> None:
    done = subprocess.run(
        [sys.executable, "-c", COLLECTED], capture_output=True, text=True, cwd=ROOT, timeout=200, check=False
    )
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("{"))
    marked: dict[str, bool] = json.loads(line)
    assert len(set(marked.values())) == 2
    for test, of_extension in marked.items():
        named = "test_cuda_" in test.partition("::")[0] or "cuda" in _parameters(test)
        assert of_extension is named, test


COLLECTED = """
import json
import pytest

class Marks:
    def pytest_collection_finish(self, session):
        marked = {i.nodeid: "cuda_backend" in i.keywords for i in session.items if "gpu" in i.keywords}
        print("\\n" + json.dumps(marked))

options = ["-q", "--collect-only", "-p", "no:cacheprovider", "-n", "0", "-s"]
pytest.main([*options, "-m", "gpu", "tests/gpu"], plugins=[Marks()])
"""


def _parameters(test: str) -> list[str]:
    return test.partition("[")[2].rstrip("]").split("-")


TESTS = """
import time
import pytest

def test_good(): pass
def test_bad(): assert 1 == 2, "told at once"
@pytest.fixture
def broken(): raise OSError("no disk")
def test_broken(broken): pass
@pytest.mark.skip(reason="not here")
def test_absent(): pass
def test_stuck(): time.sleep(600)
"""


@pytest.mark.parametrize(
    "workers",
    [pytest.param([], id="alone"), pytest.param(["-n", "1"], id="workers", marks=pytest.mark.exhaustive)],
)
def test_failures_are_told_before_a_run_of_tests_is_stopped(tmp_path: Path, workers: list[str]) -> None:
    (tmp_path / "test_some.py").write_text(TESTS)
    (tmp_path / "test_absent.py").write_text("import nothing_of_that_name")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "evidence.pytest_plugin",
        "-p",
        "no:cacheprovider",
        *workers,
    ]
    command += [
        "--continue-on-collection-errors",
        "-c",
        "/dev/null",
        "--rootdir",
        str(tmp_path),
        str(tmp_path),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "benchmarks")}
    process = processes.Process(command, environment, tmp_path, limit=60.0)
    found = []
    for _, event in processes.follow(process):
        if isinstance(event, processes.Line) and (item := evidence_run._finding(event.text)):
            found.append(item["detail"])
            if len(found) == 3:
                break
    assert found[0].startswith("test_absent.py: E   ModuleNotFoundError")
    assert "test_some.py::test_bad: AssertionError: told at once" in found[1]
    assert "test_some.py::test_broken: OSError: no disk" in found[2]
    done, output = processes.run([*command, "-k", "not stuck"], 60.0, environment, cwd=tmp_path)
    assert done.code == 1
    last = [item for line in output.splitlines() if (item := evidence_run._finding(line))][-1]
    assert (last["status"], last["detail"]) == ("failed", "1 passed, 3 failed, 1 skipped")


def test_the_extension_is_built_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert line_of("install", make_run(tmp_path))[:2] == ["env", "FASTATTN_BUILD_CUDA=0"]
    monkeypatch.setattr("torch.version.cuda", "13.0")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert line_of("build", make_run(tmp_path))[-1].endswith("gpu_build.py")
    carried_here = line_of("build", make_run(tmp_path, prebuilt=tmp_path / "built"))
    assert carried_here[-2:] == ["--prebuilt", str(tmp_path / "built")]


def test_a_carried_extension_is_taken_only_if_it_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTATTN_CACHE_DIR", str(tmp_path / "cache"))
    here = BuildInfo("2.11.0", "13.0", abi_tag(), ("9.0a",), "s" * 8)
    monkeypatch.setattr("fastattn.extension.load.info_here", lambda: here)

    def library(folder: str, **changes: Any) -> Path:
        fields = {
            "torch": "2.11.0",
            "cuda": "13.0",
            "python": abi_tag(),
            "archs": ["9.0a"],
            "sources": "s" * 8,
        }
        path = tmp_path / folder / library_name()
        path.parent.mkdir(parents=True)
        path.write_bytes(b"ELF" + MARKER + json.dumps({**fields, **changes}).encode() + b"\0rest")
        return path

    library("built/a", python="cpython-39")
    library("built/b", sources="other")
    placed, wrong = carried.place_extension(tmp_path / "built")
    assert placed is None
    assert any("python cpython-39" in reason for reason in wrong)
    assert any("other sources" in reason for reason in wrong)
    good = library("built/c")
    placed, _ = carried.place_extension(tmp_path / "built")
    assert placed is not None
    assert placed.read_bytes() == good.read_bytes()
    assert (placed, False) in list(load._candidates())
    assert carried.place_extension(good)[0] == placed
    assert carried.place_extension(tmp_path / "cache" / "nothing")[1] == ["there is no _C*.so in nothing"]


def python(code: str) -> Any:
    return lambda run: [sys.executable, "-u", "-c", code]


PROBES = [
    {"check": "probe", "status": "failed" if name == "softmax" else "passed", "detail": "", "direction": name}
    for name in probes.DIRECTIONS
]
FAKES = (
    Section("install", 20, python("print('placed')")),
    Section("probe", 20, python("\n".join(f"print('''{json.dumps(item)}''')" for item in PROBES))),
    Section("stuck", 2, python(f"import time\nprint({json.dumps(PROBES[0])!r})\ntime.sleep(600)")),
    Section("after", 20, python("import os; print(os.environ.get('FASTATTN_DISABLE'))")),
    Section("last", 20, python("import os; print(os.environ.get('FASTATTN_DISABLE'))"), cuda_backward=True),
)  # fmt: skip


def test_a_run_whose_section_is_stuck_keeps_what_it_said_and_archives_as_it_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sections, "SECTIONS", FAKES)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(evidence_run.schema, "new_result", _described)
    drawn: list[str] = []
    monkeypatch.setattr(evidence_run, "_draw", lambda run, measured: drawn.append(capsys.readouterr().out))
    kernels = tmp_path / "kernels"
    (kernels / "ABC").mkdir(parents=True)
    (kernels / "ABC" / "k.cubin").write_bytes(b"code")
    out, away = tmp_path / "out", tmp_path / "away"
    options = ["--out", str(out), "--archive", str(away), "--minutes", "2", "--triton-cache", str(kernels)]
    assert gpu_evidence.main(options) == 1
    report = json.loads((out / "evidence.json").read_text(encoding="utf-8"))
    entries = {entry["name"]: entry for entry in report["sections"]}
    assert report["disabled"] == "cuda.softmax_fwd,cuda.softmax_bwd"
    assert "left out from now on: CUDA softmax" in entries["probe"]["detail"]
    assert (entries["stuck"]["status"], len(entries["stuck"]["findings"])) == ("timeout", 1)
    assert entries["after"]["detail"] == f"cuda.softmax_fwd,cuda.softmax_bwd,{BACKWARD}"
    assert entries["last"]["detail"] == "cuda.softmax_fwd,cuda.softmax_bwd"
    assert "left out of every section" in drawn[0]  # the table stood before any chart was drawn
    assert sorted(path.name for path in away.iterdir()) == [
        "evidence.tar.gz",
        "table.txt",
        "triton-cache.tar.gz",
    ]
    with tarfile.open(away / "evidence.tar.gz") as archive:
        assert sorted(archive.getnames()) == ["evidence.json", "log.txt", "table.txt"]

    again = tmp_path / "again"  # on a fresh machine
    options = ["--out", str(again), "--unpack", str(away / "evidence.tar.gz"), "--resume", "--minutes", "2"]
    options += ["--triton-cache", str(away / "triton-cache.tar.gz")]
    gpu_evidence.main(options)
    resumed = json.loads((again / "evidence.json").read_text(encoding="utf-8"))
    assert [entry["name"] for entry in resumed["sections"]] == ["after", "last", "install", "probe", "stuck"]
    assert (again / "triton-cache" / "ABC" / "k.cubin").read_bytes() == b"code"


def _described(bench: str, device: Any, settings: Any) -> dict[str, Any]:
    name = {"kind": "cuda", "name": "A GPU", "threads": 1, "memory_gib": 1.0, "driver": None}
    return {"device": name, "versions": {"torch": "2.11"}, "dirty": False, "revision": "abc"}


def test_findings_are_stored_while_a_section_runs(tmp_path: Path) -> None:
    seen = tmp_path / "evidence.json"
    code = f"import json, time\nprint('''{json.dumps(PROBES[0])}''', flush=True)\n"
    code += (
        f"end = time.time() + 20\nwhile time.time() < end and 'running' not in open({str(seen)!r}).read():\n"
    )
    code += "    time.sleep(0.1)\nprint('seen' if time.time() < end else 'not seen')"
    run = make_run(tmp_path, dry=True)
    run.store()
    entry = evidence_run.run_section(Section("x", 60, python(code)), run)
    assert entry["status"] == "ok"
    assert (tmp_path / "log.txt").read_text(encoding="utf-8").splitlines()[-1] == "seen"
    assert run.report["sections"] == []


def test_kernels_that_are_too_large_to_carry_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "kernels" / "A").mkdir(parents=True)
    (tmp_path / "kernels" / "A" / "k").write_bytes(bytes(range(256)) * 40)
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(carried, "MOST_BYTES", 10)
    carried.pack(tmp_path / "out", tmp_path / "away", str(tmp_path / "kernels"))
    assert [path.name for path in (tmp_path / "away").iterdir()] == ["evidence.tar.gz"]
