"""Tile shapes: which block sizes, warps and pipeline stages each kernel uses for a spec on an architecture.

A row is chosen by kernel, architecture family, element size, padded head dim and whether anything changes the scores.
The rows are derived from shared memory and registers, whose limits the compile checks of tests/kernels hold them to;
`fastattn bench tune` measures better ones, which tuned.py keeps.
Nothing depends on lengths or batch, so a sequence gives the same bits alone and in a batch. For operands that TMA
cannot load, a tile of WITHOUT_TMA replaces one that loads by TMA; the last bits may then differ.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import NamedTuple

from fastattn.spec import AttentionSpec
from fastattn.versions import find


@dataclass(frozen=True, slots=True)
class Tile:
    """One kernel's block of queries and keys, its warps and the stages of its load pipeline."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    tf32x3: bool = False  # exact float32 products as three tf32 products on the matrix units
    tma: bool = False  # operands are loaded by TMA; those it cannot load take a tile of WITHOUT_TMA
    max_registers: int | None = None  # per thread, where fewer let more blocks share a multiprocessor

    def __str__(self) -> str:
        extras = ", tf32x3" if self.tf32x3 else ""
        extras += ", TMA" if self.tma else ""
        extras += f", {self.max_registers} registers" if self.max_registers else ""
        return f"{self.block_m}x{self.block_n}, {self.num_warps} warps, {self.num_stages} stages{extras}"


@dataclass(frozen=True, slots=True)
class Tiles:
    """The tiles of one call: forward, the two passes of backward, and what works on single tiles of scores."""

    forward: Tile
    dkdv: Tile
    dq: Tile
    dbias: Tile


class Key(NamedTuple):
    """The key of a row of the table."""

    family: int  # of architectures, one of FAMILIES
    bits: int  # 16 or 32
    head_dim: int  # one of HEAD_DIMS: the larger of key and value dim, rounded up
    has_score_mods: bool  # something in SCORE_MODS is in use: more registers per score


DELTA_ROWS = 64  # queries per program of the row-wise preparation of backward
SEGMENT_CHUNK = 2048  # ids that the prepass of segments compares at a time
SLOT_CHUNK = 32  # tiles of a packed sequence whose numbers are added at a time
HEAD_DIMS = (64, 128, 256)
FAMILIES = {  # family: (architectures, bytes of shared memory a block may use)
    80: ((80, 87), 166912),
    86: ((86, 89), 101376),
    90: ((90,), 232448),
    100: ((100, 101, 103, 110), 232448),
    120: ((120, 121), 101376),
}
SCORE_MODS = ("mask", "bias", "segments", "alibi", "softcap", "dropout")


def _rows(families: tuple[int, ...], bits: int, has_score_mods: bool, *tiles: Tiles) -> dict[Key, Tiles]:
    """Rows of some families for HEAD_DIMS in order."""
    return {
        Key(family, bits, dim, has_score_mods): row
        for family in families
        for dim, row in zip(HEAD_DIMS, tiles)
    }


