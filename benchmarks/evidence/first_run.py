"""The first run of the CUDA extension on a GPU: nine steps, the riskiest assumption first, each in its own process.

Every step has a limit of seconds, so that a kernel that never ends loses only its own step. On a CPU the same code runs
at small sizes on the torch backend, as a rehearsal.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from types import ModuleType

import torch

import checkout
from evidence import first_run_steps as steps
from evidence import kernel_runs
from evidence.findings import Finding, finding
from evidence.first_run_steps import Scale, StepResult
from evidence.kernel_runs import NotThis
from measure import processes
from measure.processes import Ended, Process

CHECK = "first-run"
START_SECONDS = 60.0
SANITIZER_TOOLS = ("memcheck", "racecheck", "synccheck")
SANITIZED = ("1", "2", "4", "5")
SANITIZED_BACKWARD = ("3", "5b")


@dataclass(frozen=True)
class Step:
    """One step: its title, its limit in seconds once it launches, and whether it launches a backward."""

    title: str
    limit: float
    run: Callable[[ModuleType, torch.device, Scale], Iterator[StepResult]]
    backward: bool = False


STEPS: dict[str, Step] = {
    "1": Step("one tile of the forward, D128 S128", 15, steps.one_tile),
    "2": Step("V one-hot in each panel of 64 columns", 15, steps.one_hot_panels),
    "3": Step("backward D64 S128: registers", 15, steps.small_backward, backward=True),
    "4": Step("tensor maps of views: bytes come out as they went in", 20, steps.views),
    "5": Step("packed {1, 63, 65, 129} with NaN neighbours, forward", 20, steps.packed_forward),
    "5b": Step("the same, backward", 20, steps.packed_backward, backward=True),
    "6": Step("the error rule at S 16k, forward", 40, steps.long_forward),
    "6b": Step("the same, backward", 60, steps.long_backward, backward=True),
    "7": Step("a graph captured without a first call, forward", 20, steps.captured_forward),
    "7b": Step("the same, backward", 20, steps.captured_backward, backward=True),
    "8": Step("compute-sanitizer, forward", 120, steps.nothing),
    "8b": Step("compute-sanitizer, backward", 120, steps.nothing, backward=True),
    "9": Step("one pass, 1000 launches alone", 200, steps.many_launches, backward=True),
    "9b": Step(
        "the same beside a stream that holds half the multiprocessors", 300, steps.beside, backward=True
    ),
}


def run_step(name: str, device: torch.device, scale: Scale, backend: str = "cuda") -> Iterator[Finding]:
    """One step in this process: its findings; an exception is a finding too."""
    step = STEPS[name]
    try:
        ops = kernel_runs.backend_for(device, backend)
        if device.type == "cuda":
            torch.ones(1, device=device).sum().item()  # the context, not one of our kernels
        processes.announce(step.limit, f"step {name}, {step.title}")
        for good, text in step.run(ops, device, scale):
            status = "skipped" if good is None else "passed" if good else "failed"
            yield finding(CHECK, status, f"{step.title}: {text}", step=name, backend=backend)
    except NotThis as reason:
        yield finding(CHECK, "skipped", f"{step.title}: {reason}", step=name)
    except Exception as error:
        yield finding(CHECK, "failed", f"{step.title}: {type(error).__name__}: {error}", step=name)


def run_all(
    names: Sequence[str], device: str, launches: int, seconds: float, backend: str = "cuda"
) -> Iterator[Finding]:
    """Steps one after another, each in its own process; a step without time left is "not run"."""
    end = time.monotonic() + seconds
    for name in names:
        step, left = STEPS[name], end - time.monotonic()
        command = _command(name, device, launches, backend)
        if isinstance(command, str):
            yield finding(CHECK, "skipped", f"{step.title}: {command}", step=name)
            continue
        if left < 5:
            yield finding(CHECK, "not run", f"{step.title}: no time left", step=name)
            continue
        yield from _findings_of(name, command, min(START_SECONDS + step.limit, left))


def _findings_of(name: str, command: Sequence[str], limit: float) -> Iterator[Finding]:
    step, last, found = STEPS[name], "", 0
    events: processes.Events = SimpleQueue()
    tool = name.startswith("8")
    process = Process(
        command, limit=limit, silence=None if tool else START_SECONDS, events=events, heed=not tool
    )
    for _, event in processes.follow(process):
        if not isinstance(event, Ended):
            if event.text.startswith('{"check"'):
                item = json.loads(event.text)
                found += 1
                yield item if not name.startswith("8") else {**item, "step": name}
            else:
                last = event.text.strip() or last
        elif event.code is None or (event.code not in (0, 1)) or not found:
            why = event.why or f"its process ended with status {event.code}"
            yield finding(CHECK, "failed", f"{step.title}: {why}{'; ' if last else ''}{last}", step=name)
        elif name.startswith("8"):
            tools = ", ".join(SANITIZER_TOOLS)
            yield finding(
                CHECK, "passed" if event.code == 0 else "failed", f"{step.title}: {tools}: {last}", step=name
            )


def _command(name: str, device: str, launches: int, backend: str = "cuda") -> list[str] | str:
    own = [sys.executable, str(checkout.BENCHMARKS / "first_run.py")]
    if not name.startswith("8"):
        return [*own, "--step", name, "--device", device, "--launches", str(launches), "--backend", backend]
    tool = sanitizer()
    if tool is None:
        return "compute-sanitizer is not installed"
    if device == "cpu":
        return "compute-sanitizer checks nothing on a CPU"
    chosen = SANITIZED_BACKWARD if STEPS[name].backward else SANITIZED
    inner = " ".join(f"--step {step}" for step in chosen)
    lines = [
        f"{tool} --tool {kind} --error-exitcode 9 --print-limit 5 {' '.join(own)} {inner} --device {device}"
        for kind in SANITIZER_TOOLS
    ]
    # without torch's memory pool, in which small accesses beyond a tensor stay undetected
    return ["env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", "bash", "-c", " && ".join(lines)]


def sanitizer() -> str | None:
    """compute-sanitizer, on PATH or in the usual place."""
    return shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")


def chosen_steps(options: argparse.Namespace) -> list[str]:
    """The steps that the options select, in order."""
    names = [name for name in STEPS if not options.steps or name.rstrip("b") in options.steps]
    if options.forward:
        names = [name for name in names if not STEPS[name].backward]
    if options.backward:
        names = [name for name in names if STEPS[name].backward]
    return names
