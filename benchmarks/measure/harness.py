"""Measures providers side by side: interleaved rounds in one process, errors against float64, peak memory, ceilings.

A bench passes cases; a case opens a workload; a workload has one step for each provider. A step is one timed call and
returns its tensors by name, from which the errors are computed. A provider that cannot run has a row with the reason.
"""

from __future__ import annotations

import contextlib
import gc
import re
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from measure import launches, memory
from measure.device_errors import lost_after
from measure.errors import errors_against
from measure.protocols import REFUSED, CannotRun, Case, Step, Workload
from report.schema import Result, dtype_name, without_paths

Sampler = Callable[[Step, int], float]  # seconds per call of a step called that many times


@dataclass(frozen=True)
class Budget:
    """How long one case is measured: rounds until `seconds` are used, within the two bounds."""

    seconds: float = 20.0
    least_rounds: int = 5  # 3 where they would take four times `seconds`, unless `patient`
    most_rounds: int = 30
    least_sample_seconds: float = 0.002  # shorter calls are repeated within a sample
    memory: bool = True
    errors: bool = True
    launches: bool = False  # on a GPU, count the kernels of a call
    patient: bool = False  # `least_rounds` however long they take


QUICK = Budget(seconds=1.0, least_rounds=2, most_rounds=5, least_sample_seconds=0.001)
SIZING_CALLS = 4  # at most, of which the quickest tells how many calls a sample takes
SIZING_SAMPLES = 10  # a call that takes as long as so many samples is not repeated
TARGET_ROUNDS = 15  # least number of samples of a case with a target


def for_target(budget: Budget) -> Budget:
    """The budget of a case with a target: at least TARGET_ROUNDS samples, however long they take."""
    least = max(budget.least_rounds, TARGET_ROUNDS + 1)  # the first round of short calls does not count
    return replace(budget, least_rounds=least, most_rounds=max(budget.most_rounds, least), patient=True)


def run_case(
    case: Case,
    device: torch.device,
    budget: Budget,
    ceilings: Result,
    script: Path | None = None,
    only: str | None = None,
) -> Result:
    """The case's entry of a result: every provider's time, error, memory and share of the ceiling.

    `only` is a pattern that a provider's name must contain.

    `script` is the bench whose command line runs steps in child processes (see `memory.child_peaks`); without it,
    a CPU case has no memory figures.
    """
    workload = case.open(device)
    steps: dict[str, Step] = {}
    chosen = [name for name in case.providers(device) if only is None or re.search(only, name)]
    rows: dict[str, Result] = {name: {} for name in chosen}
    for provider in sorted(
        chosen, key=lambda name: name.endswith("-cuda")
    ):  # a fault there spares the others
        row, step = _admit(case, workload, provider, device, budget)
        rows[provider] = row
        if step is not None:
            steps[provider] = step
    sampler = _sampler(device)
    samples = time_interleaved(steps, device, budget, sampler)
    for provider, seconds in samples.items():
        row = rows[provider]
        row["time_ms"] = spread(seconds)
        row |= rates(case, statistics.median(seconds), ceilings)
        row["host_ms"] = None
        if isinstance(sampler, _CudaSampler):
            row["host_ms"] = round(1e3 * statistics.median(sampler.host[steps[provider]]), 4)
        row["peak_memory_mib"] = None
        if budget.launches and device.type == "cuda":
            row["launches"] = launches.count(steps[provider])
    steps.clear()
    del sampler
    if budget.memory and device.type == "cuda":
        for provider in samples:
            rows[provider]["peak_memory_mib"] = memory.cuda_peak_mib(workload, provider, device)
    del workload
    memory.release(device)
    if budget.memory and device.type == "cpu" and script is not None and samples:
        for provider, peak in memory.child_peaks(script, case.name, list(samples)).items():
            rows[provider]["peak_memory_mib"] = peak
    return {
        "name": case.name,
        "group": case.group,
        "label": case.label,
        "axis": case.axis,
        "params": case.params,
        "direction": case.direction,
        "dtype": dtype_name(case.dtype),
        "flops": case.flops,
        "bytes": case.bytes,
        "target": case.target,
        "rows": list(rows.values()),
    }


