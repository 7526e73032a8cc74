"""Launches of the row kernels: the rows, the strides and the compiled variant of a call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastattn.kernels import softmax
from fastattn.kernels.launches import Launch
from fastattn.kernels.row_tiles import RowTile
from fastattn.spec import SoftmaxSpec

MAX_ROW_DIMS = 3
NAMES = "omic"  # outer, mid, inner, columns


class RowVariant(NamedTuple):
    """Everything a compiled softmax depends on beside its tile."""

    unit_columns: bool  # neighbours in a row are neighbours in memory
    unit_inner: bool  # or else neighbouring rows are
    unit: int  # strides count this many elements, 16 bytes where everything is aligned
    column_unit: int  # and so does the number of columns
    mask: bool = False
    causal: int = (
        0  # 1: columns are keys, column <= inner + shift; 2: they are queries, inner <= column + shift
    )
    log: bool = False
    wide_rows: bool = False  # offsets within a row need 64 bits


class Rows(NamedTuple):
    """Tensors of one shape as (outer, mid, inner, columns) views."""

    sizes: tuple[int, ...]  # outer, mid, inner, columns
    strides: tuple[tuple[int, ...], ...]  # the same four of each tensor

    @classmethod
    def of(cls, tensors: Sequence[Tensor], dim: int, inner: int | None = None) -> Rows | None:
        """The tensors, of one shape, in the memory order of the last; None if they need more than three row dims.

        `inner` names a dimension that has to be the innermost of the row dims, and alone there.
        """
        shape, model = tensors[0].shape, tensors[-1]
        dims = [d for d in range(len(shape)) if d not in (dim, inner) and shape[d] != 1]
        dims.sort(key=model.stride, reverse=True)
        groups: list[tuple[int, tuple[int, ...]]] = []
        for d in dims:
            strides = tuple(t.stride(d) for t in tensors)
            if groups and groups[-1][1] == tuple(stride * shape[d] for stride in strides):
                groups[-1] = (groups[-1][0] * shape[d], strides)
            else:
                groups.append((shape[d], strides))
        if inner is not None:
            groups.append((shape[inner], tuple(t.stride(inner) for t in tensors)))
        if len(groups) > MAX_ROW_DIMS:
            return None
        nothing = (0,) * len(tensors)
        groups = [(1, nothing)] * (MAX_ROW_DIMS - len(groups)) + groups
        groups.append((shape[dim], tuple(t.stride(dim) for t in tensors)))
        return cls(tuple(size for size, _ in groups), tuple(zip(*(strides for _, strides in groups))))

    def arguments(self, names: Sequence[str], unit: int, free: Sequence[str] = ()) -> dict[str, int]:
        """Sizes and strides as the kernels take them; the strides of `free` tensors count elements."""
        args = dict(zip(("num_outer", "num_mid", "num_inner"), self.sizes))
        for name, strides in zip(names, self.strides):
            for letter, stride, size in zip(NAMES, strides, self.sizes):
                args[f"stride_{name}_{letter}"] = 0 if size == 1 else stride // (1 if name in free else unit)
        return args


def forward_launch(
    spec: SoftmaxSpec, x: Tensor, mask: Tensor | None, y: Tensor, rows: Rows, causal: int, scale: float, tile: RowTile
) -> Launch:  # fmt: skip
    """softmax_fwd_kernel or its form for long rows; `rows` are those of mask (if any), x, y."""
    names = ["mask", "x", "y"] if mask is not None else ["x", "y"]
    vectors = Rows(rows.sizes, rows.strides[-2:])
    variant = _variant(spec, vectors, (x, y))
    variant = variant._replace(mask=mask is not None, causal=causal, wide_rows=_wide(spec, rows))
    args: dict[str, Any] = {f"stride_mask_{letter}": 0 for letter in NAMES}
    args |= rows.arguments(names, variant.unit, free=("mask",))
    columns, inner = rows.sizes[3], rows.sizes[2]
    args |= {"x": x, "y": y, "mask": None if mask is None else mask.view(torch.uint8), "scale": scale}
    args |= {"shift": columns - inner if causal == 1 else inner - columns}
    kernel = softmax.softmax_fwd_kernel if tile.whole else softmax.softmax_fwd_long_kernel
    return _launch(kernel, rows, args, variant, tile)


def backward_launch(
    spec: SoftmaxSpec, y: Tensor, dy: Tensor, dx: Tensor, rows: Rows, scale: float, tile: RowTile
) -> Launch:
    """softmax_bwd_kernel or its form for long rows; `rows` are those of y, dy, dx."""
    variant = _variant(spec, rows, (y, dy, dx))
    args: dict[str, Any] = rows.arguments(["y", "dy", "dx"], variant.unit)
    args |= {"y": y, "dy": dy, "dx": dx, "scale": scale}
    kernel = softmax.softmax_bwd_kernel if tile.whole else softmax.softmax_bwd_long_kernel
    return _launch(kernel, rows, args, variant, tile)


def _launch(kernel: Any, rows: Rows, args: dict[str, Any], variant: RowVariant, tile: RowTile) -> Launch:
    outer, mid, inner, columns = rows.sizes
    args |= {"num_columns": columns // variant.column_unit, "VARIANT": variant}
    args |= {"BLOCK_ROWS": tile.rows, "BLOCK_COLUMNS": tile.columns}
    if variant.unit_columns:
        programs = -(-outer * mid * inner // tile.rows)
    else:
        programs = outer * mid * -(-inner // tile.rows)
    chosen = {name: args[name] for name in kernel.arg_names}
    return Launch(kernel, (programs if columns else 0,), chosen, tile.num_warps, 1 if tile.whole else 2)


def _variant(spec: SoftmaxSpec, rows: Rows, tensors: Sequence[Tensor]) -> RowVariant:
    """The memory layout of the rows, and what is known of their alignment."""
    columns = rows.sizes[3]
    unit_columns = all(strides[3] == 1 for strides in rows.strides) or columns == 1
    unit_inner = not unit_columns and all(strides[2] == 1 for strides in rows.strides)
    unit = 16 // min(tensor.element_size() for tensor in tensors)
    fixed = {True: 3, False: 2}[unit_columns]  # the dimension of stride 1
    if not (unit_columns or unit_inner) or any(tensor.data_ptr() % 16 for tensor in tensors):
        unit = 1
    for strides in rows.strides:
        for place, (stride, size) in enumerate(zip(strides, rows.sizes)):
            if place != fixed and size > 1 and stride % unit:
                unit = 1
    column_unit = unit if unit_columns and columns % unit == 0 else 1
    return RowVariant(unit_columns, unit_inner, unit, column_unit, log=spec.log, wide_rows=_wide(spec, rows))


def _wide(spec: SoftmaxSpec, rows: Rows) -> bool:
    """Whether some element of some tensor, or some row, has a number that 32 bits do not hold."""
    last = (sum((size - 1) * stride for size, stride in zip(rows.sizes, strides)) for strides in rows.strides)
    return spec.wide_rows or max(last) >= 2**31