TABLE: dict[Key, Tiles] = {
    # Ampere with 163 KiB: mma.sync from registers, which results and operands share; two or three blocks in flight.
    **_rows(
        (80,), 16, False,
        Tiles(Tile(128, 64, 4, 3), Tile(32, 128, 8, 2), Tile(64, 64, 4, 2), Tile(64, 64, 4, 1)),
        Tiles(Tile(128, 32, 8, 3), Tile(32, 64, 8, 2), Tile(64, 64, 8, 2), Tile(64, 64, 8, 1)),
        Tiles(Tile(64, 64, 8, 2), Tile(32, 64, 8, 1), Tile(64, 32, 8, 1), Tile(64, 32, 8, 1)),
    ),
    **_rows(
        (80,), 16, True,
        Tiles(Tile(128, 64, 8, 2), Tile(32, 32, 4, 2), Tile(64, 32, 8, 2), Tile(64, 32, 8, 1)),
        Tiles(Tile(64, 32, 8, 2), Tile(32, 32, 8, 2), Tile(64, 32, 8, 2), Tile(32, 32, 8, 1)),
        Tiles(Tile(64, 32, 8, 2), Tile(32, 32, 8, 1), Tile(32, 32, 8, 1), Tile(16, 32, 8, 1)),
    ),
    # The same matrix units with 99 KiB: fewer stages, and smaller blocks of wide heads.
    **_rows(
        (86, 120), 16, False,
        Tiles(Tile(128, 64, 8, 3), Tile(32, 128, 8, 2), Tile(64, 64, 4, 2), Tile(64, 64, 4, 1)),
        Tiles(Tile(128, 64, 8, 2), Tile(32, 64, 8, 2), Tile(64, 32, 8, 2), Tile(64, 64, 8, 1)),
        Tiles(Tile(64, 32, 8, 2), Tile(32, 32, 8, 1), Tile(32, 32, 4, 1), Tile(32, 32, 4, 1)),
    ),
    **_rows(
        (86, 120), 16, True,
        Tiles(Tile(64, 64, 8, 2), Tile(32, 32, 4, 2), Tile(64, 32, 8, 2), Tile(64, 32, 8, 1)),
        Tiles(Tile(64, 32, 8, 2), Tile(32, 32, 8, 2), Tile(64, 32, 8, 2), Tile(32, 32, 8, 1)),
        Tiles(Tile(64, 32, 8, 2), Tile(32, 32, 8, 1), Tile(32, 32, 8, 1), Tile(16, 32, 8, 1)),
    ),
    # Hopper: 227 KiB; wgmma takes 64 rows per group of four warps and its accumulators take most registers. TMA needs
    # no registers for addresses, so its blocks are larger where the cycle model finds them faster.
    **_rows(
        (90,), 16, False,
        Tiles(
            Tile(128, 64, 8, 3, tma=True, max_registers=128), Tile(64, 64, 4, 2, tma=True),
            Tile(128, 64, 8, 2, tma=True), Tile(64, 64, 4, 1),
        ),
        Tiles(
            Tile(128, 128, 8, 2, tma=True), Tile(64, 128, 8, 2, tma=True), Tile(128, 64, 8, 2, tma=True),
            Tile(64, 64, 8, 1),
        ),
        Tiles(Tile(128, 64, 8, 2), Tile(32, 32, 8, 1), Tile(128, 32, 8, 2, tma=True), Tile(64, 32, 8, 1)),
    ),
    **_rows(
        (90,), 16, True,
        Tiles(
            Tile(128, 64, 8, 3), Tile(32, 64, 4, 2, tma=True), Tile(64, 64, 4, 2, tma=True), Tile(64, 64, 8, 1),
        ),
        Tiles(
            Tile(128, 32, 8, 2, tma=True), Tile(32, 64, 4, 2, tma=True), Tile(64, 32, 4, 2, tma=True),
            Tile(64, 32, 8, 1),
        ),
        Tiles(Tile(128, 32, 8, 2, tma=True), Tile(32, 32, 8, 1), Tile(32, 32, 8, 1), Tile(64, 32, 8, 1)),
    ),
    # Blackwell with 227 KiB: tcgen05 accumulates outside the registers, 64 or 128 rows at a time.
    **_rows(
        (100,), 16, False,
        Tiles(Tile(128, 64, 8, 3), Tile(64, 128, 8, 2), Tile(128, 64, 8, 2), Tile(64, 64, 4, 1)),
        Tiles(Tile(128, 64, 8, 3), Tile(64, 128, 8, 2), Tile(128, 32, 8, 2), Tile(64, 64, 8, 1)),
        Tiles(Tile(128, 32, 8, 2), Tile(32, 64, 8, 1), Tile(64, 32, 4, 2), Tile(64, 32, 8, 1)),
    ),
    **_rows(
        (100,), 16, True,
        Tiles(Tile(128, 64, 8, 3), Tile(64, 64, 8, 2), Tile(64, 32, 4, 2), Tile(64, 64, 8, 1)),
        Tiles(Tile(64, 32, 8, 2), Tile(32, 64, 8, 2), Tile(64, 32, 8, 2), Tile(64, 32, 8, 1)),
        Tiles(Tile(64, 32, 8, 2), Tile(32, 32, 8, 1), Tile(64, 16, 8, 1), Tile(64, 32, 8, 1)),
    ),
    # float32: exact products run on the plain cores, whose operands and results all sit in registers.
    **_rows(
        (80, 86, 90, 100, 120), 32, False,
        Tiles(Tile(64, 32, 8, 1), Tile(32, 32, 8, 1), Tile(32, 32, 4, 1), Tile(32, 32, 4, 1)),
        Tiles(Tile(32, 32, 8, 1), Tile(16, 32, 8, 1), Tile(32, 16, 8, 1), Tile(32, 32, 8, 1)),
        Tiles(Tile(16, 32, 8, 1), Tile(16, 32, 8, 1), Tile(16, 32, 8, 1), Tile(16, 32, 8, 1)),
    ),
    **_rows(
        (80, 86, 90, 100, 120), 32, True,
        Tiles(Tile(32, 32, 8, 1), Tile(32, 32, 8, 1), Tile(32, 32, 8, 1), Tile(32, 32, 8, 1)),
        Tiles(Tile(32, 16, 8, 1), Tile(16, 32, 8, 1), Tile(32, 16, 8, 1), Tile(32, 32, 8, 1)),
        Tiles(Tile(16, 32, 8, 1), Tile(16, 16, 8, 1), Tile(16, 32, 8, 1), Tile(16, 32, 8, 1)),
    ),
}  # fmt: skip


