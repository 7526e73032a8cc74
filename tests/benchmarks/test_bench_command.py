"""fastattn bench: finds the benches, hands their options on, and says what is wrong in a line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fastattn import bench, cli


def invoke(*words: str) -> tuple[int, str]:
    result = CliRunner().invoke(cli.app, ["bench", *words])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout whose scripts write down their arguments and exit with their number."""
    (tmp_path / "fastattn").mkdir()
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "checkout.py").touch()
    monkeypatch.setattr(bench, "__file__", str(tmp_path / "fastattn" / "bench.py"))
    for name in (*(f"bench_{name.replace('-', '_')}" for name in bench.NAMES), "plot"):
        script = f"import sys; open({str(tmp_path / name)!r}, 'w').write(' '.join(sys.argv[1:]));"
        script += "sys.exit(len(sys.argv) - 1)"
        (tmp_path / "benchmarks" / f"{name}.py").write_text(script)
    return tmp_path


def test_options_reach_the_bench_and_its_status_comes_back(folder: Path) -> None:
    assert invoke("cross-entropy", "--only", "window", "--quick")[0] == 3
    assert (folder / "bench_cross_entropy").read_text() == "--only window --quick"
    assert not (folder / "bench_attention").exists()


def test_help_is_the_bench_s_own(folder: Path) -> None:
    assert invoke("varlen", "--help")[0] == 1
    assert (folder / "bench_varlen").read_text() == "--help"


def test_all_runs_every_bench_and_then_the_pages(folder: Path) -> None:
    assert invoke("all", "--out", str(folder), "--update-docs")[0] == 2
    for name in bench.NAMES:
        assert (folder / f"bench_{name.replace('-', '_')}").read_text() == f"--out {folder}"
    assert (folder / "plot").read_text() == "--update-docs"


@pytest.mark.parametrize("words", [("--json", "x.json"), ("--out=x.json",), ("--csv", "x.csv")])
def test_all_needs_folders(folder: Path, words: tuple[str, ...]) -> None:
    code, output = invoke("all", *words)
    assert code == 2
    assert "needs a folder" in output
    assert not (folder / "bench_attention").exists()


def test_an_unknown_bench_is_wrong_usage() -> None:
    code, output = invoke("nothing")
    assert code == 2
    assert "nothing" in output


def test_help_names_every_bench() -> None:
    code, output = invoke("--help")
    assert code == 0
    assert all(name in output for name in (*bench.NAMES, "all"))


def test_without_the_scripts_it_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "__file__", str(tmp_path / "fastattn" / "bench.py"))
    code, output = invoke("all")
    assert code == 2
    assert "clone the repository" in output


def test_this_checkout_has_every_script() -> None:
    assert all(bench.script(name).exists() for name in bench.NAMES)
    written = {path.stem for path in bench.folder().glob("bench_*.py")}
    assert written == {f"bench_{name.replace('-', '_')}" for name in bench.NAMES}


def test_all_prints_one_json_object(folder: Path) -> None:
    for name in bench.NAMES:
        script = folder / "benchmarks" / f"bench_{name.replace('-', '_')}.py"
        script.write_text(f"import json; print(json.dumps({{'bench': {name!r}}}))")
    place = str(folder / "fastattn" / "bench.py")
    program = f"""if True:
        import sys
        from fastattn import bench
        bench.__file__ = {place!r}
        sys.exit(bench.run("all", ["--json", "--quick"]))
    """
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert json.loads(done.stdout) == {name: {"bench": name} for name in bench.NAMES}
    assert "== attention" in done.stderr
