"""Attention on the Triton backend: tensors for the results, then the launches of forward, backward and weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastattn.integers import cdiv
from fastattn.spec import (
    AttentionCall,
    AttentionGrads,
    AttentionSpec,
    GradsNeeded,
    WeightsGradsNeeded,
)
from fastattn.strides import empty_in_order

if TYPE_CHECKING:
    from fastattn.kernels.launches import Packing, UpstreamGrads
    from fastattn.kernels.splits import Split
    from fastattn.kernels.tiles import Tile, Tiles


def attention_fwd(
    spec: AttentionSpec, call: AttentionCall, tiles: Tiles | None = None, packing: Packing | None = None
) -> tuple[Tensor, Tensor]:
    """(out, lse) of a call, or of packed sequences, with the given tiles instead of the spec's own if any."""
    from fastattn.backends.triton.kv_cache import is_decode_call, single_query_fwd
    from fastattn.kernels.launches import forward_launch
    from fastattn.kernels.tuned import tiles_for

    if tiles is None and packing is None and is_decode_call(spec):
        return single_query_fwd(spec, call)
    query, value = call.query, call.value
    tile = (tiles or tiles_for(spec, packing is not None)).forward
    out = empty_in_order(query, (*query.shape[:3], value.shape[3]))
    lse = query.new_empty(query.shape[:3], dtype=torch.float32)
    forward_launch(spec, call, out, lse, _key_blocks(call, tile), tile, packing).run()
    return out, lse


def attention_bwd(
    spec: AttentionSpec,
    call: AttentionCall,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor | None,
    needs: GradsNeeded,
    tiles: Tiles | None = None,
    packing: Packing | None = None,
) -> AttentionGrads:
    """The gradients a call, or packed sequences, need, bitwise the same on every run."""
    from fastattn.kernels.launches import UpstreamGrads, delta_launch
    from fastattn.kernels.tuned import tiles_for

    tiles = tiles or tiles_for(spec, packing is not None)
    delta, reference = torch.empty_like(lse), torch.empty_like(lse)
    delta_launch(spec, call, lse, reference, out, dout, dlse, delta).run()
    lse_correction = _lse_correction(spec, call, lse, tiles.dq)
    upstream_grads = UpstreamGrads(reference, lse_correction, delta, dout)
    dkey, dvalue = _key_grads(spec, call, packing, upstream_grads, needs.key or needs.value, tiles.dkdv)
    dquery, dslopes = _query_grads(
        spec, call, packing, upstream_grads, needs.query, needs.alibi_slopes, tiles.dq
    )
    return AttentionGrads(
        query=dquery if needs.query else None,
        key=dkey if needs.key else None,
        value=dvalue if needs.value else None,
        bias=_bias_grad(spec, call, upstream_grads, tiles.dbias) if needs.bias else None,
        alibi_slopes=dslopes,
        sinks=_sink_grad(call, lse, lse_correction, delta) if needs.sinks else None,
    )


def attention_weights_fwd(
    spec: AttentionSpec, call: AttentionCall, lse: Tensor, mean: bool, tiles: Tiles | None = None
) -> Tensor:
    """dropout(exp(score - lse)), (B, H, Sq, Sk), or its mean over heads, (B, Sq, Sk)."""
    from fastattn.kernels.launches import weights_launch
    from fastattn.kernels.tiles import table_tiles

    batch, num_heads, seqlen_q, _ = call.query.shape
    heads = () if mean else (num_heads,)
    weights = call.query.new_empty((batch, *heads, seqlen_q, call.key.shape[2]))
    tile = (tiles or table_tiles(spec)).dbias
    weights_launch(spec, call, lse, _lse_correction(spec, call, lse, tile), weights, mean, tile).run()
    return weights


