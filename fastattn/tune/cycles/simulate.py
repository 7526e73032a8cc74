"""Replays a hot loop on one quarter of a multiprocessor, as its stall counts and scoreboards order it.

A quarter holds one warp of every warpgroup, and all quarters behave alike, so only one is simulated. Its scheduler
issues one instruction a cycle, of the warp that can issue first. wgmma are queued in the tensor cores, which the
warpgroups share, and occupy shared memory while they run.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from fastattn.tune.cycles import machine
from fastattn.tune.cycles.loops import Loop
from fastattn.tune.cycles.sass import NO_SCOREBOARD, Instruction

PASSES = 30  # of every warp; the first third does not count
STAGGER = 150  # cycles between the starts of warps
SCOREBOARDS = 6
WARP, WARPGROUP = 32, 128  # threads
BARRIER = re.compile(r"BAR\.(SYNC|ARV|RED)\S*\s+(\w+)(?:,\s*(\w+))?")


class Deadlock(RuntimeError):
    """Every warp waits for another one."""


@dataclass(frozen=True)
class Residence:
    """The warps and blocks that share a multiprocessor while the loop runs."""

    warpgroups: int = 2  # of a block that run the loop
    blocks: int = 1
    copied: float = 0.0  # shared-memory cycles of arriving copies in a pass of one warpgroup


@dataclass(frozen=True)
class Use:
    """The result of a replay: cycles between two passes of a multiprocessor, and the share of each unit in use."""

    cycles: float
    tensor: float
    exp2: float
    issue: float
    shared: float


@dataclass(frozen=True)
class Barrier:
    """A named barrier as an instruction uses it."""

    name: str
    threads: int | None  # that take part; None is the whole block
    waits: bool

    @classmethod
    def of(cls, instruction: Instruction) -> Barrier | None:
        """The barrier of BAR.SYNC and BAR.ARV; None for other instructions and for barriers within a warpgroup."""
        match = BARRIER.match(instruction.text)
        if match is None:
            return None
        threads = int(match[3], 16) if match[3] and match[3].startswith("0x") else None
        return None if threads == WARPGROUP else cls(match[2], threads, match[1] != "ARV")

    @property
    def ping_pong(self) -> bool:
        """Whether its number is in a register: then each warpgroup has one, at which the previous warpgroup arrives."""
        return self.name.startswith(("R", "UR"))

    @property
    def with_writer(self) -> bool:
        """Whether a single warp with another role takes part: the one that stores dq."""
        return self.threads is not None and self.threads % WARPGROUP == WARP

    def partners(self, warpgroups: int) -> int:
        """Warpgroups of the loop that take part."""
        return warpgroups if not self.threads else self.threads // WARPGROUP


@dataclass
class _Meeting:
    """A named barrier of a block: its completions, their times, and the arrivals since the last."""

    arrived: list[float] = field(default_factory=list)
    completed: list[float] = field(default_factory=list)
    forgiven: bool = False

    def arrive(self, at: float, partners: int) -> int:
        """The number of the completion to which this arrival belongs."""
        phase = len(self.completed)
        self.arrived.append(at)
        if len(self.arrived) == partners:
            self.completed.append(max(self.arrived) + machine.MEETING_LATENCY)
            self.arrived.clear()
        return phase


@dataclass
class _Writer:
    """The warp that stores dq for some warpgroups, and the time at which it can take the next tile."""

    taken: list[float] = field(default_factory=lambda: [0.0])
    arrived: list[float] = field(default_factory=list)
    ready: float = 0.0

    def hand_over(self, at: float, partners: int) -> None:
        """Starts the store of a tile once all its warpgroups have arrived."""
        self.arrived.append(at)
        if len(self.arrived) == partners:
            begin = max(max(self.arrived) + machine.BARRIER_LATENCY, self.ready)
            self.ready = begin + machine.DQ_WARP_CYCLES
            self.taken.append(self.ready)
            self.arrived.clear()


@dataclass
class _Warp:
    number: int
    code: tuple[Instruction, ...]
    barriers: tuple[Barrier | None, ...]
    ready: float
    place: int = 0
    passes: int = 0
    scoreboards: list[float] = field(default_factory=lambda: [0.0] * SCOREBOARDS)
    groups: list[float] = field(default_factory=list)  # ends of groups of wgmma
    tiles: int = 0  # handed to the writer and waited for
    phase: int | None = None  # of the meeting that it waits at


class Replay:
    """One quarter with a warp of each warpgroup of each resident block; warpgroups get the loops cyclically."""

    def __init__(self, loops: Sequence[Loop], residence: Residence) -> None:
        self.residence = residence
        count = residence.warpgroups * residence.blocks
        bodies = [loops[number % residence.warpgroups % len(loops)].body for number in range(count)]
        self.warps = [
            _Warp(number, body, tuple(map(Barrier.of, body)), float(STAGGER * number))
            for number, body in enumerate(bodies)
        ]
        products = sum(len(loop.products) for loop in loops) / len(loops)
        self.copied = residence.copied / products if products else 0.0
        self.pipes: dict[str, float] = defaultdict(float)
        self.issued = self.tensor = self.shared = 0.0
        self.used = {"tensor": 0.0, "exp2": 0.0, "issue": 0.0, "shared": 0.0}
        self.order_arrivals: list[float | None] = [0.0] + [None] * (count - 1)
        self.meetings: dict[tuple[int, str], _Meeting] = defaultdict(_Meeting)
        self.writers: dict[tuple[int, int], _Writer] = defaultdict(_Writer)

    def run(self, passes: int = PASSES) -> Use:
        """Cycles and shares of the steady state."""
        last = self.warps[-1]
        stamps: list[tuple[float, int, dict[str, float]]] = []
        while min(warp.passes for warp in self.warps) < passes:
            warp, at = self._next()
            before = last.passes
            self._issue(warp, at)
            if last.passes != before:
                stamps.append((at, sum(each.passes for each in self.warps), dict(self.used)))
        (begin, done, used), (end, all_done, all_used) = stamps[len(stamps) // 3], stamps[-1]
        span = end - begin
        shares = {unit: (all_used[unit] - used[unit]) / span for unit in used}
        return Use(span / (all_done - done), **shares)

    def _next(self) -> tuple[_Warp, float]:
        """The warp that can issue first, and when; of several, one that is not loop iterations ahead of the others."""
        slowest = min(warp.passes for warp in self.warps)
        while True:
            times = [
                (at, max(0, warp.passes - slowest - 1), warp.number)
                for warp in self.warps
                if (at := self._earliest(warp)) is not None
            ]
            if times:
                at, _, number = min(times)
                return self.warps[number], at
            self._forgive()

    def _earliest(self, warp: _Warp) -> float | None:
        """When its next instruction can issue; None while it waits for another warp."""
        instruction, barrier = warp.code[warp.place], warp.barriers[warp.place]
        at = max(warp.ready, self.issued)
        for board in range(SCOREBOARDS):
            if instruction.control.waits >> board & 1:
                at = max(at, warp.scoreboards[board])
        if instruction.kind.pipe is not None:
            at = max(at, self.pipes[instruction.kind.pipe])
        left = instruction.groups_left
        if left is not None and len(warp.groups) > left:
            at = max(at, warp.groups[-1 - left] + machine.TENSOR_LATENCY)
        return at if barrier is None or not barrier.waits else self._past(barrier, warp, at)

    def _past(self, barrier: Barrier, warp: _Warp, at: float) -> float | None:
        if barrier.ping_pong:
            turn = self.order_arrivals[warp.number]
            return None if turn is None else max(at, turn)
        if barrier.with_writer:
            taken = self._writer(barrier, warp).taken
            return max(at, taken[warp.tiles]) if warp.tiles < len(taken) else None
        meeting = self._meeting(barrier, warp)
        if warp.phase is None:
            warp.phase = meeting.arrive(at, barrier.partners(self.residence.warpgroups))
        return max(at, meeting.completed[warp.phase]) if warp.phase < len(meeting.completed) else None

    def _forgive(self) -> None:
        """At a deadlock, add one arrival from before the loop to a barrier, at most one for each barrier."""
        for warp in self.warps:
            barrier = warp.barriers[warp.place]
            if barrier is None or barrier.ping_pong or barrier.with_writer:
                continue
            meeting = self._meeting(barrier, warp)
            if not meeting.forgiven and not meeting.completed:
                meeting.forgiven = True
                meeting.arrive(warp.ready, barrier.partners(self.residence.warpgroups))
                return
        raise Deadlock("; ".join(warp.code[warp.place].text for warp in self.warps))

    def _meeting(self, barrier: Barrier, warp: _Warp) -> _Meeting:
        return self.meetings[warp.number // self.residence.warpgroups, barrier.name]

    def _writer(self, barrier: Barrier, warp: _Warp) -> _Writer:
        """One for each warpgroup, or for all of a block."""
        own = warp.number if barrier.partners(0) == 1 else -1
        return self.writers[warp.number // self.residence.warpgroups, own]

    def _issue(self, warp: _Warp, at: float) -> None:
        instruction, barrier = warp.code[warp.place], warp.barriers[warp.place]
        kind, control = instruction.kind, instruction.control
        self.issued = at + 1
        self.used["issue"] += 1
        done = at + kind.latency
        if kind.pipe is not None:
            self.pipes[kind.pipe] = at + kind.cycles
            done += kind.cycles
            if kind.pipe == "mufu":
                self.used["exp2"] += kind.cycles
            elif kind.pipe == "mma":
                self.used["tensor"] += kind.cycles
        if kind.shared:
            self.shared = max(self.shared, at) + kind.shared
            self.used["shared"] += kind.shared
            done = max(done, at + kind.shared + kind.latency)  # wgmma that are already queued do not delay it
        if instruction.opcode.startswith("HGMMA"):
            self._multiply(warp, instruction, at)
        if barrier is not None:
            self._meet(barrier, warp, at)
        if control.sets_when_written != NO_SCOREBOARD:
            board = control.sets_when_written
            warp.scoreboards[board] = max(warp.scoreboards[board], done)
        if control.sets_when_read != NO_SCOREBOARD:
            board = control.sets_when_read
            warp.scoreboards[board] = max(warp.scoreboards[board], at + machine.READ_LATENCY)
        fence = machine.FENCE_CYCLES if instruction.opcode.startswith("MEMBAR") else 0
        warp.ready = at + max(1, control.stall) + fence
        warp.place += 1
        if warp.place == len(warp.code):
            warp.place, warp.passes = 0, warp.passes + 1

    def _multiply(self, warp: _Warp, instruction: Instruction, at: float) -> None:
        product = instruction.product
        assert product is not None
        begin = max(self.tensor, at + machine.TENSOR_START)
        read = product.shared_cycles + self.copied
        self.shared = max(self.shared, begin) + read
        self.tensor = max(begin + product.tensor_cycles, self.shared)
        self.used["tensor"] += product.tensor_cycles
        self.used["shared"] += read
        if instruction.ends_group:
            warp.groups = [*warp.groups[-7:], self.tensor]

    def _meet(self, barrier: Barrier, warp: _Warp, at: float) -> None:
        if barrier.ping_pong:
            if barrier.waits:
                self.order_arrivals[warp.number] = None
            else:
                self.order_arrivals[(warp.number + 1) % len(self.order_arrivals)] = (
                    at + machine.BARRIER_LATENCY
                )
        elif barrier.with_writer:
            if barrier.waits:
                warp.tiles += 1
            else:
                self._writer(barrier, warp).hand_over(at, barrier.partners(0))
        elif barrier.waits:
            warp.phase = None
        else:
            self._meeting(barrier, warp).arrive(at, barrier.partners(self.residence.warpgroups))


def replay(loops: Sequence[Loop], residence: Residence) -> Use:
    """One loop that all warpgroups run, or one for each warpgroup of a block."""
    return Replay(loops, residence).run()
