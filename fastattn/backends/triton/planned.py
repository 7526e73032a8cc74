"""Plans of Triton launches: the arguments that follow from shapes and strides are worked out once."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastattn.backends.triton.kv_cache import is_decode_call
from fastattn.spec import AttentionCall, AttentionSpec
from fastattn.strides import empty_in_order

OPERANDS = 5  # query, key, value, out and lse come first in the forward kernel's parameters


def attention_fwd_plan(
    spec: AttentionSpec, call: AttentionCall, lse_in_order: bool
) -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]] | None:
    """(query, key, value) -> (out, lse) for calls like this one, as `attention_fwd`; None for a single query, whose
    launches take more than these tensors. lse always is contiguous."""
    from fastattn.kernels.arguments import descriptor_of
    from fastattn.kernels.launches import forward_launch
    from fastattn.kernels.tuned import tiles_for

    if is_decode_call(spec):
        return None
    tile = tiles_for(spec).forward
    out = empty_in_order(call.query, (*call.query.shape[:3], call.value.shape[3]))
    shape, strides, rows = out.shape, out.stride(), call.query.shape[:3]
    lse = call.query.new_empty(rows, dtype=torch.float32)
    launch = forward_launch(spec, call, out, lse, None, tile)
    by_tma, rest = not isinstance(launch.args[0], Tensor), launch.args[OPERANDS:]
    launch = launch._replace(args=())  # a plan keeps no tensor

    def run(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        out = query.new_empty_strided(shape, strides)
        lse = query.new_empty(rows, dtype=torch.float32)
        operands: tuple[object, ...] = (query, key, value)
        if by_tma:
            blocks = (tile.block_m, tile.block_n, tile.block_n)
            operands = tuple(descriptor_of(t, block) for t, block in zip((query, key, value), blocks))
        launch._replace(args=(*operands, out, lse, *rest)).run()
        return out, lse

    return run
