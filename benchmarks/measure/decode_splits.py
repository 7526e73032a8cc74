"""A model of decoding against a cache: the bytes and the times of splits of a fixed number of keys.

A program loads the keys and values of its splits at half of a multiprocessor's L2 bandwidth, after the latency of its
first loads. Programs start in launch order in the slot that is free first, and all of them share the memory bandwidth.
Partial results are written once and read once. Nothing is measured.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from .splits import BYTES_PER_SECOND, makespan

START = 1.0e-6  # seconds for the launch of a program and its first loads; half of it for a program without a split
LAUNCH = 2.0e-6  # of the combine, after the last program of the splits
L2_BYTES_PER_CYCLE = 64  # that a multiprocessor receives
HEADER = (
    "| call | splits | programs | waves | partial results | us | memory bound |",
    "|---|---|---|---|---|---|---|",
)
Sizes = Callable[[int], list[int]]  # number of keys -> keys in each split


class Call(NamedTuple):
    """One query per head against 16-bit caches."""

    lengths: tuple[int, ...]  # keys of each sequence
    capacity: int
    kv_heads: int = 8
    group: int = 8
    head_dim: int = 128

    def __str__(self) -> str:
        batch, kinds = len(self.lengths), sorted(set(self.lengths))
        keys = " and ".join(f"{self.lengths.count(n)} of {n}" if len(kinds) > 1 else str(n) for n in kinds)
        return f"{batch} x {self.kv_heads} x {self.group} heads, {keys} keys of {self.capacity}"


CALLS = (
    Call((4096,), 4096),
    Call((32768,), 32768),
    Call((32768,), 32768, kv_heads=1),
    Call((1000,) * 64, 1024),
    Call((1000,) * 64, 131072),
    Call((8192,) * 64, 8192),
    Call((1000,) * 63 + (65536,), 131072),
)


def doubling(call: Call) -> Sizes:
    """The splits that decode_tiles.py chooses."""
    from fastattn.kernels.decode_tiles import splits_for
    from fastattn.kernels.tiles import Tile

    splits = splits_for(call.group, Tile(16, 64, 4, 3), 1)

    def sizes(keys: int) -> list[int]:
        found: list[int] = []
        while keys > 0:
            found.append(min(keys, 64 * splits.blocks << len(found) // splits.per_size))
            keys -= found[-1]
        return found

    return sizes


def of_one_size(size: int) -> Sizes:
    """Splits of one size throughout."""
    return lambda keys: [min(size, keys - first) for first in range(0, keys, size)]


def row(call: Call, sizes: Sizes) -> str:
    """The cells of a table for one call."""
    from fastattn.kernels.decode_tiles import PROGRAMS_PER_SM, programs_for
    from fastattn.tune.cycles.machine import CLOCK_HZ, MULTIPROCESSORS

    slots, most = PROGRAMS_PER_SM * MULTIPROCESSORS, len(sizes(call.capacity))
    tiles = len(call.lengths) * call.kv_heads
    programs = programs_for(True, tiles, most, call.capacity, MULTIPROCESSORS)
    rate = L2_BYTES_PER_CYCLE * CLOCK_HZ / PROGRAMS_PER_SM
    per_key, partial = 4 * call.head_dim, 4 * call.group * (call.head_dim + 1)
    times: list[float] = []
    for length in call.lengths:
        split = sizes(length)
        for program in reversed(range(programs)):
            mine = split[program::programs]
            times.append(START + sum(mine) * per_key / rate if mine else START / 2)
        times += times[-programs:] * (call.kv_heads - 1)
    count = call.kv_heads * sum(len(sizes(length)) for length in call.lengths)
    read, partials = call.kv_heads * sum(call.lengths) * per_key, 2 * count * partial
    end = max(
        makespan((round(1e12 * time) for time in times), slots) / 1e12,
        (read + partials / 2) / BYTES_PER_SECOND,
    )
    total = end + LAUNCH + partials / 2 / BYTES_PER_SECOND
    bound = read / BYTES_PER_SECOND
    return (
        f"{count} | {len(times)} | {len(times) / slots:.1f} | {100 * partials / read:.1f} % | {1e6 * total:.0f} "
        f"| {1e6 * bound:.0f} |"
    )


def table() -> list[str]:
    """The lines of docs/decode.md: the splits that are used, and splits of 256 and of 1024 keys throughout."""
    lines = list(HEADER)
    for call in CALLS:
        lines.append(f"| {call} | {row(call, doubling(call))}")
        lines += [f"| splits of {n} | {row(call, of_one_size(n))}" for n in (256, 1024)]
    return lines