def attention_weights_bwd(
    spec: AttentionSpec,
    call: AttentionCall,
    lse: Tensor,
    dweights: Tensor,
    mean: bool,
    needs: WeightsGradsNeeded,
    tiles: Tiles | None = None,
) -> tuple[Tensor | None, ...]:
    """Gradients of the weights to query, key, lse, bias and slopes: dscore = W * dW, dlse = -rowsum(W * dW)."""
    from fastattn.kernels.launches import UpstreamGrads, delta_launch
    from fastattn.kernels.tiles import tiles_without_tma

    num_heads = call.query.shape[1]
    tiles = tiles or tiles_without_tma(spec)
    lse_correction = _lse_correction(spec, call, lse, tiles.dq)
    reference = torch.empty_like(lse)
    delta_launch(spec, call, lse, reference).run()
    upstream_grads = UpstreamGrads(reference, lse_correction, dweights=dweights)
    if mean:
        every_head = dweights[:, None].expand(-1, num_heads, -1, -1)
        upstream_grads = UpstreamGrads(
            reference, lse_correction, dweights=every_head, dweights_factor=1.0 / num_heads
        )
    dkey, _ = _key_grads(spec, call, None, upstream_grads, needs.key, tiles.dkdv)
    dlse = torch.empty_like(lse)
    wanted = needs.query or needs.lse
    dquery, dslopes = _query_grads(
        spec, call, None, upstream_grads, wanted, needs.alibi_slopes, tiles.dq, dlse
    )
    dbias = _bias_grad(spec, call, upstream_grads, tiles.dbias) if needs.bias else None
    return dquery if needs.query else None, dkey, dlse if needs.lse else None, dbias, dslopes


def _lse_correction(spec: AttentionSpec, call: AttentionCall, lse: Tensor, tile: Tile) -> Tensor | None:
    """The correction of weights recomputed from lse, or None: only biases reach magnitudes that need it."""
    from fastattn.kernels.launches import lse_correction_launch

    if call.bias is None:
        return None
    lse_correction = torch.empty_like(lse)
    lse_correction_launch(spec, call, lse, lse_correction, tile).run()
    return lse_correction


