"""Launches of the attention kernels: the grid, the arguments and the compiled variant of a call and its tiles.

Arguments stand in the order of the kernel's signature, a group to a line: kernels/arguments.py has the groups.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastattn.integers import cdiv
from fastattn.kernels import (
    attention_bwd,
    attention_bwd_splits,
    attention_dbias,
    attention_fwd,
    attention_lse_correction,
    attention_weights,
    segments,
    sequences,
)
from fastattn.kernels.arguments import (
    Launch,
    OptionalTensors,
    Strides,
    UpstreamTensors,
    descriptor_of,
    has_unit_columns,
    score_strides_of,
    slope_stride_of,
    strides_of,
)
from fastattn.kernels.jit import Kernel
from fastattn.kernels.splits import SPLIT_ROWS, WHOLE, Split
from fastattn.kernels.tiles import DELTA_ROWS, SEGMENT_CHUNK, SLOT_CHUNK, Tile
from fastattn.kernels.variants import AttentionVariant, folds_scale
from fastattn.philox import keep_scale, keep_threshold
from fastattn.spec import AttentionCall, AttentionSpec
from fastattn.strides import last_offset


class Packing(NamedTuple):
    """The sequences of a packed call, whose tensors hold all tokens as one (1, H, T, D) sequence."""

    cu_seqlens_q: Tensor  # (B + 1,) int32
    cu_seqlens_k: Tensor

    @property
    def batch_size(self) -> int:
        """How many sequences there are."""
        return self.cu_seqlens_q.shape[0] - 1


class UpstreamGrads(NamedTuple):
    """The gradients that the passes start from: the output's, with delta, or the weights'."""

    reference: Tensor  # (B, H, Sq) float32, from attention_delta_kernel: lse for the passes' exponents
    lse_correction: Tensor | None = None  # (B, H, Sq) float32, given with a bias
    delta: Tensor | None = None  # (B, H, Sq) float32, from attention_delta_kernel
    dout: Tensor | None = None
    dweights: Tensor | None = None  # (B, H, Sq, Sk), any strides
    dweights_factor: float = 1.0  # their multiplier

    def tensors(self) -> UpstreamTensors:
        """Those that are read for each row or weight."""
        return UpstreamTensors(self.reference, self.lse_correction, self.delta, self.dweights)

    def strides(self, unit: int) -> Strides:
        """The outer strides of dout, 0 where there is none."""
        return (0, 0, 0) if self.dout is None else strides_of(self.dout, unit)


def forward_launch(
    spec: AttentionSpec, call: AttentionCall, out: Tensor, lse: Tensor, segment_blocks: Tensor | None, tile: Tile,
    packing: Packing | None = None,
) -> Launch:  # fmt: skip
    """attention_fwd_kernel on a call."""
    query, key, value, unit = call.query, call.key, call.value, spec.unit
    q, k, v, _, tma = _operands(spec, call, tile)
    args = (
        q, k, v, out, lse, _optional_tensors(call, packing, segment_blocks, call.sinks),
        *strides_of(query, unit), *strides_of(key, unit), *strides_of(value, unit), *strides_of(out, unit),
        *_all_score_strides(call),
        *_sizes(call, packing), keep_threshold(call.dropout_p), call.scale, call.softcap, keep_scale(call.dropout_p),
        tma, _variant(spec, call, tile, packing, sinks=spec.sinks), tile.block_m, tile.block_n,
    )  # fmt: skip
    grid = (num_tiles(query, tile.block_m, packing),)
    return _launch(attention_fwd.attention_fwd_kernel, grid, args, tile)


def delta_launch(
    spec: AttentionSpec,
    call: AttentionCall,
    lse: Tensor,
    reference: Tensor,
    out: Tensor | None = None,
    dout: Tensor | None = None,
    dlse: Tensor | None = None,
    delta: Tensor | None = None,
) -> Launch:
    """attention_delta_kernel on the results of a call and their gradients, or for the reference alone."""
    batch, num_heads, seqlen_q = lse.shape
    unit, out_strides, dout_strides = 1, (0, 0, 0), (0, 0, 0)
    if out is not None and dout is not None:
        unit = spec.unit
        out_strides, dout_strides = strides_of(out, unit), strides_of(dout, unit)
    fold_scale = folds_scale(spec, call.scale, spec.sinks)
    variant = AttentionVariant(
        spec.head_dim, spec.value_dim, fold_scale=fold_scale, unit=unit, int64_offsets=spec.int64_offsets
    )
    args = (
        out, dout, lse, dlse, delta, reference,
        *out_strides, *dout_strides,
        num_heads, seqlen_q,
        variant, DELTA_ROWS,
    )  # fmt: skip
    grid = batch * num_heads * cdiv(seqlen_q, DELTA_ROWS)
    return Launch(attention_bwd.attention_delta_kernel, (grid,), args, num_warps=4, num_stages=1)


def lse_correction_launch(
    spec: AttentionSpec, call: AttentionCall, lse: Tensor, lse_correction: Tensor, tile: Tile
) -> Launch:
    """attention_lse_correction_kernel on a call."""
    query, key, unit = call.query, call.key, spec.unit
    optional = _optional_tensors(call, sinks=call.sinks)._replace(seed=None)
    args = (
        query, key, lse, lse_correction, optional,
        *strides_of(query, unit), *strides_of(key, unit),
        *_all_score_strides(call),
        *_sizes(call), call.scale, call.softcap,
        _variant(spec, call, tile, sinks=spec.sinks), tile.block_m, tile.block_n,
    )  # fmt: skip
    grid = (num_tiles(query, tile.block_m, None),)
    return _launch(attention_lse_correction.attention_lse_correction_kernel, grid, args, tile)


def dkdv_launch(
    spec: AttentionSpec,
    call: AttentionCall,
    upstream_grads: UpstreamGrads,
    dkey: Tensor,
    dvalue: Tensor | None,
    segment_blocks: Tensor | None,
    tile: Tile,
    packing: Packing | None = None,
    split: Split = WHOLE,
    first_split: int = 0,
) -> Launch:
    """attention_dkdv_kernel on a call, writing the gradients of key and value.

    With a split, dkey and dvalue are (splits, B, Hkv, Sk, D) float32 and take the splits from `first_split` on.
    """
    query, key, value, unit = call.query, call.key, call.value, spec.unit
    dvalue = dkey if dvalue is None else dvalue
    grid: tuple[int, ...] = (num_tiles(key, tile.block_n, packing),)
    if split == WHOLE:
        first_dkey, first_dvalue, split_strides = dkey, dvalue, (0, 0)
    else:
        grid += (dkey.shape[0],)
        first_dkey, first_dvalue, split_strides = dkey[0], dvalue[0], (dkey.stride(0), dvalue.stride(0))
    q, k, v, dout, tma = _operands(spec, call, tile, upstream_grads.dout)
    args = (
        q, k, v, dout, upstream_grads.tensors(), dkey, dvalue, _optional_tensors(call, packing, segment_blocks),
        *strides_of(query, unit), *strides_of(key, unit), *strides_of(value, unit), *upstream_grads.strides(unit),
        *strides_of(first_dkey, unit), *strides_of(first_dvalue, unit),
        *score_strides_of(upstream_grads.dweights), *_all_score_strides(call),
        *_sizes(call, packing), keep_threshold(call.dropout_p), call.scale, call.softcap,
        keep_scale(call.dropout_p) * upstream_grads.dweights_factor,
        first_split, *split_strides, split.heads, split.queries,
        tma, _variant(spec, call, tile, packing, upstream_grads.dweights), tile.block_m, tile.block_n,
    )  # fmt: skip
    return _launch(attention_bwd.attention_dkdv_kernel, grid, args, tile)


def sum_splits_launch(partials: Tensor, out: Tensor) -> Launch:
    """sum_splits_kernel on partials (splits, B, Hkv, Sk, D), rows one behind another, into `out` (B, Hkv, Sk, D)."""
    num_splits, batch, num_kv_heads, seqlen_k, dim = partials.shape
    args = (
        partials, out,
        partials.stride(0), *out.stride()[:3],
        num_splits, num_kv_heads, seqlen_k,
        dim, partials.stride(3), SPLIT_ROWS,
    )  # fmt: skip
    grid = batch * num_kv_heads * cdiv(seqlen_k, SPLIT_ROWS)
    return Launch(attention_bwd_splits.sum_splits_kernel, (grid,), args, num_warps=4, num_stages=1)


def dq_launch(
    spec: AttentionSpec,
    call: AttentionCall,
    upstream_grads: UpstreamGrads,
    dquery: Tensor,
    dslope_tiles: Tensor | None,
    dlse: Tensor | None,
    segment_blocks: Tensor | None,
    tile: Tile,
    packing: Packing | None = None,
) -> Launch:
    """attention_dq_kernel on a call, writing the gradients of the query and the sums over its keys: slopes and lse."""
    query, key, value, unit = call.query, call.key, call.value, spec.unit
    q, k, v, dout, tma = _operands(spec, call, tile, upstream_grads.dout)
    variant = _variant(spec, call, tile, packing, upstream_grads.dweights)
    if dslope_tiles is not None:
        variant = variant._replace(alibi_grad=True)
    args = (
        q, k, v, dout, upstream_grads.tensors(), dquery, dslope_tiles, dlse,
        _optional_tensors(call, packing, segment_blocks),
        *strides_of(query, unit), *strides_of(key, unit), *strides_of(value, unit), *upstream_grads.strides(unit),
        *strides_of(dquery, unit),
        *score_strides_of(upstream_grads.dweights), *_all_score_strides(call),
        *_sizes(call, packing), keep_threshold(call.dropout_p), call.scale, call.softcap,
        keep_scale(call.dropout_p) * upstream_grads.dweights_factor,
        tma, variant, tile.block_m, tile.block_n,
    )  # fmt: skip
    grid = (num_tiles(query, tile.block_m, packing),)
    return _launch(attention_bwd.attention_dq_kernel, grid, args, tile)


def sequence_sums_launch(
    tiles: Tensor, packing: Packing, num_tokens: int, block: int, sums: Tensor
) -> Launch:
    """sequence_sums_kernel on the numbers (H, slots) of attention_dq_kernel, one per tile of `block` queries."""
    batch_size, num_heads = sums.shape
    args = (
        tiles, packing.cu_seqlens_q, sums,
        batch_size, num_heads, num_tokens,
        block, SLOT_CHUNK,
    )  # fmt: skip
    return Launch(sequences.sequence_sums_kernel, (sums.numel(),), args, num_warps=1, num_stages=1)


def dbias_launch(
    spec: AttentionSpec, call: AttentionCall, upstream_grads: UpstreamGrads, dbias: Tensor, tile: Tile
) -> Launch:
    """attention_dbias_kernel on a call, writing the gradient of the bias in the bias's own shape, contiguous."""
    query, key, value, unit = call.query, call.key, call.value, spec.unit
    bias_batch, bias_heads, bias_rows, bias_cols = dbias.shape
    variant = _variant(spec, call, tile, None, upstream_grads.dweights)
    variant = variant._replace(bias_one_row=bias_rows == 1, bias_one_col=bias_cols == 1)
    args = (
        query, key, value, upstream_grads.dout, upstream_grads.tensors(), dbias, _optional_tensors(call),
        *strides_of(query, unit), *strides_of(key, unit), *strides_of(value, unit), *upstream_grads.strides(unit),
        *score_strides_of(upstream_grads.dweights), *_all_score_strides(call),
        bias_batch, bias_heads, bias_rows, bias_cols,
        *_sizes(call), keep_threshold(call.dropout_p), call.scale, call.softcap,
        keep_scale(call.dropout_p) * upstream_grads.dweights_factor,
        variant, tile.block_m, tile.block_n,
    )  # fmt: skip
    grid = bias_batch * bias_heads * cdiv(bias_rows, tile.block_m) * cdiv(bias_cols, tile.block_n)
    return _launch(attention_dbias.attention_dbias_kernel, (grid,), args, tile)


