"""The plan of a tuning run: kernels on kinds of calls, candidate tiles, and the timing that selects one."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch

from fastattn.kernels.tiles import FAMILIES, Tile, family_of, table_tiles
from fastattn.kernels.tuned import KERNELS, REGISTER_CAPS, TMA_KERNELS, signature
from fastattn.spec import TMA_ARCH, AttentionCall, AttentionSpec, GradsNeeded

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
FEATURES = (
    "causal", "window", "lengths", "sinks", "alibi", "softcap", "bias", "mask", "segments", "dropout", "packed",
)  # fmt: skip
UNPACKED = ("lengths", "bias", "mask", "segments")  # features that packed sequences do not have
KINDS = ("plain", "causal", "causal+window", "causal+alibi", "causal+softcap", "causal+segments", "causal+dropout",
         "causal+packed", "bias")  # fmt: skip
QUICK_KINDS = ("plain", "causal")
HEAD_DIMS, QUICK_HEAD_DIMS = (64, 128, 256), (64, 128)
LEAST_GAIN = 1.02  # over the built-in tile; with a smaller gain it is kept
LAGGING = 1.2  # times the fastest median, above which a tile is dropped
REGISTERS = 255  # of a thread
WARP = 32
SWITCHES = ("tf32x3", "tma", "max_registers")  # options of a tile; each counts as one step


@dataclass(frozen=True)
class Work:
    """One kernel on one kind of call, for which the fastest tile is searched."""

    kernel: str
    dtype: str
    head_dim: int
    value_dim: int
    features: tuple[str, ...] = ()

    @property
    def packed(self) -> bool:
        """Whether the sequences are packed."""
        return "packed" in self.features

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        return DTYPES[self.dtype].itemsize

    def __str__(self) -> str:
        dims = f"D{self.head_dim}" + (f" Dv{self.value_dim}" if self.value_dim != self.head_dim else "")
        return f"{self.kernel} {self.dtype} {dims} {'+'.join(self.features) or 'plain'}"

    def spec(self, arch: int) -> AttentionSpec:
        """The spec of such calls on a device of compute capability arch / 10."""
        query = torch.empty(1, 1, 16, self.head_dim, dtype=DTYPES[self.dtype], device="cpu")
        value = torch.empty(1, 1, 16, self.value_dim, dtype=DTYPES[self.dtype], device="cpu")
        needs = None if self.kernel == "forward" else GradsNeeded(bias="bias" in self.features)
        spec = AttentionSpec.of(AttentionCall(query, query, value), needs)
        has = self.features.__contains__
        return spec.replace(
            device="cuda", arch=arch, aligned=True, describable=True,
            causal="bottom_right" if has("causal") else "none", window_left=has("window"), mask=has("mask"),
            bias=has("bias"), segments=has("segments"), key_lengths=has("lengths"), alibi=has("alibi"),
            softcap=has("softcap"), sinks=has("sinks"), dropout=has("dropout"),
        )  # fmt: skip

    def signature(self, arch: int) -> str:
        """The key that its winner is stored by."""
        return signature(self.spec(arch), self.kernel, self.packed)

    def built_in(self, arch: int) -> Tile:
        """The default tile."""
        tile: Tile = getattr(table_tiles(self.spec(arch)), self.kernel)
        return tile


@dataclass(frozen=True)
class Candidate:
    """A candidate tile, and the reason if it cannot run."""

    tile: Tile
    reason: str | None = None


def works(
    dtypes: Sequence[str], head_dims: Sequence[tuple[int, int]], kinds: Sequence[str], kernels: Sequence[str]
) -> Iterator[Work]:
    """Every kernel on every kind of call; ValueError for unknown names and for features that exclude each other."""
    _known("dtype", dtypes, DTYPES)
    _known("kernel", kernels, KERNELS)
    for kind in kinds:
        features = () if kind == "plain" else tuple(kind.split("+"))
        _known("features", features, FEATURES)
        both = [name for name in UNPACKED if name in features]
        if "packed" in features and both:
            raise ValueError(f"features: got {kind!r}, but packed sequences have no {both[0]}")
        for dtype, (head_dim, value_dim), kernel in product(dtypes, head_dims, kernels):
            if kernel != "dbias" or "bias" in features:
                yield Work(kernel, dtype, head_dim, value_dim, features)


def _known(what: str, names: Sequence[str], known: Any) -> None:
    for name in names:
        if name not in known:
            raise ValueError(f"{what}: got {name!r}, needs one of {', '.join(known)}")


def candidates(work: Work, arch: int, quick: bool = False) -> list[Candidate]:
    """The built-in tile first, then the others; quick: those that differ from it in one number.

    A tile is refused if lower bounds of its shared memory or registers exceed the limits.
    """
    built_in = work.built_in(arch)
    exact = work.itemsize == 4 and work.spec(arch).float32_precision == "ieee"
    blocks = (16, 32, 64) if work.itemsize == 4 else (32, 64, 128)
    tma = work.kernel in TMA_KERNELS and work.itemsize == 2 and arch >= TMA_ARCH
    switches = ((False, True) if exact else (False,), (False, True) if tma else (False,))
    grid = product(blocks, blocks, (4, 8), (1, 2, 3, 4), *switches)
    tiles = [Tile(*numbers, max_registers=built_in.max_registers) for numbers in grid]
    tiles += [replace(built_in, max_registers=cap) for cap in REGISTER_CAPS]
    if quick:
        tiles = [tile for tile in tiles if _steps_between(tile, built_in) == 1]
    others = [tile for tile in tiles if tile != built_in]
    return [Candidate(tile, _impossible(work, tile, arch)) for tile in (built_in, *others)]


def _steps_between(tile: Tile, other: Tile) -> int:
    """The number of steps between two tiles; a step doubles or halves one number, or changes it by one."""
    doublings = [
        abs(a.bit_length() - b.bit_length())
        for a, b in (
            (tile.block_m, other.block_m),
            (tile.block_n, other.block_n),
            (tile.num_warps, other.num_warps),
        )
    ]
    switched = sum(getattr(tile, name) != getattr(other, name) for name in SWITCHES)
    return sum(doublings) + abs(tile.num_stages - other.num_stages) + switched


def _impossible(work: Work, tile: Tile, arch: int) -> str | None:
    family = family_of(arch)
    limit = FAMILIES[family][1]
    shared, registers = least_shared(work, tile), least_registers(work, tile)
    if shared > limit:
        return f"needs at least {shared} bytes of shared memory, the limit is {limit}"
    available = tile.max_registers or REGISTERS
    if family != 100 and registers > available:  # compute capability 10 has tensor memory for results
        return f"needs at least {registers} registers per thread, there are {available}"
    return None


def least_shared(work: Work, tile: Tile) -> int:
    """Bytes of the blocks that are loaded at the same time; none with one stage."""
    streamed = {
        "forward": tile.block_n * (work.head_dim + work.value_dim),
        "dq": tile.block_n * (work.head_dim + work.value_dim),
        "dkdv": tile.block_m * (work.head_dim + work.value_dim),
        "dbias": 0,
    }[work.kernel]
    return streamed * work.itemsize * (tile.num_stages if tile.num_stages > 1 else 0)


def least_registers(work: Work, tile: Tile) -> int:
    """Registers per thread for the float32 accumulators of the loop and one block of scores."""
    results = {
        "forward": tile.block_m * work.value_dim,
        "dq": tile.block_m * work.head_dim,
        "dkdv": tile.block_n * (work.head_dim + work.value_dim),
        "dbias": tile.block_m * tile.block_n,
    }[work.kernel]
    return (results + tile.block_m * tile.block_n) // (WARP * tile.num_warps)


def race(
    tiles: Sequence[Tile], seconds: Callable[[Tile], float], rounds: int, keep: Tile | None = None
) -> dict[Tile, float]:
    """The median seconds of each tile from interleaved rounds; slow tiles are dropped early, except `keep`."""
    times: dict[Tile, list[float]] = {tile: [] for tile in tiles}
    running = list(tiles)
    for turn in range(rounds):
        for tile in running if turn % 2 == 0 else reversed(running):
            times[tile].append(seconds(tile))
        best = min(statistics.median(times[tile]) for tile in running)
        running = [t for t in running if t == keep or statistics.median(times[t]) <= LAGGING * best]
    return {tile: statistics.median(taken) for tile, taken in times.items()}


def winner_of(medians: dict[Tile, float], built_in: Tile) -> Tile:
    """The fastest tile, or the built-in one if the gain is below LEAST_GAIN."""
    fastest = min(medians, key=lambda tile: medians[tile])
    if built_in in medians and medians[built_in] < LEAST_GAIN * medians[fastest]:
        return built_in
    return fastest
