"""The rows of docs/results.md: their commands exist, cut runs leave what they have, and the page says the same."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import checkout
import tasks as command
from fastattn.cli import app
from fastattn.cli.train import _split
from fastattn.tasks import evaluate as evaluation
from fastattn.train.run import TASKS
from fastattn.train.task_config import presets_of, read_sections
from trained import files, page, runs
from trained.recipes import ROWS
from trained.rows import Goal, Step, TaskRow

STEPS = [(row.name, step) for row in ROWS.values() for step in row.steps]


def _job(row: TaskRow, out: Path, seconds: float = 600.0, **options: Any) -> runs.Run:
    return runs.Run(row, out / "data", out / "encoder", out / row.name, seconds, **options)


def _options(words: Sequence[str], name: str) -> list[str]:
    return [words[i + 1] for i, word in enumerate(words[:-1]) if word == name]


@pytest.mark.parametrize(("fast", "precision"), [(True, "bfloat16"), (False, "float32")])
def test_a_row_trains_in_bfloat16_where_the_machine_multiplies_in_it(
    fast: bool, precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastattn.torch_compat.has_fast_products", lambda dtype: fast)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    job = _job(ROW, tmp_path)
    assert job.filled(["--train.precision={precision}"]) == [f"--train.precision={precision}"]
    assert job.shown(["--train.precision={precision}"]) == f"--train.precision={precision}"


@pytest.mark.parametrize(
    ("row", "step"), [pytest.param(r, s, id=f"{r}-{s.name}") for r, s in STEPS if s.kind == "train"]
)
@pytest.mark.parametrize("quick", [False, True])
def test_training_commands_have_options_that_exist(row: str, step: Step, quick: bool, tmp_path: Path) -> None:
    if quick:
        (step,) = runs.quick_steps([step]) or (step,)
    words = _job(ROWS[row], tmp_path).filled(step.words)
    name, overrides = _split([w for w in words[1:] if w not in ("--train", "--dev", "--model", "--out")][:1])
    assert not overrides
    assert name in TASKS
    (model,) = _options(words, "--model")
    preset = model if model in presets_of(TASKS[name])[1] else None
    assert preset or Path(model).is_absolute()
    given = [w for w in words if w.startswith("--") and "=" in w]
    sections = read_sections(
        TASKS[name],
        preset=preset,
        file=None,
        overrides=[*given, "--train.output_dir=x"],
        defaults={"max_steps": 1},
    )
    assert sections.train.seed == step.seed
    assert not any("{" in word for word in words)
    if quick and step.seed == 0:
        assert sections.train.max_steps == 2


@pytest.mark.parametrize(
    ("row", "step"), [pytest.param(r, s, id=f"{r}-{s.name}") for r, s in STEPS if s.kind == "evaluate"]
)
def test_evaluation_commands_are_of_a_folder_that_was_trained_and_a_method_that_exists(
    row: str, step: Step, tmp_path: Path
) -> None:
    before = ROWS[row].steps[: ROWS[row].steps.index(step)]
    made = {_options(s.words, "--out")[0]: s for s in before if s.kind in ("train", "peer")}
    trained = made[step.words[1]]
    name = trained.words[0] if trained.kind == "peer" else trained.words[1]
    (name,) = _options(step.words, "--task") or (name,)
    module = TASKS[name]
    evaluation.options_of(module, _options(step.words, "--option"))
    evaluation.columns_of(module, _options(step.words, "--column"))
    for method in _options(step.words, "--baseline"):
        evaluation.method_of(module, method, "--train" in step.words)
    # no test set trains or picks: its files are read by evaluations alone
    for other in ROWS[row].steps:
        if other.kind == "train":
            assert not any("test" in word for word in other.words)


def test_a_command_that_takes_too_long_is_stopped(tmp_path: Path) -> None:
    wait = (
        "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(3)); "
        "print(1, flush=True); time.sleep(60)"
    )
    started = time.monotonic()
    code, output, stopped = runs._call([sys.executable, "-c", wait], 1.0, tmp_path / "log.txt")
    assert (code, output, stopped) == (3, "1\n", True)
    assert time.monotonic() - started < 30
    assert runs._call([sys.executable, "-c", "print(2)"], 30.0, tmp_path / "log.txt") == (
        0,
        "2\n",
        False,
    )


ROW = TaskRow(
    "reuters8",
    "A row",
    1.0,
    files.nothing,
    (
        Step("seed 0", "train", ("train", "tag", "--out", "{out}/a"), 0),
        Step("seed 0", "evaluate", ("evaluate", "{out}/a", "--data", "{data}/x", "--json")),
        Step("seed 1", "train", ("train", "tag", "--out", "{out}/b"), 1),
        Step("seed 1", "evaluate", ("evaluate", "{out}/b", "--data", "{data}/x", "--json")),
    ),
    ("f1",),
    (Goal("seed 0", "f1", 0.4), Goal("seed 1", "f1", 0.4)),
)
FOUND = {"count": 3, "metrics": {"f1": 0.5}, "baselines": {"majority": {"f1": 0.1}}, "signatures": {}}


def _answer(job: runs.Run, cut: str) -> Any:
    """In place of running commands: figures, except that the training into folder `cut` is stopped."""

    def call(words: Sequence[str], limit: float, log: Path) -> tuple[int, str, bool]:
        log.write_text(f"{job.out}/file is missing\n", encoding="utf-8")
        if "evaluate" in words:
            return 0, json.dumps(FOUND), False
        out = Path(words[words.index("--out") + 1])
        out.mkdir()
        records = [{"event": "eval", "step": s, "loss": 3.0 - s, "seconds": 60.0 * s} for s in range(4)]
        records.append({"event": "train", "step": 3, "tokens": 99, "seconds": 200.0})
        if cut != "early":
            (out / "config.json").write_text("{}", encoding="utf-8")
        (out / "log.jsonl").write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
        return (130 if out.name == cut else 1 if cut == "all" else 0), "", out.name == cut

    return call


def test_a_run_cut_short_leaves_its_partial_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = _job(ROW, tmp_path, stored=(tmp_path / "row.json",))
    monkeypatch.setattr(runs, "_call", _answer(job, "b"))
    record = runs.run(job)
    assert record == json.loads((tmp_path / "row.json").read_text(encoding="utf-8"))
    assert record["status"] == "cut"
    statuses = [(step["status"], step.get("metrics")) for step in record["steps"]]
    assert statuses == [("done", None), ("done", {"f1": 0.5}), ("cut", None), ("done", {"f1": 0.5})]
    assert record["steps"][2]["steps"] == 3
    text = page.section(ROW, record, False)
    assert "seed 1 (train) was cut after 3 steps: its time was over" in text
    assert "mean of" not in text  # of runs to their ends alone
    assert "| seed 1 (cut short) | 0.5000 |" in text
    assert "| majority, seed 0 | 0.1000 |" in text
    assert str(tmp_path) not in json.dumps(record)
    assert "fastattn train tag --out RUN/a" in text
    assert "| 0.5000 | 3.3 min | 3 |" in text
    monkeypatch.setitem(page.ROWS, "reuters8", ROW)
    assert "| seed 1: F1 | at least 0.4 | 0.5000 |" in page.summary({"reuters8": record})
    assert page.draw(record, tmp_path / "row.svg") == tmp_path / "row.svg"
    assert "<svg" in (tmp_path / "row.svg").read_text(encoding="utf-8")


def test_a_run_cut_short_goes_on_where_it_was_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = _job(ROW, tmp_path, stored=(tmp_path / ROW.name / runs.STORED,))
    monkeypatch.setattr(runs, "_call", _answer(job, "b"))
    first = runs.run(job)
    rest = _job(ROW, tmp_path, stored=(tmp_path / ROW.name / runs.STORED,))
    rest.extra, rest.conditions, rest.seconds = 90.0, "Nothing else ran.", 1.0
    monkeypatch.setattr(runs, "_call", _answer(rest, ""))
    record = runs.run(rest)
    assert record == json.loads((tmp_path / ROW.name / runs.STORED).read_text(encoding="utf-8"))
    assert record["status"] == "complete"
    assert record["steps"][:2] == first["steps"][:2]
    assert [step["status"] for step in record["steps"]] == ["done"] * 4
    assert rest.seconds == job.seconds  # of which steps take shares
    assert record["seconds"] >= first["seconds"]
    (continued,) = record["continued"]
    assert continued["after"] == 2
    assert "after step 2" in page.section(ROW, record, False)
    assert "Nothing else ran." in page.section(ROW, record, False)
    with pytest.raises(ValueError, match="is complete"):
        runs.run(rest)


@pytest.mark.parametrize(("name", "complaint"), [("", "holds no earlier run"), ("other", "had the command")])
def test_only_a_run_of_the_same_commands_goes_on(
    name: str, complaint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name:
        job = _job(ROW, tmp_path, stored=(tmp_path / ROW.name / runs.STORED,))
        monkeypatch.setattr(runs, "_call", _answer(job, "b"))
        runs.run(job)
    words = ("train", "tag", "--out", f"{{out}}/{name}")
    other = replace(ROW, steps=(replace(ROW.steps[0], words=words), *ROW.steps[1:]))
    job = _job(other, tmp_path)
    job.extra = 60.0
    with pytest.raises(ValueError, match=complaint):
        runs.run(job)


def test_a_run_of_transformers_that_was_cut_is_not_compared() -> None:
    def step(name: str, kind: str, status: str = "done", **found: Any) -> dict[str, Any]:
        return {"name": name, "kind": kind, "status": status, "command": "", **found}

    def record(status: str) -> dict[str, Any]:
        about = {
            "device": {"name": "CPU", "threads": 1},
            "versions": {},
            "date": "2000-01-01",
            "revision": None,
        }
        return {**about, "dirty": False, "seconds": 60.0, "minutes": 1, "planned": 4, "command": "", "steps": [
            step("seed 0", "train", train_seconds=1.0, steps=9), step("seed 0", "evaluate", metrics={"f1": 0.5}),
            step("transformers, seed 0", "peer", status, train_seconds=2.0, steps=3),
            step("transformers, seed 0", "evaluate", metrics={"f1": 0.1}),
        ]}  # fmt: skip

    row = page.ROWS["wnut17"]
    whole, cut = (page.section(row, record(status), False) for status in ("done", "cut"))
    assert "transformers' Trainer 0.1000, in 0.50 times its time" in whole
    assert "| transformers, seed 0 | 0.1000" in whole
    assert "times its time" not in cut
    assert "| transformers, seed 0 (cut short) | 0.1000" in cut
    assert ", 1 thread;" in cut
    assert "Tests ran beside it." in page.section(
        row, {**record("done"), "conditions": "Tests ran beside it."}, False
    )


def test_what_failed_is_said_and_its_figures_are_not_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = _job(ROW, tmp_path)
    monkeypatch.setattr(runs, "_call", _answer(job, "all"))
    record = runs.run(job)
    assert [step["status"] for step in record["steps"]] == ["failed", "skipped"] * 2
    assert record["steps"][0]["reason"] == "file is missing"
    assert str(tmp_path) not in json.dumps(record)
    monkeypatch.setitem(page.ROWS, "reuters8", ROW)
    assert "| not measured |" in page.summary({"reuters8": record})


def test_training_that_saved_no_model_has_no_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = _job(ROW, tmp_path)
    monkeypatch.setattr(runs, "_call", _answer(job, "early"))
    steps = runs.run(job)["steps"]
    assert [step["status"] for step in steps] == ["done", "skipped"] * 2
    assert steps[1]["reason"] == "its training was cut before it saved a model"


def test_no_time_left_skips_what_is_not_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = _job(ROW, tmp_path, seconds=0.5)
    monkeypatch.setattr(runs, "_call", _answer(job, ""))
    assert {step["status"] for step in runs.run(job)["steps"]} == {"skipped"}


def test_a_folder_of_something_else_is_not_deleted(tmp_path: Path) -> None:
    (tmp_path / ROW.name).mkdir()
    (tmp_path / ROW.name / "mine.txt").write_text("x")
    with pytest.raises(ValueError, match="is not empty and holds no earlier run"):
        runs.run(_job(ROW, tmp_path))
    assert (tmp_path / ROW.name / "mine.txt").exists()


def test_the_driver_stores_what_there_is_when_it_is_stopped(tmp_path: Path) -> None:
    script = [sys.executable, "benchmarks/tasks.py", "shakespeare-5min", "--quick", "--out", str(tmp_path)]
    process = subprocess.Popen(
        script, cwd=checkout.ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    stored = tmp_path / "shakespeare-5min" / runs.STORED
    try:
        deadline = time.monotonic() + 90
        while time.monotonic() < deadline and not (stored.is_file() and '"running"' in stored.read_text()):
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        process.wait(60)
    finally:
        process.kill()
    record = json.loads(stored.read_text(encoding="utf-8"))
    assert record["status"] == "cut"
    assert record["steps"][-1]["status"] != "running"


def test_the_page_is_what_the_records_say() -> None:
    assert (checkout.ROOT / page.PAGE).read_text(encoding="utf-8") == page.page(page.load())


def test_the_command_names_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, said in (
        (["no-row"], "needs --list"),
        (["xquad"], "--data: is missing"),
        (["xquad", "--data", str(tmp_path / "none"), "--encoder", "x", "--out", "y"], "is no folder"),
        (["xquad", "--quick", "--out", "y", "--minutes", "-1"], "--minutes: got -1"),
    ):
        with pytest.raises(SystemExit) as stopped:
            command.main(words)
        assert stopped.value.code == 2
        assert said in capsys.readouterr().err
    assert command.main(["--list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(ROWS)


def test_a_row_runs_on_generated_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its commands as they are, in this process."""

    def call(words: Sequence[str], limit: float, log: Path) -> tuple[int, str, bool]:
        found = CliRunner().invoke(app, list(words[3:]))
        log.write_text(found.output, encoding="utf-8")
        return found.exit_code, found.stdout, False

    monkeypatch.setattr(runs, "_call", call)
    row = ROWS["shakespeare-5min"]
    files.tiny(tmp_path / "data")
    record = runs.run(_job(row, tmp_path, quick=True))
    assert record["status"] == "complete", record
    assert all("loss" in step["metrics"] for step in record["steps"] if step["kind"] == "evaluate")
    assert all(step["steps"] == 2 for step in record["steps"] if step["kind"] == "train")


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ROWS)
def test_every_row_runs_on_generated_data(
    name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    steps = runs.quick_steps(ROWS[name].steps)
    if any(step.kind == "peer" for step in steps):
        pytest.importorskip("accelerate")
    assert command.main([name, "--quick", "--out", str(tmp_path)]) == 0, capfd.readouterr()
    record = json.loads((tmp_path / name / runs.STORED).read_text(encoding="utf-8"))
    assert record["status"] == "complete"
    shown = {figure for step in record["steps"] for figure in step.get("metrics", {})}
    assert set(ROWS[name].shown) <= shown
