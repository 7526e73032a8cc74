"""Correctness of fastattn on the device at hand: random calls against float64, known traps, repetition, huge offsets.

Every check gives findings as it goes, the last one being its summary. Each check runs in processes of its own: after a
call that never ends, only the rest of that check on that backend is lost.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from queue import SimpleQueue

import torch

import checkout
from evidence import attention_checks, op_checks
from evidence.findings import DeviceLost, Finding, backends_here, finding
from measure import processes
from measure.processes import Ended, Process

Check = Callable[[torch.device, float, int], Iterator[Finding]]

CHECKS: dict[str, Check] = {
    "random": attention_checks.check_random,
    "kv-cache": attention_checks.check_kv_cache,
    **{f"ops-{name}": partial(op_checks.check_ops, names=[name]) for name in op_checks.OPS},
    "cudnn-trap": attention_checks.check_cudnn_trap,
    "few-key-heads": attention_checks.check_few_key_heads,
    "bitwise": attention_checks.check_bitwise,
    "int64-offsets": attention_checks.check_int64_offsets,
}
SCRIPT = checkout.BENCHMARKS / "gpu_checks.py"  # what each process runs
GROUPS = {"ops": [name for name in CHECKS if name.startswith("ops-")]}
SPREAD = (
    "random",
    "kv-cache",
)  # in several processes, each from seeds of its own: kernels compile side by side
START_SECONDS = 90.0  # to import torch and reach the device, many at once
LEAST_SECONDS = 3.0  # a check is not started again with less time left


def run_here(names: Sequence[str], options: argparse.Namespace) -> Iterator[Finding]:
    """Checks in this process, one after another; an exception is a finding, and a lost device ends all of them."""
    device = torch.device(options.device)
    if not backends_here(device):
        wanted = ", ".join(options.backends) or "fastattn"
        yield from (finding(name, "skipped", f"{wanted}: no such backend runs here") for name in names)
        return
    for place, name in enumerate(names):
        try:
            share = sum(each in GROUPS["ops"] for each in names) if name in GROUPS["ops"] else 1
            yield from CHECKS[name](device, options.seconds / share, options.seed)
        except DeviceLost as error:
            yield finding(name, "failed", f"the device is lost: {error}; the rest of this check is not run")
            for other in names[place + 1 :]:
                yield finding(other, "not run", f"the device is lost since {name}")
            return
        except Exception as error:
            yield finding(name, "failed", f"{type(error).__name__}: {error}")


@dataclass(frozen=True)
class Part:
    """A share of a check that one process has."""

    name: str
    number: int
    seed: int
    backends: tuple[str, ...]  # empty for all


def in_processes(names: Sequence[str], options: argparse.Namespace) -> Iterator[Finding]:
    """Checks side by side, in processes of their own; their findings as they come.

    A process that hangs is ended, and another one continues without the backend in which it hung.
    """
    started = time.monotonic()
    spread = [name for name in names if name in SPREAD]
    workers = {name: max(1, options.workers // len(spread)) if name in spread else 1 for name in names}
    pending = [
        Part(name, number, options.seed + 100_000 * number, tuple(options.backends))
        for name in names
        for number in range(workers[name])
    ]
    while pending:
        events: processes.Events = SimpleQueue()
        left = options.seconds - (time.monotonic() - started)
        running = {_worker(part, options, max(left, LEAST_SECONDS), events): part for part in pending}
        pending = []
        failed: dict[Process, bool] = dict.fromkeys(running, False)
        for process, event in processes.follow(*running):
            part = running[process]
            if isinstance(event, processes.Line):
                item = _parsed(event.text)
                if item is None:
                    print(event.text, file=sys.stderr, flush=True)
                else:
                    failed[process] = failed[process] or item["status"] == "failed"
                    yield item
            elif event.code is None:
                stuck = _backend_of(event)
                yield finding(part.name, "failed", f"process {part.number}: {event.why}", backend=stuck or "")
                others = [name for name in part.backends or backends_of(options) if name != stuck]
                if stuck and others and options.seconds - (time.monotonic() - started) > LEAST_SECONDS:
                    pending.append(replace(part, seed=part.seed + 50_000, backends=tuple(others)))
            elif event.code and not failed[process]:
                text = f"process {part.number} ended with status {event.code}"
                yield finding(part.name, "failed", text)


def backends_of(options: argparse.Namespace) -> list[str]:
    """The chosen backends, all of the device's where none was chosen."""
    return list(options.backends) or backends_here(torch.device(options.device))


def _worker(part: Part, options: argparse.Namespace, seconds: float, events: processes.Events) -> Process:
    command = [sys.executable, str(SCRIPT), part.name, "--here", "--seconds", f"{seconds:g}"]
    command += ["--device", options.device, "--seed", str(part.seed)]
    command += ["--backends", *part.backends] if part.backends else []
    # after its time is up, a check may finish its current call
    return Process(command, limit=START_SECONDS + 2 * seconds + 60, silence=START_SECONDS, events=events)


def _backend_of(event: Ended) -> str | None:
    """The backend of the call that was announced last: "random triton: B1 ..."."""
    words = event.doing.partition(":")[0].split()
    return words[-1] if words and words[-1] in ("cuda", "triton", "torch") else None


def _parsed(line: str) -> Finding | None:
    if not line.startswith('{"check"'):
        return None
    try:
        item: Finding = json.loads(line)
    except ValueError:
        return None
    return item


def run(names: Sequence[str], options: argparse.Namespace) -> Iterator[Finding]:
    """The findings of the named checks, in this process or in processes of their own."""
    if options.here:
        yield from run_here(names, options)
        return
    together = [[name for name in names if name in SPREAD], [name for name in names if name in GROUPS["ops"]]]
    alone = [[name] for name in names if not any(name in group for group in together)]
    for group in (*together, *alone):
        if group:
            yield from in_processes(group, options)
