"""The doctor: a stable report, probes that cannot break it, and a CUDA compiler found behind a wrapper."""

import json
import os
import sys
from pathlib import Path

import pytest
from rich.console import Console

from fastattn import doctor
from fastattn.cli.console import PlainOutput, TerminalOutput
from fastattn.cli.doctor import show

KEYS = [
    "schema", "fastattn", "versions", "platform", "cpu", "gpus", "compilers", "extension", "backends", "environment",
    "errors",
]  # fmt: skip


def test_the_report_is_json_with_fixed_keys() -> None:
    found = json.loads(json.dumps(doctor.report()))
    assert list(found) == KEYS
    assert found["errors"] == {}
    assert found["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["versions"]["torch"]
    assert found["cpu"]["cores"] >= 1
    assert found["cpu"]["memory"] > 2**28
    assert set(found["compilers"]) == {"nvcc", "c++", "ninja"}
    reasons = {b["name"]: b["reason"] for b in found["backends"]}
    assert reasons["torch"] is None
    assert all(b["available"] == (b["reason"] is None) for b in found["backends"])


def test_a_probe_that_fails_costs_only_its_own_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("broken")

    probes = [name for name in vars(doctor) if name.startswith("_") and not name.startswith("__")]
    for name in set(probes) - {"_gib", "_annotations"}:
        if callable(getattr(doctor, name)):
            monkeypatch.setattr(doctor, name, broken)
    found = doctor.report()
    assert list(found) == KEYS
    assert {"fastattn", "torch", "cpu", "gpus", "nvcc", "c++", "ninja", "extension", "backends"} <= set(
        found["errors"]
    )
    assert found["errors"]["cpu"] == "RuntimeError: broken"
    with (Path(os.devnull)).open("w") as nowhere:
        show(found, PlainOutput(nowhere))


def test_it_prints_the_same_facts_drawn_and_plain(capsys: pytest.CaptureFixture[str]) -> None:
    found = doctor.report()
    show(found, PlainOutput(sys.stdout))
    plain = capsys.readouterr().out
    console = Console(force_terminal=True, width=200, color_system="standard", record=True, file=sys.stdout)
    show(found, TerminalOutput(console))
    assert "\x1b[" in capsys.readouterr().out
    drawn = console.export_text()
    for fact in (found["versions"]["torch"], found["cpu"]["model"], *(b["name"] for b in found["backends"])):
        assert fact in plain
        assert fact in drawn
    assert "\x1b" not in plain


@pytest.mark.skipif(sys.platform == "win32", reason="uses a shell script")
def test_nvcc_is_found_behind_a_wrapper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toolkit = tmp_path / "toolkit"
    (toolkit / "include").mkdir(parents=True)
    (toolkit / "bin").mkdir()
    (toolkit / "include" / "cuda.h").write_text("#define CUDA_VERSION 12090\n")
    wrapper = tmp_path / "path" / "nvcc"
    wrapper.parent.mkdir()
    wrapper.write_text(
        "#!/bin/sh\n"
        'case "$1" in\n'
        '--version) echo "Cuda compilation tools, release 12.9, V12.9.86";;\n'
        f'--dryrun) echo "#$ TOP={toolkit}/bin/.." >&2;;\n'
        "esac\n"
    )
    wrapper.chmod(0o755)
    monkeypatch.setenv("PATH", f"{wrapper.parent}{os.pathsep}{os.environ['PATH']}")
    expected = {"path": str(wrapper), "version": "12.9", "root": str(toolkit), "headers": "12.9"}
    assert doctor.report()["compilers"]["nvcc"] == expected


def test_a_missing_tool_is_null_and_no_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setattr("fastattn.extension.toolkit.DEFAULT_ROOTS", ())
    found = doctor.report()
    assert found["compilers"] == {"nvcc": None, "c++": None, "ninja": None}
    assert found["errors"] == {}
    assert found["fastattn"]["revision"] is None