def rates(case: Case, seconds: float, ceilings: Result) -> Result:
    """TFLOP/s or GB/s of a call, and the share of the ceiling that bounds such calls."""
    found: Result = {"tflops": None, "gbps": None, "ceiling_share": None}
    peak, rate = None, None
    if case.flops:
        rate, peak = case.flops / seconds / 1e12, ceilings["matmul_tflops"].get(dtype_name(case.dtype))
        found["tflops"] = round(rate, 4)
    elif case.bytes:
        rate, peak = case.bytes / seconds / 1e9, ceilings["copy_gbps"]
        found["gbps"] = round(rate, 4)
    if rate and peak:
        found["ceiling_share"] = round(rate / peak, 4)
    return found


def _admit(
    case: Case, workload: Workload, provider: str, device: torch.device, budget: Budget
) -> tuple[Result, Step | None]:
    row: Result = {
        "provider": provider,
        "status": "ok",
        "error": None,
        "within_rule": None,
        "error_over": None,
    }
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            step = workload.step(provider)
            outputs = step()
            synchronize(device)
        if budget.errors:
            judgement = workload.judge(provider)
            if judgement is not None:
                row["error"], row["within_rule"] = errors_against(judgement, outputs, case.dtype)
                row["error_over"] = judgement.over
    except ImportError as error:
        reason = without_paths(f"not installed: {error}".splitlines()[0])
        return {"provider": provider, "status": "unavailable", "reason": reason[:300]}, None
    except CannotRun as reason:
        return {"provider": provider, "status": "unavailable", "reason": without_paths(str(reason))}, None
    except Exception as error:
        text = without_paths(f"{type(error).__name__}: {error}".strip().splitlines()[0])
        if lost_after(error, device):
            raise
        if REFUSED in str(error):
            return {"provider": provider, "status": "unavailable", "reason": text[:300]}, None
        return {"provider": provider, "status": "failed", "reason": text[:300]}, None
    return row, step


def time_interleaved(
    steps: Mapping[str, Step], device: torch.device, budget: Budget, sample: Sampler | None = None
) -> dict[str, list[float]]:
    """Seconds per call of every sample: each round calls every provider once, in an order that rotates.

    The first call of each step must have happened. The first round takes single calls and sizes the later samples; it
    counts where those are single calls too. The quickest of a few calls sizes them, since a second call may still
    prepare something, as our plans do. On CUDA a sample is bracketed by events and the last-level cache is overwritten
    before it; elsewhere by the host's clock.
    """
    names = list(steps)
    samples: dict[str, list[float]] = {name: [] for name in names}
    if not names:
        return samples
    sample = sample or _sampler(device)
    repeats = dict.fromkeys(names, 1)
    with without_collections():
        started = time.perf_counter()
        for number in range(budget.most_rounds):
            turn = number % len(names)
            for name in names[turn:] + names[:turn]:
                seconds = sample(steps[name], repeats[name])
                if number == 0:
                    quickest = seconds
                    for _ in range(SIZING_CALLS - 1):
                        if quickest < SIZING_SAMPLES * budget.least_sample_seconds:
                            seconds = sample(steps[name], 1)
                            quickest = min(quickest, seconds)
                    repeats[name] = max(1, min(1000, int(budget.least_sample_seconds / max(quickest, 1e-7))))
                if number > 0 or repeats[name] == 1 or budget.most_rounds == 1:
                    samples[name].append(seconds)
            used = time.perf_counter() - started
            hurried = used > 4 * budget.seconds and not budget.patient
            enough = min(budget.least_rounds, 3) if hurried else budget.least_rounds
            if number + 1 >= max(enough, 2) and used > budget.seconds:
                break
    return samples


