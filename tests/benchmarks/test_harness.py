"""How providers are timed, judged, weighed and kept."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import checkout
from measure import harness, memory
from measure.harness import Budget
from measure.protocols import CannotRun, Judgement
from report import figures

CPU = torch.device("cpu")
BRIEF = Budget(seconds=60.0, least_rounds=4, most_rounds=4, least_sample_seconds=0.0, memory=False)
CEILINGS = {"matmul_tflops": {"float32": 1.0}, "copy_gbps": 1.0}


def _nothing() -> dict[str, Tensor]:
    return {"out": torch.zeros(3)}


@dataclass
class FakeCase:
    """A case whose providers are given functions."""

    steps: Mapping[str, Callable[[], Any]]
    name: str = "fake"
    label: str = "a fake"
    group: str = "fake"
    axis: dict[str, Any] | None = None
    params: dict[str, Any] = field(default_factory=dict)
    direction: str = "forward"
    dtype: torch.dtype = torch.float32
    flops: float | None = 1e6
    bytes: float | None = None
    target: dict[str, Any] | None = None

    def providers(self, device: torch.device) -> list[str]:
        return list(self.steps)

    def open(self, device: torch.device) -> FakeCase:
        return self

    def small(self) -> FakeCase:
        return self

    def step(self, provider: str) -> Callable[[], Any]:
        return self.steps[provider]()

    def judge(self, provider: str) -> Judgement:
        zeros = {"out": torch.zeros(3, dtype=torch.float64)}
        return Judgement(
            lambda name, tensor: tensor, zeros, lambda: {"out": torch.full((3,), 0.25)}, "everything"
        )


def test_rounds_call_everyone_once_in_a_rotating_order() -> None:
    called: list[str] = []
    steps = {name: lambda name=name: called.append(name) for name in "abc"}
    samples = harness.time_interleaved(steps, CPU, BRIEF)
    assert {name: len(times) for name, times in samples.items()} == {"a": 4, "b": 4, "c": 4}
    assert called == [*"abc", *"bca", *"cab", *"abc"]


def test_slow_calls_take_fewer_rounds() -> None:
    budget = Budget(seconds=0.001, least_rounds=5, most_rounds=9, least_sample_seconds=0)
    samples = harness.time_interleaved({"slow": lambda: time.sleep(0.01)}, CPU, budget)
    assert len(samples["slow"]) == 3


def test_what_is_held_against_a_target_takes_all_its_rounds() -> None:
    brief = Budget(seconds=0.001, least_rounds=5, most_rounds=9, least_sample_seconds=0.002)
    steps = {"slow": lambda: time.sleep(0.003), "short": lambda: None}
    samples = harness.time_interleaved(steps, CPU, harness.for_target(brief))
    assert {name: len(times) for name, times in samples.items()} == {"slow": 16, "short": 15}
    longer = Budget(least_rounds=20, most_rounds=40)
    assert (harness.for_target(longer).least_rounds, harness.for_target(longer).most_rounds) == (20, 40)


def test_short_calls_are_repeated_within_a_sample() -> None:
    calls = []
    budget = Budget(seconds=0, least_rounds=3, most_rounds=3, least_sample_seconds=0.002)
    samples = harness.time_interleaved({"quick": lambda: calls.append(1)}, CPU, budget)
    assert len(calls) > 100
    assert len(samples["quick"]) == 2  # the round of a single call sized these
    assert max(samples["quick"]) < 0.001


def test_a_call_that_prepares_something_does_not_size_the_samples() -> None:
    calls = []

    def step() -> None:
        calls.append(1)
        if len(calls) == 1:
            time.sleep(0.005)

    budget = Budget(seconds=0, least_rounds=3, most_rounds=3, least_sample_seconds=0.002)
    harness.time_interleaved({"planned": step}, CPU, budget)
    assert len(calls) > 100


def test_on_a_gpu_the_host_time_and_the_launches_of_a_call_are_stored(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The branch for a GPU, on a device that is not there: events, the cache and the wait are stand-ins."""
    from types import SimpleNamespace

    class Event:
        def record(self) -> None:
            pass

        def synchronize(self) -> None:
            pass

        def elapsed_time(self, end: Event) -> float:
            return 2.0

    profiled = SimpleNamespace(events=lambda: [SimpleNamespace(name="cudaLaunchKernel")] * 3)
    monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: Event())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    monkeypatch.setattr(torch.profiler, "profile", lambda **options: contextlib.nullcontext(profiled))

    class Sampler(harness._CudaSampler):
        def __init__(self, device: torch.device) -> None:
            self.spin, self.cache, self.host = (lambda cycles: None), torch.zeros(1), {}

    monkeypatch.setattr(harness, "_CudaSampler", Sampler)
    budget = Budget(seconds=0.01, least_rounds=2, most_rounds=3, memory=False, launches=True)
    entry = harness.run_case(FakeCase({"fastattn": lambda: _nothing}), torch.device("cuda"), budget, CEILINGS)
    (row,) = entry["rows"]
    assert row["status"] == "ok"
    assert row["host_ms"] >= 0
    assert row["launches"] == 3


