"""Launches of the row kernels: the rows, the strides and the compiled variant of a call.

Arguments stand in the order of the kernel's signature, a group to a line.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastattn.integers import cdiv
from fastattn.kernels import softmax
from fastattn.kernels.arguments import Launch
from fastattn.kernels.jit import Kernel
from fastattn.kernels.row_tiles import RowTile
from fastattn.spec import SoftmaxSpec
from fastattn.strides import ALIGNMENT

MAX_ROW_DIMS = 3


class RowVariant(NamedTuple):
    """Everything a compiled softmax depends on beside its tile."""

    unit_columns: bool  # neighbours in a row are neighbours in memory
    unit_inner: bool  # or else neighbouring rows are
    unit: int  # strides count this many elements, 16 bytes where everything is aligned
    column_unit: int  # and so does the number of columns
    mask: bool = False
    causal: int = (
        0  # 1: columns are keys, column <= inner + shift; 2: columns are queries, inner <= column + shift
    )
    log: bool = False
    int64_offsets: bool = False  # offsets within a row need 64 bits


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
        by_tensor = [tuple([strides[place] for _, strides in groups]) for place in range(len(tensors))]
        return cls(tuple([size for size, _ in groups]), tuple(by_tensor))

    def strides_of(self, place: int, unit: int) -> tuple[int, int, int, int]:
        """The four strides of the tensor at a place, in units; 0 of a dimension of size 1."""
        num_outer, num_mid, num_inner, num_columns = self.sizes
        outer, mid, inner, column = self.strides[place]
        return (
            outer // unit if num_outer != 1 else 0,
            mid // unit if num_mid != 1 else 0,
            inner // unit if num_inner != 1 else 0,
            column // unit if num_columns != 1 else 0,
        )


def forward_launch(
    spec: SoftmaxSpec, x: Tensor, mask: Tensor | None, y: Tensor, rows: Rows, causal: int, scale: float, tile: RowTile
) -> Launch:  # fmt: skip
    """softmax_fwd_kernel or its form for long rows; `rows` are those of mask (if any), x, y."""
    variant = _variant(spec, rows, (x, y), mask is not None, causal)
    outer, mid, inner, columns = rows.sizes
    args = (
        x, None if mask is None else mask.view(torch.uint8), y,
        *rows.strides_of(-2, variant.unit),
        *((0, 0, 0, 0) if mask is None else rows.strides_of(0, 1)),
        *rows.strides_of(-1, variant.unit),
        outer, mid, inner, columns // variant.column_unit, columns - inner if causal == 1 else inner - columns, scale,
        variant, tile.rows, tile.columns,
    )  # fmt: skip
    kernel = softmax.softmax_fwd_kernel if tile.whole else softmax.softmax_fwd_long_kernel
    return _launch(kernel, rows, args, variant, tile)


def backward_launch(
    spec: SoftmaxSpec, y: Tensor, dy: Tensor, dx: Tensor, rows: Rows, scale: float, tile: RowTile
) -> Launch:
    """softmax_bwd_kernel or its form for long rows; `rows` are those of y, dy, dx."""
    variant = _variant(spec, rows, (y, dy, dx))
    outer, mid, inner, columns = rows.sizes
    args = (
        y, dy, dx,
        *rows.strides_of(0, variant.unit), *rows.strides_of(1, variant.unit), *rows.strides_of(2, variant.unit),
        outer, mid, inner, columns // variant.column_unit, scale,
        variant, tile.rows, tile.columns,
    )  # fmt: skip
    kernel = softmax.softmax_bwd_kernel if tile.whole else softmax.softmax_bwd_long_kernel
    return _launch(kernel, rows, args, variant, tile)


def _launch(
    kernel: Kernel, rows: Rows, args: tuple[object, ...], variant: RowVariant, tile: RowTile
) -> Launch:
    outer, mid, inner, columns = rows.sizes
    if variant.unit_columns:
        programs = cdiv(outer * mid * inner, tile.rows)
    else:
        programs = outer * mid * cdiv(inner, tile.rows)
    return Launch(kernel, (programs if columns else 0,), args, tile.num_warps, 1 if tile.whole else 2)


def _variant(
    spec: SoftmaxSpec, rows: Rows, tensors: Sequence[Tensor], mask: bool = False, causal: int = 0
) -> RowVariant:
    """The memory layout of the rows, and what is known of their alignment; `tensors` are the last ones of `rows`."""
    columns = rows.sizes[3]
    aligned = rows.strides[-len(tensors) :]
    unit_columns = all(strides[3] == 1 for strides in aligned) or columns == 1
    unit_inner = not unit_columns and all(strides[2] == 1 for strides in aligned)
    unit = ALIGNMENT // min(tensor.element_size() for tensor in tensors)
    fixed = 3 if unit_columns else 2  # the dimension of stride 1
    if not (unit_columns or unit_inner) or any(tensor.data_ptr() % ALIGNMENT for tensor in tensors):
        unit = 1
    for strides in aligned:
        for place, (stride, size) in enumerate(zip(strides, rows.sizes)):
            if place != fixed and size > 1 and stride % unit:
                unit = 1
    return RowVariant(
        unit_columns=unit_columns,
        unit_inner=unit_inner,
        unit=unit,
        column_unit=unit if unit_columns and columns % unit == 0 else 1,
        mask=mask,
        causal=causal,
        log=spec.log,
        int64_offsets=_wide(spec, rows),
    )


def _wide(spec: SoftmaxSpec, rows: Rows) -> bool:
    """Whether some element of some tensor, or some row, has a number that 32 bits do not hold."""
    last = (sum((size - 1) * stride for size, stride in zip(rows.sizes, strides)) for strides in rows.strides)
    return spec.int64_offsets or max(last) >= 2**31