def _key_grads(
    spec: AttentionSpec,
    call: AttentionCall,
    packing: Packing | None,
    upstream_grads: UpstreamGrads,
    needed: bool,
    tile: Tile,
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of key and value; of the weights, that of the key alone."""
    from fastattn.kernels.launches import dkdv_launch
    from fastattn.kernels.splits import split_count, split_of

    if not needed:
        return None, None
    dkey = empty_in_order(call.key, call.key.shape)
    dvalue = None if upstream_grads.dout is None else empty_in_order(call.value, call.value.shape)
    blocks = _query_blocks(call, tile)
    split = split_of(spec, packing is not None)
    count = split_count(split, spec.group_size, call.query.shape[2])
    if count == 1:
        dkdv_launch(spec, call, upstream_grads, dkey, dvalue, blocks, tile, packing).run()
    else:
        _split_key_grads(spec, call, packing, upstream_grads, dkey, dvalue, blocks, tile, split, count)
    return dkey, dvalue


def _split_key_grads(
    spec: AttentionSpec, call: AttentionCall, packing: Packing | None, upstream_grads: UpstreamGrads, dkey: Tensor,
    dvalue: Tensor | None, blocks: Tensor | None, tile: Tile, split: Split, count: int,
) -> None:  # fmt: skip
    """The same from float32 sums over the queries of each split, as many splits at a time as the workspace holds."""
    from fastattn.kernels.launches import dkdv_launch, sum_splits_launch
    from fastattn.kernels.splits import splits_at_once

    grads = [dkey] if dvalue is None else [dkey, dvalue]
    rows = [grad.shape[:3].numel() for grad in grads]
    widths = [
        cdiv(grad.shape[3], 8) * 8 for grad in grads
    ]  # so that every row begins at a multiple of 16 bytes
    slots = splits_at_once(count, 4 * sum(n * width for n, width in zip(rows, widths)))
    partials = [
        grad.new_empty((slots, *grad.shape[:3], width), dtype=torch.float32)[..., : grad.shape[3]]
        for grad, width in zip(grads, widths)
    ]
    done = 0
    while done < count:
        first = min(done, 1)  # the first partial holds the sum of the splits done
        some = min(count - done, slots - first)
        parts = [part[first : first + some] for part in partials]
        dkdv_launch(
            spec, call, upstream_grads, parts[0], parts[1] if dvalue is not None else None, blocks, tile, packing,
            split, done,
        ).run()  # fmt: skip
        done += some
        for part, grad in zip(partials, grads):
            sum_splits_launch(part[: first + some], grad if done == count else part[0]).run()


def _query_grads(
    spec: AttentionSpec,
    call: AttentionCall,
    packing: Packing | None,
    upstream_grads: UpstreamGrads,
    query_needed: bool,
    slopes_needed: bool,
    tile: Tile,
    dlse: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of query and slopes; those of the weights to lse are written to `dlse`."""
    from fastattn.kernels.launches import dq_launch, num_tiles

    if not (query_needed or slopes_needed or dlse is not None):
        return None, None
    query, slopes = call.query, call.alibi_slopes
    dquery = empty_in_order(query, query.shape)
    dslope_tiles = None
    if slopes_needed:
        dslope_tiles = query.new_empty(num_tiles(query, tile.block_m, packing), dtype=torch.float32)
    blocks = _key_blocks(call, tile)
    dq_launch(spec, call, upstream_grads, dquery, dslope_tiles, dlse, blocks, tile, packing).run()
    if dslope_tiles is None or slopes is None:
        return dquery, None
    dslopes = _slope_grads(query, dslope_tiles, packing, tile)
    if slopes.shape[0] == 1:
        dslopes = dslopes.sum(0, keepdim=True)
    return dquery, dslopes.to(slopes.dtype)


def _slope_grads(query: Tensor, dslope_tiles: Tensor, packing: Packing | None, tile: Tile) -> Tensor:
    """The sum over each sequence's tiles, (B, H) float64."""
    from fastattn.kernels.launches import sequence_sums_launch

    batch, num_heads, seqlen_q, _ = query.shape
    if packing is None:
        return dslope_tiles.view(batch, num_heads, cdiv(seqlen_q, tile.block_m)).sum(-1, dtype=torch.float64)
    sums = query.new_empty((packing.batch_size, num_heads), dtype=torch.float64)
    sequence_sums_launch(dslope_tiles, packing, seqlen_q, tile.block_m, sums).run()
    return sums


def _bias_grad(
    spec: AttentionSpec, call: AttentionCall, upstream_grads: UpstreamGrads, tile: Tile
) -> Tensor | None:
    """The gradient of the bias in its own shape, from a pass of its own."""
    from fastattn.kernels.launches import dbias_launch

    if call.bias is None:
        return None
    dbias = call.bias.new_empty(call.bias.shape)
    if call.query.shape[0] == 0 or call.query.shape[2] == 0 or call.key.shape[2] == 0:
        return dbias.zero_()
    dbias_launch(spec, call, upstream_grads, dbias, tile).run()
    return dbias


def _sink_grad(
    call: AttentionCall, lse: Tensor, lse_correction: Tensor | None, delta: Tensor
) -> Tensor | None:
    """-sum(exp(sink - lse) * delta): a sink is a key whose value, and so whose weight's gradient, is zero."""
    if call.sinks is None:
        return None
    weights = torch.exp(
        (call.sinks[:, None] - lse).nan_to_num(nan=0.0)
    )  # inf - inf: the sink has all the weight
    if lse_correction is not None:
        weights *= lse_correction
    terms = torch.where(lse == -torch.inf, 0.0, weights * delta)
    return -terms.sum((0, 2), dtype=torch.float64).to(call.sinks.dtype)


def _key_blocks(call: AttentionCall, tile: Tile) -> Tensor | None:
    """For each query tile, the key blocks its segments meet."""
    if call.query_segments is None or call.key_segments is None:
        return None
    return _segment_blocks(call.query_segments, call.key_segments, tile.block_m, tile.block_n)


def _query_blocks(call: AttentionCall, tile: Tile) -> Tensor | None:
    """For each key tile, the query blocks its segments meet."""
    if call.query_segments is None or call.key_segments is None:
        return None
    return _segment_blocks(call.key_segments, call.query_segments, tile.block_n, tile.block_m)


def _segment_blocks(ids: Tensor, other_ids: Tensor, block: int, other_block: int) -> Tensor:
    from fastattn.kernels.launches import segment_blocks_launch

    blocks = ids.new_empty((ids.shape[0], cdiv(ids.shape[1], block), 4), dtype=torch.int32)
    segment_blocks_launch(ids, other_ids, blocks, block, other_block).run()
    return blocks
