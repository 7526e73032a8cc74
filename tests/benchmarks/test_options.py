"""The benches' options: hostile values are a line and exit code 2 before anything is measured; JSON goes to stdout."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from fastattn import bench
from measure import command, harness
from measure.options import build_parser
from report import schema

CPU = torch.device("cpu")
MODULES = {name: import_module(bench.script(name).stem) for name in bench.NAMES}
UNWRITABLE = "/proc/fastattn"
NUMBERS = ("x", "", "0", "-1", "nan", "inf", "-inf", "1e400", "10" * 300, "None")
# Option -> values that no run could use; "folder" and "file" stand for paths that are there already.
HOSTILE: dict[str, tuple[str, ...]] = {
    "--device": ("banana", "", "meta", "cuda:99", "cpu:x", "-1", "mps"),
    "--cases-of": ("banana", ""),
    "--only": ("(", "[", "*", "a{2,1}"),
    "--providers": ("(", "[", "*", "a{99999999999999999999}"),
    "--seconds": (*NUMBERS, "1e9"),
    "--threads": (*NUMBERS, "1.5", "1000000000"),
    "--warm": (*NUMBERS, "1.5"),
    "--json": ("x.json", "folder"),
    "--out": (UNWRITABLE, UNWRITABLE + "/x.json", "file", "file/x.json", "folder.json"),
    "--csv": (UNWRITABLE, UNWRITABLE + "/x.csv", "file", "file/x.csv"),
    "--plot": (UNWRITABLE, "file"),
    "--revision": ("", "a b", "/somebody/s/folder", "x" * 99),
}
FLAGS = {"--help", "--quick", "--merge", "--list", "--no-memory", "--no-errors"}
INTERNAL = {"--warm-cases", "--measure-memory"}


def forbid_measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(*args: Any, **options: Any) -> Any:
        raise AssertionError("measured")

    monkeypatch.setattr(harness, "run_case", measure)
    monkeypatch.setattr(harness, "measure_ceilings", measure)


def test_every_option_has_its_hostile_values() -> None:
    known = {option for action in build_parser("x")._actions for option in action.option_strings}
    assert known - {"-h"} == HOSTILE.keys() | FLAGS | INTERNAL


@pytest.mark.parametrize("option", HOSTILE)
def test_a_bad_value_is_a_line_and_nothing_is_measured(
    option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if UNWRITABLE.startswith("/proc") and not Path("/proc").is_dir():
        pytest.skip("no directory here that nobody can write to")
    forbid_measuring(monkeypatch)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder.json").mkdir()
    for value in HOSTILE[option]:
        with pytest.raises(SystemExit) as stopped:
            MODULES["softmax"].main(["--device", "cpu", f"{option}={value}"])
        out, err = capsys.readouterr()
        assert (stopped.value.code, out) == (2, ""), value
        assert err.startswith("fastattn bench softmax: "), value
        assert option in err, value
        assert err.count("\n") == 1, value
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.json"]


def test_a_gpu_that_is_not_there_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    forbid_measuring(monkeypatch)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        MODULES["softmax"].main(["--device", "cuda"])
    assert (
        capsys.readouterr().err
        == "fastattn bench softmax: --device 'cuda': torch can use 0 CUDA devices here\n"
    )


@pytest.mark.parametrize(
    ("content", "complaint"),
    [("{", "Expecting"), ("[]", "result needs an object"), ('{"format": "x"}', "format, version needs")],
)
def test_a_file_that_cannot_be_merged_into_is_refused_before_measuring(
    content: str,
    complaint: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    forbid_measuring(monkeypatch)
    stored = tmp_path / "x.json"
    stored.write_text(content)
    arguments = ["--device", "cpu", "--only", "^rows-512$", "--merge"]
    assert MODULES["softmax"].main([*arguments, "--out", str(stored)]) == 2
    err = capsys.readouterr().err
    assert err.startswith("fastattn bench softmax: --merge: x.json: ")
    assert complaint in err
    assert stored.read_text() == content
    assert MODULES["softmax"].main(arguments) == 2
    assert "needs --out PATH" in capsys.readouterr().err


def fake_entry(case: Any, *rest: Any, **options: Any) -> dict[str, Any]:
    row = {"provider": "fastattn", "status": "unavailable", "reason": "not measured"}
    keys = ("name", "group", "label", "axis", "params", "direction", "flops", "bytes", "target")
    entry = {key: getattr(case, key) for key in keys}
    return {**entry, "dtype": schema.dtype_name(case.dtype), "rows": [row]}


@pytest.fixture
def fake_measurements(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "run_case", fake_entry)
    ceilings = {"matmul_tflops": {"float32": 1.0, "bfloat16": 1.0}, "copy_gbps": 1.0}
    monkeypatch.setattr(harness, "measure_ceilings", lambda *args: json.loads(json.dumps(ceilings)))


@pytest.mark.parametrize("name", [name for name in bench.NAMES if MODULES[name].cases_for(CPU)])
@pytest.mark.usefixtures("fake_measurements")
def test_json_is_all_of_standard_output(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case = MODULES[name].cases_for(CPU)[0].name
    only = ["--device", "cpu", "--only", f"^{case.replace('+', '.')}$", "--quick"]
    stored = tmp_path / "deep" / "x.json"
    assert MODULES[name].main([*only, "--json", "--out", str(stored)]) == 0
    out, err = capsys.readouterr()
    printed = json.loads(out)
    schema.validate(printed)
    assert printed["cases"] == schema.load(stored)["cases"]
    assert case in err
    assert "stored" in err
    assert MODULES[name].main([*only, "--json", "--list"]) == 0
    assert json.loads(capsys.readouterr().out)["cases"][0]["name"] == case


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("name", bench.NAMES)
def test_a_quick_run_names_its_cases_by_the_sizes_it_runs(name: str, device: str) -> None:
    cases = MODULES[name].cases_for(torch.device(device))
    forms = command.distinct_small_forms(cases)
    assert len({form.name for form in forms}) == len(forms)
    shapes = [(form.label, json.dumps(form.params), form.name) for form in forms]
    for case in cases:
        small = case.small()
        assert any(label == small.label and params == json.dumps(small.params) for label, params, _ in shapes)
    for form in forms:
        before, after = (
            set(command._numbers(each.params)) for each in (_case(cases, form.full_name), form.case)
        )
        gone = {
            str(size) for size in before - after if size > 9
        }  # 8 documents, 2 heads: a digit may be anything
        assert not gone & set(command.re.findall(r"\d+", form.name)), (form.name, form.params)


def _case(cases: Any, name: str) -> Any:
    return next(case for case in cases if case.name == name)


@pytest.mark.usefixtures("fake_measurements")
def test_settings_name_no_folders(capsys: pytest.CaptureFixture[str]) -> None:
    only = ["--only", "^rows-512$", "/some/body/s", "--providers", "/some/body/s"]
    assert MODULES["softmax"].main(["--device", "cpu", *only, "--quick", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["settings"]["only"] == ["^rows-512$", "s"]