def test_spread_is_median_and_quantiles() -> None:
    spread = harness.spread([0.005, 0.001, 0.003, 0.002, 0.004, 0.006])
    assert spread == {"p20": 2.0, "median": 3.5, "p80": 5.0, "samples": 6}


def test_a_provider_that_cannot_run_keeps_its_row_and_reason() -> None:
    def refuses() -> Any:
        raise CannotRun("it has no softcap")

    def breaks() -> Any:
        raise ValueError("cannot read /some/where/weights.bin")

    def not_a_number() -> Any:
        return lambda: {"out": torch.full((3,), float("nan"))}

    steps = {"good": lambda: _nothing, "refuses": refuses, "breaks": breaks, "nan": not_a_number}
    case = harness.run_case(FakeCase(steps), CPU, BRIEF, CEILINGS)
    rows = {row["provider"]: row for row in case["rows"]}
    assert list(rows) == list(steps)
    assert rows["refuses"] == {
        "provider": "refuses",
        "status": "unavailable",
        "reason": "it has no softcap",
    }
    assert rows["breaks"]["reason"] == "ValueError: cannot read weights.bin"
    assert rows["nan"]["status"] == "failed"
    assert "nan" in rows["nan"]["reason"]
    assert rows["good"]["status"] == "ok"
    assert rows["good"]["time_ms"]["samples"] == 4
    assert rows["good"]["ceiling_share"] == pytest.approx(rows["good"]["tflops"], rel=1e-2)


@pytest.mark.parametrize(("value", "within"), [(0.0, True), (0.5, True), (0.51, False)])
def test_the_rule_is_twice_the_error_of_plain_torch(value: float, within: bool) -> None:
    judgement = FakeCase({}).judge("any")
    errors, kept = harness.errors_against(judgement, {"out": torch.full((3,), value)}, torch.float32)
    assert errors["out"] == pytest.approx(value)
    assert kept is within


def test_plain_torch_that_is_exact_by_chance_is_asked_in_other_orders() -> None:
    golden = {"out": torch.zeros(3, dtype=torch.float64)}
    for dtype, within in ((torch.float32, True), (torch.bfloat16, False)):
        errors_of_orders = iter((0.0, 0.125, 0.25, 4.0))
        judgement = Judgement(
            lambda name, tensor: tensor,
            golden,
            lambda: {"out": torch.full((3,), next(errors_of_orders), dtype=dtype)},  # noqa: B023
            "all",
        )
        _, kept = harness.errors_against(judgement, {"out": torch.full((3,), 0.5)}, dtype)
        assert kept is within
        assert list(errors_of_orders) == ([4.0] if within else [0.125, 0.25, 4.0])  # no more than it takes


def test_equal_infinities_are_no_error() -> None:
    golden = {"lse": torch.tensor([-torch.inf, 1.0], dtype=torch.float64)}
    judgement = Judgement(
        lambda name, tensor: tensor, golden, lambda: {"lse": torch.tensor([-torch.inf, 1.0])}, "all"
    )
    errors, within = harness.errors_against(
        judgement, {"lse": torch.tensor([-torch.inf, 1.0])}, torch.float32
    )
    assert errors == {"lse": 0.0}
    assert within


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process can be reset on Linux only")
def test_peak_memory_counts_what_a_step_holds_and_what_it_needs(capsys: pytest.CaptureFixture[str]) -> None:
    mib = 2**18  # float32 elements

    def needs_48_uses_96() -> Callable[[], Any]:
        own = torch.ones(48 * mib)

        def step() -> dict[str, Tensor]:
            first = torch.ones(96 * mib)
            del first
            return {"out": torch.ones(40 * mib) * own[0]}

        return step

    assert memory.peak_of_step(FakeCase({"it": needs_48_uses_96}), "it") == pytest.approx(48 + 96, abs=6)


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process can be reset on Linux only")
def test_peak_memory_of_steps_that_keep_something_is_a_later_one_s() -> None:
    """As an optimiser's state, which the first step makes once its temporaries are gone."""
    mib = 2**18

    class Keeping(FakeCase):
        keeps_state = True

    def keeps_48_uses_96() -> Callable[[], Any]:
        kept: list[Tensor] = []

        def step() -> dict[str, Tensor]:
            first = torch.ones(96 * mib)
            del first
            if not kept:
                kept.append(torch.ones(48 * mib))
            return {"out": torch.ones(1)}

        return step

    steps = {"it": keeps_48_uses_96}
    assert memory.peak_of_step(FakeCase(steps), "it") == pytest.approx(96, abs=6)
    assert memory.peak_of_step(Keeping(steps), "it") == pytest.approx(48 + 96, abs=6)