def weights_launch(
    spec: AttentionSpec,
    call: AttentionCall,
    lse: Tensor,
    lse_correction: Tensor | None,
    weights: Tensor,
    mean: bool,
    tile: Tile,
) -> Launch:
    """attention_weights_kernel on a call: (B, H, Sq, Sk), or (B, Sq, Sk) for the mean over heads, contiguous."""
    query, key, unit = call.query, call.key, spec.unit
    seqlen_q, seqlen_k = weights.shape[-2:]
    args = (
        query, key, lse, lse_correction, weights, _optional_tensors(call),
        *strides_of(query, unit), *strides_of(key, unit),
        *_all_score_strides(call),
        *_sizes(call), keep_threshold(call.dropout_p), call.scale, call.softcap, keep_scale(call.dropout_p),
        mean, _variant(spec, call, tile, sinks=spec.sinks), tile.block_m, tile.block_n,
    )  # fmt: skip
    batch_heads = weights.shape[:-2].numel()
    grid = batch_heads * cdiv(seqlen_q, tile.block_m) * cdiv(seqlen_k, tile.block_n)
    return _launch(attention_weights.attention_weights_kernel, (grid,), args, tile)


def segment_blocks_launch(
    ids: Tensor, other_ids: Tensor, blocks: Tensor, block: int, other_block: int
) -> Launch:
    """segment_blocks_kernel on the ids of the side that owns the tiles and of the other, both (B, S) contiguous."""
    args = (
        ids, other_ids, blocks,
        ids.shape[1], other_ids.shape[1],
        block, other_block, max(1, SEGMENT_CHUNK // other_block),
    )  # fmt: skip
    grid = blocks.shape[0] * blocks.shape[1]
    return Launch(segments.segment_blocks_kernel, (grid,), args, num_warps=4, num_stages=1)


def num_tiles(tensor: Tensor, block: int, packing: Packing | None) -> int:
    """Programs that own a tile of `block` rows of one head each; of packed tensors, slots of sequences.py."""
    batch, num_heads, length, _ = tensor.shape
    if packing is not None:
        return num_heads * (length // block + packing.batch_size + 1)
    return batch * num_heads * cdiv(length, block)


def _operands(
    spec: AttentionSpec, call: AttentionCall, tile: Tile, dout: Tensor | None = None
) -> tuple[object, object, object, object, bool]:
    """(q, k, v, dout, TMA): the tensors, or their descriptors where the tile loads by TMA and they allow it."""
    query, key, value = call.query, call.key, call.value
    if not (tile.tma and spec.fits_tma):
        return query, key, value, dout, False
    return (
        descriptor_of(query, tile.block_m),
        descriptor_of(key, tile.block_n),
        descriptor_of(value, tile.block_n),
        None if dout is None else descriptor_of(dout, tile.block_m),
        True,
    )


def _launch(kernel: Kernel, grid: tuple[int, ...], args: tuple[object, ...], tile: Tile) -> Launch:
    return Launch(kernel, grid, args, tile.num_warps, tile.num_stages, tile.max_registers)


def _optional_tensors(
    call: AttentionCall,
    packing: Packing | None = None,
    segment_blocks: Tensor | None = None,
    sinks: Tensor | None = None,
) -> OptionalTensors:
    """Those of a call, the sinks where the kernel reads them."""
    cu_seqlens_q, cu_seqlens_k = (None, None) if packing is None else packing
    return OptionalTensors(
        cu_seqlens_q,
        cu_seqlens_k,
        call.key_lengths,
        None if call.mask is None else call.mask.view(torch.uint8),
        call.bias,
        call.query_segments,
        call.key_segments,
        segment_blocks,
        call.alibi_slopes,
        sinks,
        call.dropout_seed,
    )


def _all_score_strides(call: AttentionCall) -> tuple[int, ...]:
    """Those of mask and bias, and of the slopes from sequence to sequence."""
    return *score_strides_of(call.mask), *score_strides_of(call.bias), slope_stride_of(call.alibi_slopes)


def _sizes(call: AttentionCall, packing: Packing | None = None) -> tuple[int, ...]:
    """(num_heads, batch_size, seqlen_q, seqlen_k, shift, left, right); windows are cut to the sequences, so that
    nothing overflows."""
    batch, num_heads, seqlen_q, _ = call.query.shape
    seqlen_k = call.key.shape[2]
    longest = seqlen_q + seqlen_k
    shift = call.position_shift
    if packing is not None:
        batch, shift = packing.batch_size, int(call.causal != "top_left")
    right = 0 if call.causal != "none" else call.window_right
    right = min(right, longest) if right >= 0 else longest
    return num_heads, batch, seqlen_q, seqlen_k, shift, min(call.window_left, longest), right


def _variant(
    spec: AttentionSpec,
    call: AttentionCall,
    tile: Tile,
    packing: Packing | None = None,
    dweights: Tensor | None = None,
    sinks: bool = False,
) -> AttentionVariant:
    """The variant of a kernel on a call; with `dweights`, that of the backward of the weights."""
    variant = AttentionVariant.of(
        spec,
        tile,
        spec.unit,
        fold_scale=folds_scale(spec, call.scale, spec.sinks),
        sinks=sinks,
        int64_offsets=spec.int64_offsets,
        varlen=packing is not None,
        unit_mask=has_unit_columns(call.mask),
        unit_bias=has_unit_columns(call.bias),
    )
    if dweights is None:
        return variant
    return variant._replace(
        dweights=True,
        unit_dweights=has_unit_columns(dweights),
        int64_offsets=spec.int64_offsets or last_offset(dweights) >= 2**31,
    )
