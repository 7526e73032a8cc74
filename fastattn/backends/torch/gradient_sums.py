"""The accumulators of one call's gradients, to which tiles add."""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.backends.torch.parts import Part, cols_of, grouped, rows_of
from fastattn.backends.torch.schedule import Tile
from fastattn.spec import AttentionCall, accumulation_dtype
from fastattn.strides import empty_in_order


class GradientSums:
    """Gradient accumulators of one call, zero wherever no tile adds."""

    def __init__(self, call: AttentionCall, bias: bool, slopes: bool) -> None:
        dtype = accumulation_dtype(call.query.dtype)
        self.call = call
        self.query, self.key, self.value = (
            empty_in_order(t, tuple(t.shape), dtype).zero_() for t in (call.query, call.key, call.value)
        )
        self.bias = None  # in float64 where it is broadcast, for the same reason as the slopes
        if bias and call.bias is not None:
            full = (*call.query.shape[:3], call.key.shape[2])
            total_dtype = dtype if call.bias.shape == full else torch.float64
            self.bias = call.bias.new_zeros(call.bias.shape, dtype=total_dtype)
        self.slopes = None  # in float64: few results of many terms that cancel
        if slopes and call.alibi_slopes is not None:
            self.slopes = call.alibi_slopes.new_zeros(call.alibi_slopes.shape, dtype=torch.float64)

    def add(self, part: Part, tile: Tile, kv_heads: slice, dq: Tensor, dk: Tensor, dv: Tensor) -> None:
        """Add one tile's share of the gradients of some key heads and the query heads they serve."""
        rows_of(part.of(self.query)[:, query_heads(part, kv_heads)], tile).add_(dq)
        cols_of(part.of(self.key)[:, kv_heads], tile).add_(dk)
        cols_of(part.of(self.value)[:, kv_heads], tile).add_(dv)

    def add_scores(self, part: Part, tile: Tile, dscores: Tensor, slope: Tensor | None) -> None:
        """Add what follows from a tile's dscores (b, H, rows, cols): everything but the value's gradient."""
        if self.bias is not None:
            target = part.cut(self.bias, tile)
            broadcast = [dim for dim, size in enumerate(target.shape) if size != dscores.shape[dim]]
            target.add_(dscores.sum(broadcast, keepdim=True, dtype=target.dtype) if broadcast else dscores)
        if self.slopes is not None:
            dslopes = -(dscores * part.distance(tile).abs()).sum((2, 3), dtype=torch.float64)
            target = self.slopes if self.slopes.shape[0] == 1 else part.of(self.slopes)
            target.add_(dslopes.sum_to_size(target.shape))
        if slope is not None:
            dscores = dscores * slope
        num_kv_heads = part.key.shape[1]
        dscores = grouped(dscores * self.call.scale, num_kv_heads)
        query = grouped(rows_of(part.query, tile).to(dscores.dtype), num_kv_heads)
        dq = dscores @ cols_of(part.key, tile).to(dscores.dtype)
        rows_of(part.of(self.query), tile).add_(dq.view(rows_of(part.query, tile).shape))
        cols_of(part.of(self.key), tile).add_(dscores.mT @ query)

    def results(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        """The sums in their tensors' own dtypes and memory order."""
        call = self.call
        operands = ((self.query, call.query), (self.key, call.key), (self.value, call.value))
        dq, dk, dv = (total.to(t.dtype) for total, t in operands)
        bias = self.bias.to(call.bias.dtype) if self.bias is not None and call.bias is not None else None
        slopes = None if self.slopes is None else self.slopes.to(accumulation_dtype(call.query.dtype))
        return dq, dk, dv, bias, slopes


def query_heads(part: Part, kv_heads: slice) -> slice:
    group_size = part.call.group_size
    return slice(kv_heads.start * group_size, kv_heads.stop * group_size)
