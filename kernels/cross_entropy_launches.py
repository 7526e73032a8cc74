"""Launches of the cross-entropy kernels; arguments stand in the order of the kernel's signature."""

from __future__ import annotations

from torch import Tensor

from fastattn.integers import cdiv
from fastattn.kernels import cross_entropy
from fastattn.kernels.arguments import Launch, in_units
from fastattn.kernels.row_tiles import RowTile
from fastattn.spec import CrossEntropyCall, SoftmaxSpec
from fastattn.strides import ALIGNMENT

NUM_STAGES = 2


def forward_launch(
    spec: SoftmaxSpec, call: CrossEntropyCall, losses: Tensor, norms: Tensor, tile: RowTile
) -> Launch:
    """cross_entropy_fwd_kernel on logits whose last stride is 1."""
    logits = call.logits
    unit, column_unit = _units(spec, logits)
    args = (
        logits, call.target, call.class_weight, call.weight_mean(), losses, norms,
        _row_stride(logits, unit), logits.shape[1] // column_unit,
        call.ignore_index, call.label_smoothing, call.z_loss,
        unit, column_unit, call.label_smoothing != 0.0, call.z_loss != 0.0, tile.columns,
    )  # fmt: skip
    grid = (logits.shape[0],)
    return Launch(cross_entropy.cross_entropy_fwd_kernel, grid, args, tile.num_warps, NUM_STAGES)


def backward_launch(
    spec: SoftmaxSpec, call: CrossEntropyCall, dlosses: Tensor, norms: Tensor, dlogits: Tensor, tile: RowTile
) -> Launch:
    """cross_entropy_bwd_kernel on logits and dlogits whose last stride is 1."""
    logits = call.logits
    unit = column_unit = _units(spec, logits)[1]  # dlogits has no gaps between its rows
    args = (
        logits, call.target, call.class_weight, call.weight_mean(), norms, dlosses, dlogits,
        _row_stride(logits, unit), _row_stride(dlogits, unit), logits.shape[1] // column_unit,
        call.ignore_index, call.label_smoothing, call.z_loss,
        unit, column_unit, call.label_smoothing != 0.0, call.z_loss != 0.0, tile.columns,
    )  # fmt: skip
    grid = (logits.shape[0] * cdiv(logits.shape[1], tile.columns),)
    return Launch(cross_entropy.cross_entropy_bwd_kernel, grid, args, tile.num_warps, NUM_STAGES)


def _units(spec: SoftmaxSpec, logits: Tensor) -> tuple[int, int]:
    """What strides and the number of classes count: elements of 16 bytes where everything is aligned, else one."""
    unit = ALIGNMENT // logits.element_size() if spec.aligned else 1
    return unit, unit if logits.shape[1] % unit == 0 else 1


def _row_stride(matrix: Tensor, unit: int) -> int:
    return in_units(matrix.stride(0), unit) if matrix.shape[0] > 1 else 0
