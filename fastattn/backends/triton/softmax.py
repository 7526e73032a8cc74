"""Softmax on the Triton backend: any dimension, strides and mask brought to rows, then one launch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastattn.spec import SoftmaxCall, SoftmaxSpec

if TYPE_CHECKING:
    from fastattn.kernels.row_tiles import RowTile
    from fastattn.kernels.softmax_launches import Rows


def softmax_tiles(spec: SoftmaxSpec) -> str:
    """The tile `spec` runs with, in a line."""
    from fastattn.kernels.row_tiles import row_tile_for

    return str(row_tile_for(spec))


def softmax_fwd(spec: SoftmaxSpec, call: SoftmaxCall, tile: RowTile | None = None) -> Tensor:
    """exp(scale * x) over its sum along a dimension, or the logarithm; constant where masked."""
    from fastattn.kernels.softmax_launches import Rows, forward_launch

    x, dim = call.x, call.dim
    out = torch.empty_like(x, dtype=call.dtype)
    if x.numel() == 0:
        return out
    mask, causal, inner = call.mask, 0, None
    if call.causal:
        causal, inner = (1, x.dim() - 2) if dim == x.dim() - 1 else (2, x.dim() - 1)
    y = out
    tensors = [x, y] if mask is None else [mask.expand(x.shape), x, y]
    rows = Rows.of(tensors, dim, inner)
    if rows is None:
        tensors = [tensor.contiguous() for tensor in tensors]
        x, y = tensors[-2:]
        rows = _rows_of_contiguous(tensors, dim, inner)
    chosen = tile or _tile(spec, rows)
    forward_launch(spec, x, None if mask is None else tensors[0], y, rows, causal, call.scale, chosen).run()
    return out if y is out else out.copy_(y)


def softmax_bwd(
    spec: SoftmaxSpec,
    dout: Tensor,
    out: Tensor,
    dim: int,
    scale: float,
    dtype: torch.dtype,
    tile: RowTile | None = None,
) -> Tensor:
    """scale * out * (dout - sum(out * dout)), in log scale * (dout - exp(out) * sum(dout)); 0 where out is constant."""
    from fastattn.kernels.softmax_launches import Rows, backward_launch

    result = torch.empty_like(out, dtype=dtype)
    if out.numel() == 0:
        return result
    dx = result  # or contiguous, to be copied, where the tensors have no common rows
    rows = Rows.of([out, dout, dx], dim)
    if rows is None or dout.stride(dim) != out.stride(dim):
        out, dout, dx = out.contiguous(), dout.contiguous(), result.new_empty(result.shape)
        rows = _rows_of_contiguous([out, dout, dx], dim, None)
    backward_launch(spec, out, dout, dx, rows, scale, tile or _tile(spec, rows)).run()
    return result if dx is result else result.copy_(dx)


def _tile(spec: SoftmaxSpec, rows: Rows) -> RowTile:
    """The tile for the rows' actual memory layout."""
    from fastattn.kernels.row_tiles import row_tile_for

    unit_columns = all(strides[3] == 1 for strides in rows.strides[-2:]) or rows.sizes[3] == 1
    return row_tile_for(spec.replace(unit_columns=unit_columns))


def _rows_of_contiguous(tensors: list[Tensor], dim: int, inner: int | None) -> Rows:
    """Contiguous tensors as rows: three row dims at most, those before `dim`, those after it, and the one named."""
    from fastattn.kernels.softmax_launches import Rows

    rows = Rows.of(tensors, dim, inner)
    assert rows is not None
    return rows
