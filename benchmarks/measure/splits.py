"""A model of dk and dv with few key/value heads: how splits over queries fill the multiprocessors of a GPU.

One program computes dk and dv of a block of keys for the query heads and the queries of one split. Programs start in
launch order, each on the multiprocessor that is free first. A program costs the cycles of the cycle model for every
block of queries that it visits. Nothing is measured.
"""

from __future__ import annotations

import heapq
import json
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import checkout

CYCLES = checkout.ROOT / "tests" / "kernels" / "cycles_table.json"
ROWS = {False: "sm_90 16-bit D128 dkdv [plain]", True: "sm_90 16-bit D128 dkdv [causal]"}
BLOCK_M, BLOCK_N, HEAD_DIM = 64, 128, 128  # of those rows
BYTES_PER_SECOND = 3.35e12  # of an H100's memory, from its data sheet
HEADER = (
    "| a split | programs | full, ms | causal, ms | sums, ms | workspace, MiB |",
    "|---|---|---|---|---|---|",
)


class Call(NamedTuple):
    """Attention of query heads over one key/value head."""

    heads: int = 32
    seqlen: int = 8192  # of queries and of keys


def query_blocks(key_block: int, first: int, last: int, causal: bool) -> int:
    """The blocks of queries in [first, last) that see a block of keys; lengths are equal."""
    begin = key_block * BLOCK_N // BLOCK_M if causal else 0
    return max(0, last - max(first, begin))


def programs(call: Call, heads: int, queries: int, causal: bool) -> Iterator[int]:
    """The visits of each program in launch order: key blocks first, then heads, then ranges of queries."""
    step = (queries or call.seqlen) // BLOCK_M
    for first in range(0, call.seqlen // BLOCK_M, step):
        for _ in range(call.heads // heads):
            for key_block in range(call.seqlen // BLOCK_N):
                yield heads * query_blocks(key_block, first, first + step, causal)


def makespan(costs: Iterable[int], processors: int) -> int:
    """The time until all tasks have ended, each started in order on the processor that is free first."""
    ends = [0] * processors
    for cost in costs:
        heapq.heapreplace(ends, ends[0] + cost)
    return max(ends)


def table() -> list[str]:
    """The lines of docs/hopper.md: no split, two coarser splits, and the one that `kernels/splits.py` chooses."""
    from fastattn.kernels.splits import FEW_KV_HEADS, split_count
    from fastattn.tune.cycles.machine import CLOCK_HZ, MULTIPROCESSORS

    stored = json.loads(CYCLES.read_text(encoding="utf-8"))["rows"]
    cycles = {causal: int(stored[name]["cycles"]) for causal, name in ROWS.items()}
    call, chosen = Call(), FEW_KV_HEADS
    candidates = (
        (chosen._replace(heads=call.heads, queries=0), "everything (before)"),
        (chosen._replace(heads=2 * chosen.heads, queries=0), f"{2 * chosen.heads} heads"),
        (chosen._replace(queries=0), f"{chosen.heads} heads"),
        (chosen, f"{chosen.heads} heads, {chosen.queries} queries (chosen)"),
    )
    lines = list(HEADER)
    for split, name in candidates:
        visits = {causal: list(programs(call, split.heads, split.queries, causal)) for causal in ROWS}
        times = [
            1e3 * makespan((n * cycles[causal] for n in visits[causal]), MULTIPROCESSORS) / CLOCK_HZ
            for causal in ROWS
        ]
        count = split_count(split, call.heads, call.seqlen)
        workspace = 2 * 4 * count * call.seqlen * HEAD_DIM if count > 1 else 0  # dk and dv, float32
        sums = f"{1e3 * 2 * workspace / BYTES_PER_SECOND:.2f} | {workspace >> 20}" if workspace else "|"
        lines.append(f"| {name} | {len(visits[False])} | {times[0]:.2f} | {times[1]:.2f} | {sums} |")
    return lines
