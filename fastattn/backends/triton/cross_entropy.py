"""Cross-entropy on the Triton backend, and that of a linear layer around it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastattn.backends import linear_cross_entropy
from fastattn.backends.linear_cross_entropy import LinearGrads
from fastattn.spec import CrossEntropyCall, LinearCrossEntropyCall, SoftmaxSpec

if TYPE_CHECKING:
    from fastattn.kernels.row_tiles import RowTile


def cross_entropy_fwd(
    spec: SoftmaxSpec, call: CrossEntropyCall, tile: RowTile | None = None
) -> tuple[Tensor, Tensor]:
    """(losses, norms), float32: (N,), 0 where ignored, and the parts of lse, (N, 2)."""
    from fastattn.kernels.cross_entropy_launches import forward_launch
    from fastattn.kernels.row_tiles import loss_tile_for

    losses = call.logits.new_empty(call.logits.shape[0], dtype=torch.float32)
    norms = losses.new_empty(losses.shape[0], 2)
    forward_launch(spec, call, losses, norms, tile or loss_tile_for(spec)).run()
    return losses, norms


def cross_entropy_bwd(
    spec: SoftmaxSpec,
    call: CrossEntropyCall,
    dlosses: Tensor,
    norms: Tensor,
    out: Tensor | None = None,
    tile: RowTile | None = None,
) -> Tensor:
    """The gradient of the logits, as `torch_cross_entropy` states it, written to `out` if given: that may be z."""
    from fastattn.kernels.cross_entropy_launches import backward_launch
    from fastattn.kernels.row_tiles import loss_tile_for

    dlogits = torch.empty_like(call.logits, memory_format=torch.contiguous_format) if out is None else out
    backward_launch(spec, call, dlosses, norms, dlogits, tile or loss_tile_for(spec)).run()
    return dlogits


def linear_cross_entropy_fwd(
    spec: SoftmaxSpec,
    call: LinearCrossEntropyCall,
    needs: tuple[bool, ...] | None = None,
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor, LinearGrads | None]:
    """(losses, norms) without all the logits, and the needed gradients of the sum of losses times `scale`."""
    return linear_cross_entropy.forward(spec, call, needs, cross_entropy_fwd, cross_entropy_bwd, scale)


def linear_cross_entropy_bwd(
    spec: SoftmaxSpec, call: LinearCrossEntropyCall, dlosses: Tensor, norms: Tensor, needs: tuple[bool, ...]
) -> LinearGrads:
    """The gradients of hidden, weight and bias that are needed, from logits computed again."""
    return linear_cross_entropy.backward(spec, call, dlosses, norms, needs, cross_entropy_bwd)
