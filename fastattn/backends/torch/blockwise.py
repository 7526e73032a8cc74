"""Tiles by softmax in torch operations: online over the keys in the forward, from lse in the backward."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastattn.backends.torch.exponential import exp_
from fastattn.backends.torch.gradient_sums import GradientSums
from fastattn.backends.torch.parts import Part, cols_of, dropped, grouped, rows_of
from fastattn.backends.torch.schedule import Tile
from fastattn.spec import accumulation_dtype


def blockwise_rows(part: Part, row_tiles: list[Tile]) -> tuple[Tensor, Tensor]:
    """One row range by online softmax over its tiles."""
    dtype = accumulation_dtype(part.query.dtype)
    shape = (*part.query.shape[:2], len(row_tiles[0].rows))
    row_max = part.query.new_full(shape, -torch.inf, dtype=dtype)
    row_sum = torch.zeros_like(row_max)
    acc = row_max.new_zeros((*shape, part.value.shape[3]))
    for tile in row_tiles:
        scores, _ = part.scores(tile)
        new_max = torch.maximum(row_max, scores.amax(-1))
        base = new_max.masked_fill(new_max == -torch.inf, 0)  # rows that saw nothing yet: exp(-inf - 0) = 0
        probs = exp_(scores.sub_(base[..., None]))
        rescale = torch.exp(row_max - base)
        row_sum = row_sum * rescale + probs.sum(-1)
        values = grouped(dropped(part, tile, probs), part.key.shape[1]) @ cols_of(part.value, tile).to(dtype)
        acc = acc.mul_(rescale[..., None]).add_(values.view(acc.shape))
        row_max = new_max
    out = acc / torch.where(row_sum == 0, 1, row_sum)[..., None]
    return out.to(part.query.dtype), row_max + torch.log(row_sum)


@dataclass(frozen=True, slots=True)
class RowStatistics:
    """Row statistics of the blockwise backward, all (B, H, Sq)."""

    lse_safe: Tensor  # +inf in rows that see nothing
    delta: Tensor | None
    dlse: Tensor | None
    sink_weight: Tensor | None
    normalise: bool  # make the weights of each row, with its sink's, sum to 1
    alone: bool  # the tile at hand holds all that its rows see, so sums over its columns are exact
    has_nan: bool  # some row's lse is NaN


def blockwise_tile_bwd(part: Part, tile: Tile, rows: RowStatistics, dout: Tensor, sums: GradientSums) -> None:
    """dv += (keep p)^T dout; dscore = p * (keep dp - delta), and from it every other gradient."""
    num_kv_heads = part.key.shape[1]
    scores, slope = part.scores(tile)
    lse = rows_of(part.of(rows.lse_safe), tile)
    weightless = scores == -torch.inf if rows.has_nan else None
    probs = exp_(scores.sub_(lse[..., None]))
    if rows.normalise:
        total = probs.sum(-1)
        if rows.sink_weight is not None:
            total += rows_of(part.of(rows.sink_weight), tile)
        probs.div_(torch.where(total == 0, 1, total)[..., None])
    if weightless is not None:
        probs.masked_fill_(weightless, 0)
    dout_rows = grouped(rows_of(part.of(dout), tile).to(probs.dtype), num_kv_heads)
    dprobs = (dout_rows @ cols_of(part.value, tile).to(probs.dtype).mT).view(probs.shape)
    weights = probs
    if (keep := part.keep(tile)) is not None:
        weights, dprobs = probs * keep, dprobs.mul_(keep)
    cols_of(part.of(sums.value), tile).add_(grouped(weights, num_kv_heads).mT @ dout_rows)
    if rows.alone:  # rowsum(p * dp) of the tile itself cancels exactly where dscore is 0
        dscores = dprobs.mul_(probs)
        delta = dscores.sum(-1)
        if rows.dlse is not None:
            delta -= rows_of(part.of(rows.dlse), tile)
        delta = torch.where(lse == torch.inf, 0, delta)
        dscores = dscores.addcmul_(probs, delta[..., None], value=-1)
    else:
        assert rows.delta is not None
        dscores = dprobs.sub_(rows_of(part.of(rows.delta), tile)[..., None]).mul_(probs)
    if rows.has_nan and (hidden := part.hidden(tile)) is not None:
        dscores.masked_fill_(hidden, 0)  # the delta of some rows is NaN
    sums.add_scores(part, tile, dscores, slope)