@pytest.mark.skipif(sys.platform != "linux", reason="processes fork on Linux")
def test_providers_are_weighed_in_processes_of_their_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = tmp_path / "bench.py"
    script.write_text(
        f"import os, sys\nsys.path.append({str(checkout.BENCHMARKS)!r})\nfrom measure import memory\n"
        "def peak(case, name):\n"
        "    if name == 'dies': os._exit(3)\n"
        "    if name == 'fails': raise ValueError('no room')\n"
        "    print('noise')\n"
        "    return 2.126\n"
        "memory.peak_of_step = peak\n"
        "memory.print_peaks(None, sys.argv[sys.argv.index('--measure-memory') + 2:])\n"
    )
    peaks = memory.child_peaks(script, "case", ["good", "dies", "fails", "last"])
    assert peaks == {"good": 2.13, "last": 2.13}
    err = capsys.readouterr().err
    assert "dies: no memory figure" in err
    assert "fails: no memory figure: ValueError: no room" in err


def test_a_step_that_never_ends_has_no_memory_figure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = tmp_path / "bench.py"
    script.write_text("import time\ntime.sleep(600)\n")
    assert memory.child_peaks(script, "case", ["a", "b"], timeout=1.0) == {"a": None, "b": None}
    assert "case: no memory figures: stopped after 1 s" in capsys.readouterr().err


def test_ceilings_are_measured_by_dtype() -> None:
    small = harness.measure_ceilings(CPU, [torch.float32], quick=True)
    assert small["matmul_tflops"]["float32"] > 0
    assert small["copy_gbps"] > 0


def _row(provider: str, median: float, memory: float | None = None) -> dict[str, Any]:
    time = {"median": median, "p20": median, "p80": median, "samples": 1}
    return {"provider": provider, "status": "ok", "time_ms": time, "peak_memory_mib": memory}


@pytest.mark.parametrize(
    ("ours", "memory", "verdict"),
    [
        (10.0, 20.0, "met"),
        (12.6, 20.0, "missed (7.94x of 8.0x)"),
        (10.0, 30.0, "missed (0.30 of 0.25 of the memory)"),
        (10.0, None, ""),
        (12.6, None, "missed (7.94x of 8.0x)"),
    ],
)
def test_verdict_compares_with_the_target(ours: float, memory: float | None, verdict: str) -> None:
    target = {"provider": "fastattn", "against": "sdpa", "speed": 8.0, "memory": 0.25}
    case = {"target": target, "rows": [_row("fastattn", ours, memory), _row("sdpa", 100.0, 100.0)]}
    assert figures.verdict(case) == verdict


@pytest.mark.parametrize(
    ("ours", "said"), [(59.0, "met"), (61.0, "missed (0.61x of 0.6x the time)"), (None, "not measured")]
)
def test_the_line_of_a_case_gives_its_target(ours: float | None, said: str) -> None:
    target = {"provider": "fastattn", "against": "transformers", "time": 0.6}
    failed = {"provider": "fastattn", "status": "failed", "reason": "no"}
    rows = [failed if ours is None else harness.timed_row("fastattn", [ours / 1e3])]
    rows.append(harness.timed_row("transformers", [0.1]))
    case = {"name": "start", "direction": "forward", "dtype": "float32", "target": target, "rows": rows}
    first = figures.case_lines(case)[0]
    assert first == f"start  [forward, float32]  target ≤ 0.6× time against transformers: {said}"  # noqa: RUF001
    assert figures.least_speed(case) == pytest.approx(1 / 0.6)


@pytest.mark.parametrize(("times", "said"), [((90.0, 110.0, 100.0), "met"), ((90.0, 110.0, 101.0), "missed")])
def test_the_median_of_a_bench_is_over_what_ran(times: tuple[float, ...], said: str) -> None:
    target = {"provider": "fastattn", "against": "as it was", "speed": 0.97}
    rows = [[_row("fastattn", time, None), _row("as it was", 100.0, None)] for time in times]
    rows.append(
        [{"provider": name, "status": "unavailable", "reason": "no"} for name in ("fastattn", "as it was")]
    )
    cases = [{"name": f"case{n}", "target": target, "rows": made} for n, made in enumerate(rows)]
    speed = 100 / sorted(times)[1]
    expected = f"median of 3 cases  {speed:.2f}x  target ≥ 1.0×: {said}; not measured: case3"  # noqa: RUF001
    assert figures.median_line({"bench": "swap", "cases": cases}) == expected
    assert figures.median_line({"bench": "swap", "cases": cases[3:]}) == ""
    assert figures.median_line({"bench": "train", "cases": cases}) == ""


def test_best_peer_is_the_fastest_that_is_not_ours() -> None:
    failed = {"provider": "broken", "status": "failed", "reason": "no"}
    case = {
        "target": None,
        "rows": [_row("fastattn-triton", 1.0), _row("slow", 9.0), _row("fast", 4.0), failed],
    }
    assert figures.best_peer(case) == _row("fast", 4.0)
    assert figures.best_ours(case) == _row("fastattn-triton", 1.0)
    assert figures.speed_ratio(figures.best_ours(case), figures.best_peer(case)) == 4.0
