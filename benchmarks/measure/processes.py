"""Child processes that may crash or hang: their lines as they come, with limits on their time and on each silence.

A process with a kernel that never ends does not print or exit, and sometimes cannot be killed: in the uninterruptible
state D it ends only when its driver call returns. So every wait here has a limit, and output is read as it is printed.

A process may announce what it does next, and for how many seconds it may print nothing:

    processes.announce(15, "backward D128")     in the child
    > 15 backward D128                          the line it prints; `follow` enforces the limit
"""

from __future__ import annotations

import contextlib
import os
import queue
import re
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

REAP_SECONDS = 5.0  # for a killed process to be gone
_ANNOUNCED = re.compile(r"> (\d+(?:\.\d+)?) (.*)")


@dataclass(frozen=True)
class Ended:
    """How a process ended: its exit status, None where it was stopped, and then why."""

    code: int | None
    seconds: float
    why: str = ""  # "stopped after 30 s", "silent for 15 s in backward D128"
    doing: str = ""  # what it had announced last


@dataclass(frozen=True)
class Line:
    """A line of output, without its end."""

    text: str


def announce(seconds: float, text: str) -> None:
    """Print what this process does next, and the seconds after which silence means that it hangs."""
    print(f"> {seconds:g} {' '.join(text.split())}", flush=True)


class Process:
    """A started command whose lines are read in a thread, so that reading them never waits."""

    def __init__(
        self,
        command: Sequence[str],
        environment: Mapping[str, str] | None = None,
        cwd: Path | str | None = None,
        limit: float = 600.0,
        silence: float | None = None,
        events: Events | None = None,
        heed: bool = True,
    ) -> None:
        """`heed`: enforce the limits that it announces; False under a tool that slows it down."""
        self.started = self.heard = time.monotonic()
        self.limit, self.silence, self.doing, self.heed = max(limit, 1.0), silence, "", heed
        self.events: Events = queue.SimpleQueue() if events is None else events
        self._popen = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd=cwd,
            env=None if environment is None else dict(environment),
            start_new_session=True,  # a group of its own, killed with all that it started
        )
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        stream = self._popen.stdout
        assert stream is not None
        with contextlib.suppress(OSError, ValueError):
            for raw in stream:
                self.events.put((self, raw.decode("utf-8", "replace").rstrip("\r\n")))
        self.events.put((self, None))

    def take(self, text: str) -> Line | None:
        """Record a line of output; None if it is an announcement."""
        self.heard = time.monotonic()
        found = _ANNOUNCED.fullmatch(text)
        if found is None:
            return Line(text)
        self.doing = found[2]
        if self.heed:
            self.silence = float(found[1])
        return None

    def say(self, text: str) -> None:
        """A line to its standard input; ignored if the process has ended."""
        stream = self._popen.stdin
        assert stream is not None
        with contextlib.suppress(OSError, ValueError):
            stream.write((text + "\n").encode())
            stream.flush()

    @property
    def deadline(self) -> float:
        """The time at which it is stopped unless it prints something before."""
        end = self.started + self.limit
        return end if self.silence is None else min(end, self.heard + self.silence)

    def overdue(self) -> str:
        """The reason to stop it now; empty where there is none."""
        now = time.monotonic()
        if now >= self.started + self.limit:
            return f"stopped after {self.limit:.0f} s" + (f" in {self.doing}" if self.doing else "")
        if self.silence is not None and now >= self.heard + self.silence:
            return f"silent for {self.silence:.0f} s" + (f" in {self.doing}" if self.doing else "")
        return ""

    def end(self, why: str = "") -> Ended:
        """Wait for its exit after its output closed, or stop it at once for a reason; its process group is killed."""
        seconds = time.monotonic() - self.started
        code: int | None = None
        if not why:
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = self._popen.wait(REAP_SECONDS)
            why = "" if code is not None else f"closed its output and went on for {REAP_SECONDS:.0f} s"
        self._kill_group()
        try:
            self._popen.wait(REAP_SECONDS)
        except subprocess.TimeoutExpired:
            why += f"; it is still there {REAP_SECONDS:.0f} s after it was killed (state {_state(self._popen.pid)})"
        return Ended(code, seconds, why, self.doing)

    def _kill_group(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._popen.pid, signal.SIGKILL)
        for stream in (self._popen.stdin,):
            with contextlib.suppress(OSError):
                assert stream is not None
                stream.close()


Events = queue.SimpleQueue[tuple[Process, "str | None"]]  # a line, or None where the output is closed


def follow(*processes: Process) -> Iterator[tuple[Process, Line | Ended]]:
    """Lines of several processes as they are printed, and each one's exit; overdue processes are stopped.

    They share one queue: create them with the same `events`. Leaving the loop early stops all of them.
    """
    events = processes[0].events
    running = list(processes)
    assert all(process.events is events for process in running)
    try:
        while running:
            process, text = _next(events, min(each.deadline for each in running))
            if process is not None and process in running:
                if text is None:
                    running.remove(process)
                    yield process, process.end()
                elif (line := process.take(text)) is not None:
                    yield process, line
            for late in [each for each in running if each.overdue()]:
                running.remove(late)
                yield late, late.end(late.overdue())
    finally:
        for process in running:
            process.end("the run was ended")


def _next(events: Events, deadline: float) -> tuple[Process | None, str | None]:
    try:
        return events.get(timeout=max(deadline - time.monotonic(), 0.001))
    except queue.Empty:
        return None, None


def run(
    command: Sequence[str],
    limit: float,
    environment: Mapping[str, str] | None = None,
    silence: float | None = None,
    cwd: Path | str | None = None,
) -> tuple[Ended, str]:
    """A command's end and all that it printed."""
    lines: list[str] = []
    for _, event in follow(Process(command, environment, cwd, limit, silence)):
        if isinstance(event, Ended):
            return event, "\n".join(lines)
        lines.append(event.text)
    raise AssertionError("a process that is followed ends")


def _state(pid: int) -> str:
    """The scheduler's letter for a process: D waits for a device and cannot be killed."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rsplit(")", 1)[1].split()[0]
    except (OSError, IndexError):
        return "?"