# In place of the rows above that load by TMA, for operands it cannot load.
WITHOUT_TMA: dict[Key, Tiles] = {
    **_rows(
        (90,), 16, False,
        Tiles(Tile(128, 64, 8, 3, max_registers=128), Tile(64, 128, 8, 2), Tile(128, 64, 8, 2), Tile(64, 64, 4, 1)),
        Tiles(Tile(128, 64, 8, 3), Tile(32, 128, 8, 2), Tile(128, 64, 8, 2), Tile(64, 64, 8, 1)),
        Tiles(Tile(128, 64, 8, 2), Tile(32, 32, 8, 1), Tile(64, 32, 4, 2), Tile(64, 32, 8, 1)),
    ),
    **_rows(
        (90,), 16, True,
        Tiles(Tile(128, 64, 8, 3), Tile(32, 64, 8, 2), Tile(64, 32, 4, 2), Tile(64, 64, 8, 1)),
        Tiles(Tile(128, 32, 8, 2), Tile(32, 64, 8, 2), Tile(64, 32, 8, 2), Tile(64, 32, 8, 1)),
        Tiles(Tile(64, 32, 8, 2), Tile(32, 32, 8, 1), Tile(32, 32, 8, 1), Tile(64, 32, 8, 1)),
    ),
}  # fmt: skip

# The kernels of rows that load by TMA which take the tile above with a mask or a bias: the addresses of these take
# registers too, and by the cycle model spills cost more than TMA gains.
WITHOUT_TMA_BY_SCORE: dict[Key, tuple[str, ...]] = {Key(90, 16, 256, True): ("forward",)}
READ_BY_SCORE = ("mask", "bias")  # the features that read something for each score

# Tiles that replace those above for Triton up to OLDER_TRITON: its code for the dk/dv of this row waits for copies
# within a pass, which two blocks on a multiprocessor hide.
OLDER_TRITON = (3, 6)
WITH_OLDER_TRITON: dict[Key, dict[str, Tile]] = {
    Key(90, 16, 128, False): {"dkdv": Tile(64, 64, 4, 2, tma=True)}
}


def table_tiles(spec: AttentionSpec) -> Tiles:
    """The table's tiles of a spec. A call whose operands TMA cannot load takes `tiles_without_tma` instead."""
    if not spec.aligned:
        return tiles_without_tma(spec)
    return row_of(key_of(spec), any(getattr(spec, feature) for feature in READ_BY_SCORE))


def row_of(key: Key, reads_by_score: bool) -> Tiles:
    """The row of a key, whether or not one of READ_BY_SCORE is in use."""
    others = WITHOUT_TMA_BY_SCORE.get(key, ()) if reads_by_score else ()
    changed = {kernel: getattr(WITHOUT_TMA[key], kernel) for kernel in others}
    if is_older(_triton()):
        changed |= WITH_OLDER_TRITON.get(key, {})
    return replace(TABLE[key], **changed)


@cache
def _triton() -> str | None:
    return find("triton")


def is_older(version: str | None) -> bool:
    """Whether a version of Triton is at most OLDER_TRITON; False for None and for what is not a number."""
    parts = (version or "").split(".")[:2]
    return len(parts) == 2 and all(map(str.isdecimal, parts)) and tuple(map(int, parts)) <= OLDER_TRITON


def tiles_without_tma(spec: AttentionSpec) -> Tiles:
    """The table's tiles of a spec for a call whose operands TMA cannot load."""
    key = key_of(spec)
    return WITHOUT_TMA.get(key, TABLE[key])


def key_of(spec: AttentionSpec) -> Key:
    """The row a spec is served by."""
    widest = max(spec.head_dim, spec.value_dim)
    return Key(
        family=family_of(spec.arch),
        bits=32 if spec.dtype.itemsize == 4 else 16,
        head_dim=next(dim for dim in HEAD_DIMS if dim >= widest),
        has_score_mods=any(getattr(spec, feature) for feature in SCORE_MODS),
    )


def family_of(arch: int | None) -> int:
    """The family of an architecture; an unknown one is taken for the nearest known one below it."""
    if arch is None:
        return 80
    known = {member: family for family, (members, _) in FAMILIES.items() for member in members}
    return known[max((member for member in known if member <= arch), default=80)]
