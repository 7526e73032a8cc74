"""Peak memory of one step: from torch's allocator on a GPU, of a separate process on a CPU."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from measure.protocols import Case, Step, Workload

MARK = "peak-memory:"
# glibc keeps freed blocks below these sizes; they are set low, so that the resident size follows the allocated size
_MALLOC_SETTINGS = {
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "MALLOC_TOP_PAD_": "0",
}


def release(device: torch.device) -> None:
    """Collect garbage and empty torch's cache."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def cuda_peak_mib(workload: Workload, provider: str, device: torch.device) -> float:
    """Peak MiB of one step of the provider above the workload's inputs."""
    release(device)
    before = torch.cuda.memory_allocated(device)
    step = workload.step(provider)
    _settle(workload, step)
    release(device)
    torch.cuda.reset_peak_memory_stats(device)
    step()
    torch.cuda.synchronize(device)
    return round((torch.cuda.max_memory_allocated(device) - before) / 2**20, 2)


def child_peaks(
    script: Path, case: str, providers: Sequence[str], timeout: float = 600
) -> dict[str, float | None]:
    """Peak resident MiB of one step of each provider above the inputs all share, each in a process of its own.

    What a provider alone needs, such as a dense mask, counts; the temporaries of building it do not. A child
    (`python SCRIPT --measure-memory CASE PROVIDER ...`) imports everything once and forks per provider. A fork runs
    the case's small form first, so that code pages, thread pools and caches are not counted, and its malloc returns
    freed blocks to the system, so that they are not counted. None where the system cannot reset a process's peak
    (other than Linux), or where the provider ended without a figure, which is printed.
    """
    command = [sys.executable, str(script), "--threads", str(torch.get_num_threads())]
    command += ["--measure-memory", case, *providers]
    environment = {**os.environ, **_MALLOC_SETTINGS}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=timeout, env=environment, check=False
        )
    except subprocess.TimeoutExpired:
        print(f"  {case}: no memory figures: stopped after {timeout:.0f} s", file=sys.stderr)
        return dict.fromkeys(providers)
    marked = [line[len(MARK) :] for line in done.stdout.splitlines() if line.startswith(MARK)]
    found: dict[str, float | None] = {}
    for line in marked:
        found |= json.loads(line)
    for provider in providers:
        if provider not in found:
            lines = done.stderr.strip().splitlines() or ["no output"]
            print(f"  {provider}: no memory figure: {lines[-1][:200]}", file=sys.stderr)
    return {name: None if peak is None else round(peak, 2) for name, peak in found.items()}


def print_peaks(case: Case, providers: Sequence[str]) -> None:
    """The child's side of `child_peaks`: a line with the MiB of one step for each provider, each from a fork."""
    for provider in providers:
        if not hasattr(os, "fork"):
            print(f"{MARK} {json.dumps({provider: None})}", flush=True)
            continue
        sys.stdout.flush()
        child = os.fork()  # nothing has run yet, so there are no other threads
        if child == 0:
            status = 1
            try:
                print(f"{MARK} {json.dumps({provider: peak_of_step(case, provider)})}", flush=True)
                status = 0
            except BaseException as error:
                print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            finally:
                os._exit(status)
        os.waitpid(child, 0)


def peak_of_step(case: Case, provider: str) -> float | None:
    """Peak MiB of one step in this process; the high-water mark of resident memory is reset before it."""
    device = torch.device("cpu")
    case.small().open(device).step(provider)()
    workload = case.open(device)
    before = _reset_peak_rss()
    step = workload.step(provider)
    _settle(workload, step)
    _reset_peak_rss()
    outputs = step()
    peak = None if before is None else (_status_kib("VmHWM") - before) / 1024
    del outputs
    return peak


def _settle(workload: Workload, step: Step) -> None:
    """Run a first step where it makes what all others find, as an optimiser's state: a workload with `keeps_state`."""
    if getattr(workload, "keeps_state", False):
        step()


def peak_resident_mib() -> float:
    """The high-water mark of this process's resident memory; OSError where the system has none (other than Linux)."""
    return _status_kib("VmHWM") / 1024


def _reset_peak_rss() -> int | None:
    """Reset the high-water mark to the resident KiB, which are returned; None where the kernel offers no such reset."""
    gc.collect()
    _trim()
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        return _status_kib("VmRSS")
    except OSError:
        return None


def _status_kib(field: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1])
    raise OSError(f"no {field} in the process status")


def _trim() -> None:
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
