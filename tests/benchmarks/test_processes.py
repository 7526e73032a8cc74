"""Processes that hang, crash, fork or cannot be killed: each costs what it was allowed, and the others report."""

from __future__ import annotations

import os
import queue
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import checkout
from measure import processes
from measure.processes import Line, Process, follow

BENCHMARKS = checkout.BENCHMARKS


def python(code: str) -> list[str]:
    return [sys.executable, "-u", "-c", f"import sys; sys.path.insert(0, {str(BENCHMARKS)!r})\n{code}"]


def test_a_stuck_one_is_cut_off_at_its_own_deadline_and_the_others_report() -> None:
    events: queue.SimpleQueue[Any] = queue.SimpleQueue()
    stuck = Process(
        python(
            "from measure import processes; import time\nprocesses.announce(1, 'backward D128')\ntime.sleep(600)"
        ),
        events=events,
    )
    good = Process(python("import time\nprint('first')\ntime.sleep(2)\nprint('last')"), events=events)
    started = time.monotonic()
    heard: dict[Process, list[Any]] = {stuck: [], good: []}
    for process, event in follow(stuck, good):
        heard[process].append(event)
    assert heard[good][:-1] == [Line("first"), Line("last")]
    assert heard[good][-1].code == 0
    (end,) = heard[stuck]
    assert (end.code, end.why, end.doing) == (None, "silent for 1 s in backward D128", "backward D128")
    assert time.monotonic() - started < 30


def test_lines_come_before_the_end() -> None:
    process = Process(python("import time\nprint('early')\ntime.sleep(1)\nprint('late')"), limit=60)
    times = {getattr(event, "text", "end"): time.monotonic() for _, event in follow(process)}
    assert times["late"] - times["early"] > 0.5


def test_speaking_moves_the_deadline_but_not_the_limit() -> None:
    code = "import time\nfor number in range(100): print(number); time.sleep(0.2)"
    end, output = processes.run(python(code), 3.0, silence=2.0)
    assert end.code is None
    assert end.why == "stopped after 3 s"
    assert len(output.splitlines()) > 3


@pytest.mark.parametrize(
    ("code", "status"), [("sys.exit(3)", 3), ("import os; os.kill(os.getpid(), 11)", -11)]
)
def test_the_status_of_one_that_ends(code: str, status: int) -> None:
    end, _ = processes.run(python(code), 60)
    assert (end.code, end.why) == (status, "")


def test_one_that_closes_its_output_and_goes_on_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "REAP_SECONDS", 0.5)
    end, _ = processes.run(python("import os, time\nos.close(1); os.close(2); time.sleep(600)"), 60)
    assert end.code is None
    assert end.why.startswith("closed its output")


def test_one_that_cannot_be_killed_is_left_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """State D: SIGKILL is sent and nothing happens; here it is never sent."""
    monkeypatch.setattr(processes, "REAP_SECONDS", 0.3)
    killed: list[int] = []
    monkeypatch.setattr(os, "killpg", lambda group, sign: killed.append(group))
    started = time.monotonic()
    end, _ = processes.run(python("import time\ntime.sleep(600)"), 1.0)
    monkeypatch.undo()
    os.killpg(killed[0], 9)
    assert time.monotonic() - started < 20
    assert end.why.startswith("stopped after 1 s; it is still there 0 s after it was killed (state S")


def test_a_word_to_a_process() -> None:
    process = Process(python("print(input())"), limit=60)
    process.say("go")
    assert [event.text for _, event in follow(process) if isinstance(event, Line)] == ["go"]
    process.say("too late")


def test_what_a_tool_slows_down_is_not_kept_to_what_it_announces() -> None:
    code = "import time\nfrom measure import processes\n"
    code += "processes.announce(0.5, 'a call')\ntime.sleep(1.5)\nprint('done')"
    process = Process(python(code), limit=60, heed=False)
    (line, end) = [event for _, event in processes.follow(process)]
    assert line == Line("done")
    assert (end.code, end.doing) == (0, "a call")


def test_leaving_early_stops_all(tmp_path: Path) -> None:
    process = Process(python("import os, time\nprint(os.getpid())\ntime.sleep(600)"), limit=60)
    for _, event in follow(process):
        assert isinstance(event, Line)
        pid = int(event.text)
        break
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and Path(f"/proc/{pid}").exists():
        time.sleep(0.05)
    assert not Path(f"/proc/{pid}").exists()


def test_nothing_in_the_benches_waits_without_a_limit() -> None:
    """Every wait for another process has a timeout, or is one of a person's own commands."""
    own = {"counts.py": 1}  # replaces itself, to set its environment
    paths = sorted(BENCHMARKS.rglob("*.py"))
    assert {path.parent.name for path in paths} >= {"benchmarks", "cases", "evidence", "measure"}
    assert len(paths) > 50
    for path in paths:
        text = path.read_text(encoding="utf-8")
        bare = text.count(".wait()") + text.count(".communicate()")
        calls = [part.split("\n\n")[0] for part in text.split("subprocess.run(")[1:]]
        bare += sum("timeout=" not in call[:400] for call in calls)
        assert bare == own.get(path.relative_to(BENCHMARKS).as_posix(), 0), path
