"""The tuning run: compares candidate tiles with the reference, times them and stores the fastest."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from typing import Any, Protocol

from fastattn.backends.triton import MIN_ARCH
from fastattn.console import InputError, Output
from fastattn.kernels import tuned
from fastattn.kernels.tiles import Tile
from fastattn.kernels.tuned import KERNELS, Machine, Winner
from fastattn.ops import plan as call_plans
from fastattn.spec import MAX_HEAD_DIM
from fastattn.tune import plan
from fastattn.tune.plan import Candidate, Work

ROUNDS, QUICK_ROUNDS = 9, 5
COLUMNS = ("kernel and call", "candidates", "right", "built-in", "ms", "fastest", "ms", "gain")

Report = dict[str, Any]


class Runner(Protocol):
    """The interface that runs tiles: `device.Device`, or a stand-in of the tests."""

    def verdict(self, work: Work, tile: Tile) -> str | None:
        """Why a tile cannot be used, or None."""

    def seconds(self, work: Work, tile: Tile) -> float:
        """One sample of its time per call."""


MAX_MINUTES = 60 * 24 * 365


@dataclass(frozen=True)
class Options:
    """The kernels and calls to tune, and the time limit."""

    dtypes: tuple[str, ...] = ()
    head_dims: tuple[tuple[int, int], ...] = ()
    kinds: tuple[str, ...] = ()
    kernels: tuple[str, ...] = KERNELS
    quick: bool = False
    minutes: float | None = None
    jobs: int = 1

    @classmethod
    def of(
        cls,
        dtypes: Sequence[str] | None,
        head_dims: Sequence[str] | None,
        kinds: Sequence[str] | None,
        kernels: Sequence[str] | None,
        quick: bool,
        minutes: float | None,
        jobs: int,
    ) -> Options:
        """Options of the command line; None is the default. InputError for options that cannot be used."""
        if minutes is not None and not 0 <= minutes <= MAX_MINUTES:
            raise InputError(f"--minutes: got {minutes}, needs 0 to {MAX_MINUTES}")
        dims = tuple(_head_dims(text) for text in head_dims or ())
        return cls(
            tuple(dtypes or ()), dims, tuple(kinds or ()), tuple(kernels or KERNELS), quick, minutes, jobs
        )

    def works(self) -> list[Work]:
        """Every work; InputError for unknown names."""
        dims = self.head_dims or tuple(
            (d, d) for d in (plan.QUICK_HEAD_DIMS if self.quick else plan.HEAD_DIMS)
        )
        dtypes = self.dtypes or (("bfloat16",) if self.quick else tuple(plan.DTYPES))
        kinds = self.kinds or (plan.QUICK_KINDS if self.quick else plan.KINDS)
        try:
            return list(plan.works(dtypes, dims, kinds, self.kernels))
        except ValueError as error:
            raise InputError(str(error)) from None


def _head_dims(text: str) -> tuple[int, int]:
    """(D, Dv) of "64" or "192,128"."""
    parts = [part.strip() for part in text.split(",")]
    numbers = [int(part) if part.isdecimal() and len(part) < 9 else 0 for part in parts]
    if len(numbers) not in (1, 2) or not all(1 <= number <= MAX_HEAD_DIM for number in numbers):
        raise InputError(f"--head-dim: got {text!r}, needs 1 to {MAX_HEAD_DIM}, or two of them as in 192,128")
    return numbers[0], numbers[-1]


def list_candidates(options: Options, arch: int | None, output: Output) -> Report:
    """The tiles that a run would measure on compute capability arch / 10 (this GPU's, else 9.0); runs nothing."""
    arch = arch or arch_here() or 90
    works = []
    for work in options.works():
        found = plan.candidates(work, arch, options.quick)
        possible = [candidate for candidate in found if candidate.reason is None]
        output.line(f"{work}: {len(possible)} candidates of {len(found)}, the built-in is {found[0].tile}")
        for candidate in found[1:]:
            output.line(f"  {candidate.tile}" + (f"  -  {candidate.reason}" if candidate.reason else ""))
        listed = [{"tile": asdict(c.tile), "reason": c.reason} for c in found]
        works.append({"name": str(work), "kernel": work.kernel, "candidates": listed})
    return {"arch": arch, "dry_run": True, "works": works}


def arch_here() -> int | None:
    """10 * major + minor of the current CUDA device, if there is one."""
    import torch

    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


def tune_here(options: Options, output: Output) -> Report:
    """Tune the current CUDA device; InputError where there is none that Triton's kernels run on."""
    import torch

    works = options.works()
    arch = arch_here()
    if arch is None:
        raise InputError(
            "tuning needs a CUDA GPU, and torch finds none on this machine; --dry-run lists the candidates"
        )
    name = torch.cuda.get_device_name()
    if arch < MIN_ARCH:
        raise InputError(
            f"{name} has compute capability {arch / 10}, the Triton kernels need {MIN_ARCH / 10}"
        )
    if tuned.device_name(arch) != name:
        raise InputError(
            f"there are several kinds of devices of compute capability {arch / 10} here, and a tile is chosen by "
            "that alone: choose one kind with CUDA_VISIBLE_DEVICES"
        )
    from fastattn.tune.device import Device, verdict_in_process

    runner = Device(torch.device("cuda"), arch)
    if options.jobs == 1:
        return tune(works, options, Machine.of(name, arch), arch, runner, output)
    with Verdicts(options.jobs, verdict_in_process) as verdicts:
        judge = _judged_by(verdicts, arch)
        return tune(works, options, Machine.of(name, arch), arch, runner, output, judge)


Judge = Callable[[Work, Sequence[Tile]], list[str | None]]


def tune(
    works: Sequence[Work],
    options: Options,
    machine: Machine,
    arch: int,
    runner: Runner,
    output: Output,
    judge: Judge | None = None,
) -> Report:
    """Tune works one by one and store the winners after each; stops early when the time is up."""
    winners = stored_winners(machine)
    deadline = None if options.minutes is None else time.monotonic() + 60 * options.minutes
    done: list[Report] = []
    output.line(
        f"{machine.device}, compute capability {machine.capability}, Triton {machine.triton}: {len(works)} to tune"
    )
    for work in works:
        if deadline is not None and time.monotonic() > deadline:
            break
        with output.waiting(str(work)):
            entry = tune_one(work, options, arch, runner, judge)
        done.append(entry)
        signature = work.signature(arch)
        winners.pop(signature, None)
        if entry["winner"] is not None:  # the built-in tile too, instead of the model's choice
            tile = Tile(**entry["winner"])
            winners[signature] = Winner(tile, entry["winner_ms"], entry["built_in_ms"] or 0.0)
        tuned.store(machine, winners)
    forget_lookups()
    _show(done, len(works), machine, output)
    failed = [entry["name"] for entry in done if entry["winner"] is None]
    return {
        "machine": asdict(machine), "path": str(machine.path), "dry_run": False, "works": done,
        "left_out": [str(work) for work in works[len(done) :]], "failed": failed,
    }  # fmt: skip


def tune_one(work: Work, options: Options, arch: int, runner: Runner, judge: Judge | None = None) -> Report:
    """One work: its candidates with their times or the reasons against them, and the winner."""
    found = plan.candidates(work, arch, options.quick)
    possible = [candidate.tile for candidate in found if candidate.reason is None]
    reasons = (judge or _judged_here(runner))(work, possible)
    verdicts = dict(zip(possible, reasons))
    right = [tile for tile in possible if verdicts[tile] is None]
    built_in = found[0].tile

    def seconds(tile: Tile) -> float:
        try:
            return runner.seconds(work, tile)
        except Exception as error:
            verdicts[tile] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[
                :200
            ]
            return float("inf")

    medians = (
        plan.race(right, seconds, QUICK_ROUNDS if options.quick else ROUNDS, keep=built_in) if right else {}
    )
    medians = {tile: median for tile, median in medians.items() if verdicts[tile] is None}
    winner = plan.winner_of(medians, built_in) if medians else None
    return {
        "name": str(work), "kernel": work.kernel, "signature": work.signature(arch),
        "built_in": asdict(built_in), "built_in_ms": _ms(medians.get(built_in)),
        "winner": None if winner is None else asdict(winner),
        "winner_ms": None if winner is None else _ms(medians[winner]),
        "candidates": list(_entries(found, verdicts, medians)),
    }  # fmt: skip


def _entries(
    found: Sequence[Candidate], verdicts: dict[Tile, str | None], medians: dict[Tile, float]
) -> Iterator[Report]:
    for candidate in found:
        reason = candidate.reason or verdicts.get(candidate.tile)
        yield {"tile": asdict(candidate.tile), "ms": _ms(medians.get(candidate.tile)), "reason": reason}


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(1e3 * seconds, 4)


def stored_winners(machine: Machine) -> dict[str, Winner]:
    """The stored winners; none if the file cannot be used."""
    try:
        return tuned.load(machine)
    except (OSError, ValueError):
        return {}


def forget_lookups() -> None:
    """Clear this process's cached look-ups, so that it reads the stored winners."""
    tuned.winners_here.cache_clear()
    tuned.tiles_for.cache_clear()
    call_plans.clear()


def _show(done: Sequence[Report], total: int, machine: Machine, output: Output) -> None:
    rows = []
    for entry in done:
        right = [candidate for candidate in entry["candidates"] if candidate["reason"] is None]
        winner = entry["winner"]
        gain = entry["built_in_ms"] / entry["winner_ms"] if winner and entry["built_in_ms"] else None
        rows.append((
            entry["name"], str(len(entry["candidates"])), str(len(right)), str(Tile(**entry["built_in"])),
            _text(entry["built_in_ms"]), str(Tile(**winner)) if winner else "none is right",
            _text(entry["winner_ms"]), f"{gain:.2f}x" if gain else "",
        ))  # fmt: skip
    output.table(COLUMNS, rows)
    for entry in done:
        for candidate in entry["candidates"]:
            if candidate["reason"] is not None and candidate["reason"].startswith("wrong"):
                output.line(
                    f"{entry['name']} with {Tile(**candidate['tile'])}: {candidate['reason']}", good=False
                )
    output.line(f"{len(done)} of {total} tuned; winners are in {machine.path}")


def _text(ms: float | None) -> str:
    return "" if ms is None else f"{ms:.3f}"


def _judged_here(runner: Runner) -> Judge:
    return lambda work, tiles: [runner.verdict(work, tile) for tile in tiles]


def _judged_by(verdicts: Verdicts, arch: int) -> Judge:
    return lambda work, tiles: verdicts.of([(arch, work, tile) for tile in tiles])


class Verdicts:
    """Verdicts from worker processes, which compile in parallel; a tile that crashes its process is refused."""

    def __init__(self, jobs: int, function: Callable[..., str | None]) -> None:
        self.jobs, self.function = jobs, function
        self.together, self.alone = self._pool(jobs), self._pool(1)

    def __enter__(self) -> Verdicts:
        return self

    def __exit__(self, *_: object) -> None:
        for pool in (self.together, self.alone):
            pool.shutdown(cancel_futures=True)

    @staticmethod
    def _pool(jobs: int) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(jobs, get_context("spawn"), signal.signal, (signal.SIGINT, signal.SIG_IGN))

    def of(self, tasks: Sequence[tuple[Any, ...]]) -> list[str | None]:
        """The verdict of each task. Where a process died, unfinished tasks run again, one per process."""
        futures: list[Future[str | None]] = []
        for task in tasks:
            try:
                futures.append(self.together.submit(self.function, *task))
            except BrokenProcessPool:
                break
        verdicts: list[str | None] = []
        for future in futures:
            try:
                verdicts.append(future.result())
            except BrokenProcessPool:
                break
        if len(verdicts) < len(tasks):
            self.together = self._pool(self.jobs)
            verdicts += [self._singly(task) for task in tasks[len(verdicts) :]]
        return verdicts

    def _singly(self, task: tuple[Any, ...]) -> str | None:
        try:
            return self.alone.submit(self.function, *task).result()
        except BrokenProcessPool:
            self.alone = self._pool(1)
            return "its process crashed"
