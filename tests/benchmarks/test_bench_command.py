"""fastattn bench: finds the benches, hands their options on, and says what is wrong in a line."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from fastattn import bench, cli


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout with two benches that print their arguments."""
    (tmp_path / "fastattn").mkdir()
    (tmp_path / "benchmarks").mkdir()
    monkeypatch.setattr(bench, "__file__", str(tmp_path / "fastattn" / "bench.py"))
    for name in ("bench_one", "bench_two_parts"):
        script = f"import sys; open({str(tmp_path / name)!r}, 'w').write(' '.join(sys.argv[1:]));"
        script += "sys.exit(len(sys.argv) - 1)"
        (tmp_path / "benchmarks" / f"{name}.py").write_text(script)
    return tmp_path


def test_options_reach_the_bench_and_its_status_comes_back(folder: Path) -> None:
    result = CliRunner().invoke(cli.app, ["bench", "two-parts", "--only", "window", "--quick"])
    assert result.exit_code == 3
    assert (folder / "bench_two_parts").read_text() == "--only window --quick"
    assert not (folder / "bench_one").exists()


def test_all_runs_every_bench(folder: Path) -> None:
    assert CliRunner().invoke(cli.app, ["bench"]).exit_code == 0
    assert (folder / "bench_one").read_text() == (folder / "bench_two_parts").read_text() == ""


def test_an_unknown_bench_is_bad_input(folder: Path) -> None:
    result = CliRunner().invoke(cli.app, ["bench", "nothing"])
    assert result.exit_code == 2
    assert "no bench is called 'nothing': choose one, two-parts, all" in result.output


def test_without_the_checkout_it_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "__file__", str(tmp_path / "fastattn" / "bench.py"))
    result = CliRunner().invoke(cli.app, ["bench"])
    assert result.exit_code == 2
    assert "clone the repository" in result.output


def test_this_checkout_has_the_attention_bench() -> None:
    assert "attention" in bench.scripts()
