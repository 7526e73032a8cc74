"""Launches of the cross-entropy kernels."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastattn.kernels import cross_entropy
from fastattn.kernels.launches import Launch
from fastattn.kernels.row_tiles import RowTile
from fastattn.spec import CrossEntropyCall


def forward_launch(call: CrossEntropyCall, losses: Tensor, norms: Tensor, tile: RowTile) -> Launch:
    """cross_entropy_fwd_kernel on logits whose last stride is 1."""
    args = _arguments(call, call.logits)
    args |= {"losses": losses, "norms": norms}
    return _launch(cross_entropy.cross_entropy_fwd_kernel, call.logits.shape[0], args, tile)


def backward_launch(
    call: CrossEntropyCall, dlosses: Tensor, norms: Tensor, dlogits: Tensor, tile: RowTile
) -> Launch:
    """cross_entropy_bwd_kernel on logits and dlogits whose last stride is 1."""
    args = _arguments(call, call.logits, dlogits)
    args |= {"dlosses": dlosses, "norms": norms, "dlogits": dlogits}
    args["stride_dlogits"] = dlogits.stride(0) // args["UNIT"]
    programs = call.logits.shape[0] * -(-call.logits.shape[1] // tile.columns)
    return _launch(cross_entropy.cross_entropy_bwd_kernel, programs, args, tile)


def _arguments(call: CrossEntropyCall, *matrices: Tensor) -> dict[str, Any]:
    """The arguments of both kernels; strides and the number of classes count 16 bytes where everything is aligned."""
    logits = call.logits
    vector = 16 // logits.element_size()
    aligned = all(m.data_ptr() % 16 == 0 and (m.shape[0] <= 1 or m.stride(0) % vector == 0) for m in matrices)
    unit = vector if aligned else 1
    column_unit = unit if logits.shape[1] % unit == 0 else 1
    return {
        "logits": logits,
        "target": call.target,
        "class_weight": call.class_weight,
        "weight_mean": call.weight_mean(),
        "stride_logits": logits.stride(0) // unit,
        "num_classes": logits.shape[1] // column_unit,
        "ignore_index": call.ignore_index,
        "smoothing": call.label_smoothing,
        "z_loss": call.z_loss,
        "UNIT": unit,
        "COLUMN_UNIT": column_unit,
        "SMOOTHED": call.label_smoothing != 0.0,
        "Z_LOSS": call.z_loss != 0.0,
    }


def _launch(kernel: Any, programs: int, args: dict[str, Any], tile: RowTile) -> Launch:
    args["BLOCK"] = tile.columns
    return Launch(kernel, (programs,), {name: args[name] for name in kernel.arg_names}, tile.num_warps, 2)
