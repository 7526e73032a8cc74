"""Tiles of the kernels that work on rows: how many rows a program takes, and whether it holds them whole.

The longest rows held whole are the longest that the compiler keeps in registers without spilling, at 32 warps.
"""

from __future__ import annotations

from dataclasses import dataclass

from fastattn.spec import SoftmaxSpec

TILE_ELEMENTS = 2048  # short rows share a program until together they have this many
WHOLE_ROW_COLUMNS = {False: 32768, True: 16384}  # by backward: the longest row held in registers
LONG_CHUNK = {False: 8192, True: 4096}  # by backward: columns of a longer one read at a time
STRIDED_ROWS = 64  # neighbouring rows a program takes where they, not columns, are neighbours in memory
STRIDED_WHOLE_COLUMNS = 128
STRIDED_CHUNK = 32
LOSS_CHUNK = 4096  # logits a program of the cross-entropy reads at a time


@dataclass(frozen=True, slots=True)
class RowTile:
    """One program's rows, the columns it sees at once and its warps."""

    rows: int
    columns: int
    num_warps: int
    whole: bool  # the columns are all there are

    def __str__(self) -> str:
        kind = "whole rows" if self.whole else "rows in chunks"
        return f"{self.rows}x{self.columns}, {kind}, {self.num_warps} warps"


def row_tile_for(spec: SoftmaxSpec) -> RowTile:
    """The tile of a softmax."""
    if not spec.unit_columns:
        whole = spec.columns <= STRIDED_WHOLE_COLUMNS
        columns = spec.columns if whole else STRIDED_CHUNK
        return RowTile(STRIDED_ROWS, columns, _warps(STRIDED_ROWS * columns), whole)
    if spec.columns > WHOLE_ROW_COLUMNS[spec.backward]:
        chunk = LONG_CHUNK[spec.backward]
        return RowTile(1, chunk, _warps(chunk), whole=False)
    rows = max(1, TILE_ELEMENTS // spec.columns)
    return RowTile(rows, spec.columns, _warps(rows * spec.columns), whole=True)


def loss_tile_for(spec: SoftmaxSpec) -> RowTile:
    """The tile of a cross-entropy: one row at a time."""
    columns = min(spec.columns, LOSS_CHUNK)
    return RowTile(1, columns, _warps(columns), whole=columns == spec.columns)


def _warps(elements: int) -> int:
    """Enough for 16 elements a thread, within what a block may have."""
    return min(max(elements // 512, 1), 32 if elements > 16384 else 16)
