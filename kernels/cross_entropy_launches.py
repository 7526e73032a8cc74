"""Launches of the cross-entropy kernels; arguments stand in the order of the kernel's signature."""

from __future__ import annotations

from torch import Tensor

from fastattn.kernels import cross_entropy
from fastattn.kernels.arguments import Launch, cdiv
from fastattn.kernels.row_tiles import RowTile
from fastattn.spec import CrossEntropyCall

NUM_STAGES = 2


def forward_launch(call: CrossEntropyCall, losses: Tensor, norms: Tensor, tile: RowTile) -> Launch:
    """cross_entropy_fwd_kernel on logits whose last stride is 1."""
    logits = call.logits
    unit, column_unit = _units(logits)
    args = (
        logits, call.target, call.class_weight, call.weight_mean(), losses, norms,
        logits.stride(0) // unit, logits.shape[1] // column_unit,
        call.ignore_index, call.label_smoothing, call.z_loss,
        unit, column_unit, call.label_smoothing != 0.0, call.z_loss != 0.0, tile.columns,
    )  # fmt: skip
    grid = (logits.shape[0],)
    return Launch(cross_entropy.cross_entropy_fwd_kernel, grid, args, tile.num_warps, NUM_STAGES)


def backward_launch(
    call: CrossEntropyCall, dlosses: Tensor, norms: Tensor, dlogits: Tensor, tile: RowTile
) -> Launch:
    """cross_entropy_bwd_kernel on logits and dlogits whose last stride is 1."""
    logits = call.logits
    unit, column_unit = _units(logits, dlogits)
    args = (
        logits, call.target, call.class_weight, call.weight_mean(), norms, dlosses, dlogits,
        logits.stride(0) // unit, dlogits.stride(0) // unit, logits.shape[1] // column_unit,
        call.ignore_index, call.label_smoothing, call.z_loss,
        unit, column_unit, call.label_smoothing != 0.0, call.z_loss != 0.0, tile.columns,
    )  # fmt: skip
    grid = (logits.shape[0] * cdiv(logits.shape[1], tile.columns),)
    return Launch(cross_entropy.cross_entropy_bwd_kernel, grid, args, tile.num_warps, NUM_STAGES)


def _units(*matrices: Tensor) -> tuple[int, int]:
    """What strides and the number of classes count: elements of 16 bytes where everything is aligned, else one."""
    unit = 16 // matrices[0].element_size()
    for matrix in matrices:
        if matrix.data_ptr() % 16 or (matrix.shape[0] > 1 and matrix.stride(0) % unit):
            return 1, 1
    return unit, unit if matrices[0].shape[1] % unit == 0 else 1