@contextlib.contextmanager
def without_collections() -> Iterator[None]:
    """Collect garbage now, and not while this is active."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _sampler(device: torch.device) -> Sampler:
    return _CudaSampler(device) if device.type == "cuda" else _host_sample


def _host_sample(step: Step, repeats: int) -> float:
    started = time.perf_counter()
    for _ in range(repeats):
        step()
    return (time.perf_counter() - started) / repeats


class _CudaSampler:
    """Seconds of device time per call, the cache overwritten before each sample.

    A spinning kernel then delays the device for longer than the host needed to launch such calls before, so that launch
    gaps do not count; the host's time is kept in `host`.
    """

    HERTZ = 2e9  # at least the clock of any device, so that the wait is never too short

    def __init__(self, device: torch.device) -> None:
        from fastattn import torch_compat

        self.spin = torch_compat.cuda_sleep
        self.cache = torch.empty(2**28, dtype=torch.int8, device=device)
        self.host: dict[Step, list[float]] = {}

    def __call__(self, step: Step, repeats: int) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        took = self.host.setdefault(step, [])
        wait = min(2 * repeats * max(took[-3:], default=0.001), 0.05)
        torch.cuda.synchronize()
        self.cache.zero_()
        self.spin(int(wait * self.HERTZ))
        start.record()
        began = time.perf_counter()
        for _ in range(repeats):
            step()
        took.append((time.perf_counter() - began) / repeats)
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3 / repeats


def timed_row(provider: str, seconds: list[float]) -> Result:
    """The row of a provider with a time only."""
    row: Result = {"provider": provider, "status": "ok", "time_ms": spread(seconds)}
    unknown = ("error", "within_rule", "tflops", "gbps", "ceiling_share", "host_ms", "peak_memory_mib")
    return row | dict.fromkeys(unknown)


def spread(seconds: list[float]) -> Result:
    ordered = sorted(seconds)

    def quantile(share: float) -> float:
        place = share * (len(ordered) - 1)
        low = int(place)
        high = min(low + 1, len(ordered) - 1)
        return 1e3 * (ordered[low] + (place - low) * (ordered[high] - ordered[low]))

    figures = {"p20": quantile(0.2), "median": quantile(0.5), "p80": quantile(0.8)}
    return {**{name: float(f"{value:.6g}") for name, value in figures.items()}, "samples": len(ordered)}


def measure_ceilings(device: torch.device, dtypes: Sequence[torch.dtype], quick: bool = False) -> Result:
    """TFLOP/s of a large square product by dtype, GB/s of a large copy (bytes read + written), on random data."""
    cuda = device.type == "cuda"
    size = 8192 if cuda else 2048
    length = 2**30 if cuda else 2**27
    if quick:
        size, length = size // 2, length // 4
    steps: dict[str, Step] = {}
    for dtype in dtypes:
        steps[dtype_name(dtype)] = _matmul_step(size, dtype, device)
    source = torch.randint(0, 127, (length,), dtype=torch.int8, device=device)
    copy = torch.empty_like(source)
    steps["copy"] = lambda: {"copy": copy.copy_(source)}
    for step in steps.values():
        step()
    budget = Budget(seconds=0.1 if quick else 3.0 if cuda else 1.0, least_rounds=3, most_rounds=30)
    median = {name: statistics.median(s) for name, s in time_interleaved(steps, device, budget).items()}
    rates = {
        name: round(2 * size**3 / seconds / 1e12, 4) for name, seconds in median.items() if name != "copy"
    }
    return {"matmul_tflops": rates, "copy_gbps": round(2 * length / median["copy"] / 1e9, 2)}


def _matmul_step(size: int, dtype: torch.dtype, device: torch.device) -> Step:
    left = torch.randn(size, size, device=device).to(dtype)
    right = torch.randn(size, size, device=device).to(dtype)
    return lambda: {"product": left @ right}


def synchronize(device: torch.device) -> None:
    """Wait for the device's queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
