"""The command line: help, exit codes, one-line errors, nothing half-written, plain text when piped."""

import contextlib
import importlib.metadata
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from fastattn import cli
from fastattn.console import InputError

COMMAND = [sys.executable, "-c", "from fastattn.cli import main; main()"]
ENVIRONMENT = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "FASTATTN_BACKEND")}


def invoke(*words: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(cli.app, list(words))
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


def test_help_names_every_command() -> None:
    code, out, _ = invoke("--help")
    assert code == 0
    for command in ("doctor", "demo", "build"):
        assert command in out
        code, described, _ = invoke(command, "--help")
        assert code == 0
        assert "--json" in described


def test_version() -> None:
    assert invoke("--version") == (0, importlib.metadata.version("fastattn") + "\n", "")


@pytest.mark.parametrize(
    "words", [["nonsense"], ["demo", "--nonsense"], ["demo", "--seed", "-1"], ["demo", "--steps", "0"]]
)
def test_wrong_usage_exits_with_2(words: list[str]) -> None:
    code, out, err = invoke(*words)
    assert code == 2
    assert out == ""
    assert "Error" in err


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


BAD_TEXTS = {
    "missing": (lambda folder: folder / "none.txt", "no such file"),
    "directory": (lambda folder: folder, "is a directory"),
    "empty": (lambda folder: write(folder / "t.txt", b""), "is empty"),
    "white": (lambda folder: write(folder / "t.txt", b" \n\t\n"), "only white space"),
    "binary": (lambda folder: write(folder / "t.txt", b"text\x00text"), "is binary"),
    "latin-1": (lambda folder: write(folder / "t.txt", b"caf\xe9 " * 1000), "is not UTF-8"),
    "short": (lambda folder: write(folder / "t.txt", b"a few words"), "tokens, needs at least"),
}


@pytest.mark.parametrize("kind", BAD_TEXTS)
def test_bad_text_is_refused_before_anything_is_written(kind: str, tmp_path: Path) -> None:
    make, message = BAD_TEXTS[kind]
    out = tmp_path / "out"
    code, stdout, stderr = invoke("demo", "--text", str(make(tmp_path)), "--out", str(out))
    assert code == 2
    assert stdout == ""
    assert stderr.startswith("fastattn: --text: ")
    assert message in stderr
    assert stderr.count("\n") == 1
    assert not out.exists()


def used(folder: Path) -> Path:
    (folder / "out").mkdir()
    write(folder / "out" / "precious.txt", b"keep me")
    return folder / "out"


BAD_OUTS = {
    "used": (used, "is not empty"),
    "file": (lambda folder: write(folder / "out", b"keep me"), "is a file"),
    "below a file": (lambda folder: write(folder / "file", b"keep me") / "out", "cannot write to"),
    "no parent": (lambda folder: folder / "missing" / "out", "does not exist"),
    "unwritable": (lambda folder: Path("/proc/fastattn-demo"), "/proc"),
}


@pytest.mark.parametrize("kind", BAD_OUTS)
def test_a_bad_directory_is_refused_and_left_as_it_was(kind: str, tmp_path: Path) -> None:
    if kind == "unwritable" and not Path("/proc").is_dir():
        pytest.skip("no directory here that nobody can write to")
    make, message = BAD_OUTS[kind]
    out = make(tmp_path)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    code, stdout, stderr = invoke("demo", "--out", str(out))
    assert code == 2
    assert stdout == ""
    assert stderr.startswith("fastattn: --out: ")
    assert message in stderr
    assert stderr.count("\n") == 1
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_errors_of_the_system_are_one_line_and_bugs_are_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail_with(error: BaseException) -> int:
        def report() -> None:
            raise error

        monkeypatch.setattr("fastattn.doctor.report", report)
        result = CliRunner().invoke(cli.app, ["doctor"])
        seen.append((type(result.exception), result.stderr))
        return result.exit_code

    seen: list[tuple[type, str]] = []
    assert fail_with(OSError(28, "No space left on device")) == 1
    assert fail_with(InputError("--out: no")) == 2
    assert fail_with(KeyboardInterrupt()) == 130
    assert fail_with(ZeroDivisionError("a bug")) == 1
    full, bad, stopped, _ = (text for _, text in seen)
    assert full == "fastattn: [Errno 28] No space left on device\n"
    assert (bad, stopped) == ("fastattn: --out: no\n", "fastattn: interrupted\n")
    assert seen[3][0] is ZeroDivisionError


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch could build the extension")
def test_a_build_that_cannot_be_says_why_in_a_line() -> None:
    code, out, err = invoke("build")
    assert (code, out) == (1, "")
    assert err.startswith(f"fastattn: torch {torch.__version__} is built without CUDA")
    code, _, err = invoke("build", "--arch", "Hopper", "--json")
    assert (code, err.count("\n")) == (1, 1)


def test_a_pipe_gets_plain_text_and_may_close_early() -> None:
    command = [*COMMAND, "doctor"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout
    assert "Backends" in done.stdout
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, env=ENVIRONMENT) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert b"Traceback" not in process.stderr.read()


@pytest.mark.skipif(sys.platform == "win32", reason="needs process groups")
def test_ctrl_c_leaves_nothing_behind(tmp_path: Path) -> None:
    out = tmp_path / "out"
    # A shell's background jobs ignore Ctrl-C and hand that on: undo it, for a runner may be one.
    listening = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); " + COMMAND[-1]
    with subprocess.Popen(
        [*COMMAND[:-1], listening, "demo", "--quick", "--out", str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=ENVIRONMENT,
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        while b"Attention" not in process.stdout.readline():
            assert process.poll() is None
        time.sleep(1)  # inside the grid, with a measuring process alive
        for _ in range(3):  # one that falls into the moment a measuring process starts is lost: press again
            os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to every process of the group
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(4)
                break
        error = process.stderr.read().decode()
        assert process.wait(60) == 130
    assert error == "fastattn: interrupted\n"
    assert not out.exists()
