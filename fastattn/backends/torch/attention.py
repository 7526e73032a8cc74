"""Attention in torch operations: torch's fused CPU kernel where it can express a tile, blockwise softmax elsewhere.

Forward and backward need O(S) memory: tiles come from `schedule`, what no query sees is never visited.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastattn import torch_compat
from fastattn.backends.torch.schedule import Band, Segments, Tile, block_tiles, whole_tiles
from fastattn.philox import keep_mask, keep_scale
from fastattn.spec import (
    AttentionCall,
    AttentionGrads,
    AttentionSpec,
    GradsNeeded,
    WeightsGradsNeeded,
    accumulation_dtype,
    empty_in_order,
)

FUSED_ROW_BLOCK = 64  # rows cut at once along a window for torch's fused kernel
FUSED_DENSE_ROW_BLOCK = 128  # and at least along a dense mask or bias, whose tiles are as wide as the keys
FUSED_DENSE_ELEMENTS = 2**20  # where nothing else bounds a row, as many rows as keep the mask's tile so small
FUSED_SHARE_BYTES = 2**21  # gradients of a tile larger than this are computed some heads at a time
FUSED_BWD_MIN_KEYS = 33  # fewer keys: dp and delta nearly cancel, so delta has to come from the same products
ROW_BLOCK, COL_BLOCK = 128, 512  # the blockwise path; never a function of the batch size
EXTREME_LSE = 1e4  # beyond it lse has no digits left for the number of keys it sums over


def tiles(spec: AttentionSpec) -> str:
    """The implementation of a tile, and its rows and columns."""
    if _fused_runs(spec):
        return f"torch's fused CPU kernel, {FUSED_ROW_BLOCK} rows at a time along a window or mask"
    return f"blockwise softmax in torch operations, {ROW_BLOCK}x{COL_BLOCK}"


def attention_fwd(spec: AttentionSpec, call: AttentionCall, first_sequence: int = 0) -> tuple[Tensor, Tensor]:
    """(out, lse) of a call whose batch starts at `first_sequence` of the dropout stream."""
    fused = _fused_runs(spec) and call.scale > 0
    run = _fused_rows if fused else _blockwise_rows
    shape = (*call.query.shape[:3], spec.value_dim)
    out: Tensor | None = None
    for part in _parts(call, first_sequence):
        for row_tiles in part.schedule(fused):
            out_rows, lse_rows = run(part, row_tiles)
            if out is None:
                if out_rows.shape == shape:  # these rows are the whole result
                    return _with_sinks(call, _in_order(out_rows, call.query), lse_rows.contiguous())
                out, lse = _nothing_seen(call, shape)
            tile = row_tiles[0]
            _rows(part.of(out), tile).copy_(out_rows)
            _rows(part.of(lse), tile).copy_(lse_rows)
    if out is None:
        out, lse = _nothing_seen(call, shape)
    return _with_sinks(call, out, lse)


def attention_bwd(
    spec: AttentionSpec,
    call: AttentionCall,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor | None,
    needs: GradsNeeded,
    first_sequence: int = 0,
) -> AttentionGrads:
    """Gradients of (out, lse), recomputed from lse tile by tile in a fixed order."""
    lse_safe, has_nan = _references(lse)
    extreme = _is_extreme(call, lse)
    forward_fused = _fused_runs(spec.replace(bias_grad=False, alibi_grad=False)) and call.scale > 0
    fused = forward_fused and not (spec.bias_grad or spec.alibi_grad or extreme or has_nan) and dlse is None
    fused = fused and not spec.single_query and call.key.shape[2] >= FUSED_BWD_MIN_KEYS
    fused = fused and torch_compat.has_cpu_flash_attention(backward=True)
    delta = None if fused and not needs.sinks else _delta(out, lse, dout, dlse)
    # lse of the fused forward came from products that round differently: where a tile holds a whole row, its weights
    # are made to sum to 1 again.
    normalise = not fused and (forward_fused or extreme)
    sink_weight = None if call.sinks is None else torch.exp(call.sinks[:, None] - lse_safe)
    sums: _Sums | None = None
    for part in _parts(call, first_sequence):
        for row_tiles in part.schedule(fused, whole_rows=extreme):
            for tile in row_tiles:
                if fused:
                    if sums is None and len(row_tiles) == 1 and part.is_whole(tile):
                        shares = _fused_tile_bwd(part, tile, out, lse_safe, dout)
                        dq, dk, dv = (
                            _in_order(g, t) for g, t in zip(shares, (call.query, call.key, call.value))
                        )
                        return AttentionGrads(dq, dk, dv, sinks=_dsinks(sink_weight, delta, needs))
                    sums = sums or _Sums(call, needs.bias, needs.alibi_slopes)
                    for kv_heads in _kv_head_chunks(part, tile):
                        shares = _fused_tile_bwd(part, tile, out, lse_safe, dout, kv_heads)
                        sums.add(part, tile, kv_heads, *shares)
                        del shares  # or they would live on beside the next ones
                else:
                    sums = sums or _Sums(call, needs.bias, needs.alibi_slopes)
                    alone = len(row_tiles) == 1
                    rows = _RowStatistics(
                        lse_safe, delta, dlse, sink_weight, alone and normalise, alone, has_nan
                    )  # fmt: skip
                    _blockwise_tile_bwd(part, tile, rows, dout, sums)
    sums = sums or _Sums(call, needs.bias, needs.alibi_slopes)
    return AttentionGrads(*sums.results(), _dsinks(sink_weight, delta, needs))


def attention_weights_fwd(spec: AttentionSpec, call: AttentionCall, lse: Tensor, mean: bool) -> Tensor:
    """keep * exp(score - lse) / (1 - p), (B, H, Sq, Sk), or its mean over heads, (B, Sq, Sk)."""
    batch, num_heads, seqlen_q, _ = call.query.shape
    shape = (batch, seqlen_q, call.key.shape[2]) if mean else (batch, num_heads, seqlen_q, call.key.shape[2])
    weights = call.query.new_zeros(shape)
    lse_safe, has_nan = _references(lse)
    extreme = _is_extreme(call, lse) and call.sinks is None
    for part in _parts(call):
        for row_tiles in part.schedule(fused=False, whole_rows=extreme):
            for tile in row_tiles:
                probs = _probs(part.scores(tile)[0], _rows(part.of(lse_safe), tile), has_nan)
                if extreme:
                    probs /= probs.sum(-1, keepdim=True).clamp_min(1e-30)
                probs = _dropped(part, tile, probs)
                part.of(weights)[..., tile.rows.start : tile.rows.stop, tile.cols.start : tile.cols.stop] = (
                    probs.mean(1) if mean else probs
                )
    return weights


def attention_weights_bwd(
    spec: AttentionSpec,
    call: AttentionCall,
    lse: Tensor,
    dweights: Tensor,
    mean: bool,
    needs: WeightsGradsNeeded,
) -> tuple[Tensor | None, ...]:
    """Gradients of the weights to query, key, lse, bias and slopes: dscore = W * dW, dlse = -rowsum(W * dW)."""
    sums = _Sums(call, needs.bias, needs.alibi_slopes)
    dlse = lse.new_zeros(lse.shape)
    lse_safe, has_nan = _references(lse)
    num_heads = call.query.shape[1]
    for part in _parts(call):
        for row_tiles in part.schedule(fused=False):
            for tile in row_tiles:
                scores, slope = part.scores(tile)
                weights = _dropped(part, tile, _probs(scores, _rows(part.of(lse_safe), tile), has_nan))
                dtile = part.of(dweights)[
                    ..., tile.rows.start : tile.rows.stop, tile.cols.start : tile.cols.stop
                ]
                dtile = (dtile[:, None] / num_heads if mean else dtile).to(weights.dtype)
                dscores = torch.where(weights != 0, weights * dtile, 0)
                _rows(part.of(dlse), tile).sub_(dscores.sum(-1))
                sums.add_scores(part, tile, dscores, slope)
    dq, dk, _, dbias, dslopes = sums.results()
    return dq, dk, dlse, dbias, dslopes


@dataclass(slots=True)  # frozen ones take twice as long to make, which a single query notices
class _Part:
    """Consecutive sequences of a batch that share one schedule; key and value end at their valid length."""

    call: AttentionCall
    first_sequence: int  # index of the call's first sequence in the dropout stream
    batch: slice
    query: Tensor  # (b, H, Sq, D)
    key: Tensor  # (b, Hkv, length, D)
    value: Tensor  # (b, Hkv, length, Dv)
    segments: Segments | None
    band: Band
    last_band: list[
        tuple[tuple[int, int, int], Tensor]
    ]  # the last tile's band mask: those of a window repeat

    def of(self, tensor: Tensor) -> Tensor:
        """This part's sequences of a tensor with a batch dimension."""
        return tensor if self.batch.stop - self.batch.start == tensor.shape[0] else tensor[self.batch]

    def is_whole(self, tile: Tile) -> bool:
        """Whether a tile is everything there is to visit: every row and every key of every sequence."""
        call = self.call
        return (self.query.shape[0], len(tile.rows), len(tile.cols)) == (
            call.query.shape[0], call.query.shape[2], call.key.shape[2],
        )  # fmt: skip

    def schedule(self, fused: bool, whole_rows: bool = False) -> Iterator[list[Tile]]:
        """The visible tiles, a list per row range; with `whole_rows` one tile holds all that a row sees."""
        len_q, len_k = self.query.shape[2], self.key.shape[2]
        if fused:
            call = self.call
            dense = call.mask is not None or call.bias is not None or call.alibi_slopes is not None
            row_block = self._dense_rows() if dense else FUSED_ROW_BLOCK
            return whole_tiles(self.band, self.segments, len_q, len_k, row_block, dense)
        col_block = max(len_k, 1) if whole_rows else COL_BLOCK
        return block_tiles(self.band, self.segments, len_q, len_k, ROW_BLOCK, col_block)

    def _dense_rows(self) -> int:
        """Rows of a tile along a dense mask, bias or slopes: every tile adds to all of dk and dv, so few are better."""
        if self.segments is not None or (self.band.left, self.band.right) != (None, None):
            return FUSED_DENSE_ROW_BLOCK
        call = self.call
        heads = [t.shape[1] for t in (call.mask, call.bias, call.alibi_slopes) if t is not None]
        return max(FUSED_DENSE_ROW_BLOCK, FUSED_DENSE_ELEMENTS // max(max(heads) * self.key.shape[2], 1))

    def cut(self, dense: Tensor, tile: Tile) -> Tensor:
        """A tile of a 4-D tensor that broadcasts to (B, H, Sq, Sk)."""
        if dense.shape[0] != 1:
            dense = self.of(dense)
        if dense.shape[2] != 1:
            dense = dense[:, :, tile.rows.start : tile.rows.stop]
        if dense.shape[3] != 1:
            dense = dense[:, :, :, tile.cols.start : tile.cols.stop]
        return dense

    def distance(self, tile: Tile) -> Tensor:
        """pos(i) - j over a tile, (rows, cols) int64."""
        device = self.query.device
        positions = torch.arange(tile.rows.start, tile.rows.stop, device=device) + self.band.shift
        return positions[:, None] - torch.arange(tile.cols.start, tile.cols.stop, device=device)

    def visible(self, tile: Tile) -> Tensor | None:
        """Which pairs of a tile attend, a bias of -inf aside: bool, broadcastable to (b, H, rows, cols); None = all."""
        call, visible = self.call, None
        if tile.structure != "full":
            visible = self._structure(tile)
        if call.mask is not None:
            mask = self.cut(call.mask, tile)
            visible = mask if visible is None else visible & mask
        return visible

    def hidden(self, tile: Tile) -> Tensor | None:
        """Which pairs of a tile do not attend: bool, broadcastable to (b, H, rows, cols); None = all do."""
        visible = self.visible(tile)
        hidden = None if visible is None else ~visible
        if self.call.bias is not None:
            of_bias = self.cut(self.call.bias, tile) == -torch.inf
            hidden = of_bias if hidden is None else hidden | of_bias
        return hidden

    def _structure(self, tile: Tile) -> Tensor | None:
        seen = self._within_band(tile)
        if self.segments is not None:
            device = self.query.device
            ids_q = torch.from_numpy(self.segments.query[tile.rows.start : tile.rows.stop]).to(device)
            ids_k = torch.from_numpy(self.segments.key[tile.cols.start : tile.cols.stop]).to(device)
            same = (ids_q[:, None] == ids_k) & (ids_q >= 0)[:, None]
            seen = same if seen is None else seen & same
        return seen

    def _within_band(self, tile: Tile) -> Tensor | None:
        band = self.band
        if band.covers(tile.rows, tile.cols):
            return None
        key = (len(tile.rows), len(tile.cols), tile.rows.start + band.shift - tile.cols.start)
        if not self.last_band or self.last_band[0][0] != key:
            distance = self.distance(tile)
            seen = torch.ones_like(distance, dtype=torch.bool)
            if band.left is not None:
                seen &= distance <= band.left
            if band.right is not None:
                seen &= distance >= -band.right
            self.last_band[:] = [(key, seen)]
        return self.last_band[0][1]

    def additive(self, tile: Tile) -> Tensor | None:
        """alibi + bias over a tile in the accumulation dtype, broadcastable to (b, H, rows, cols)."""
        call, total = self.call, None
        dtype = accumulation_dtype(self.query.dtype)
        if call.alibi_slopes is not None:
            slopes = call.alibi_slopes if call.alibi_slopes.shape[0] == 1 else self.of(call.alibi_slopes)
            total = -slopes[:, :, None, None] * self.distance(tile).abs().to(dtype)
        if call.bias is not None:
            bias = self.cut(call.bias, tile).to(dtype)
            total = bias if total is None else total + bias
        return total

    def scores(self, tile: Tile) -> tuple[Tensor, Tensor | None]:
        """Masked scores (b, H, rows, cols) in the accumulation dtype, and the softcap's derivative."""
        call, slope = self.call, None
        dtype = accumulation_dtype(self.query.dtype)
        query = _grouped(_rows(self.query, tile).to(dtype), self.key.shape[1])
        scores = (query @ _cols(self.key, tile).to(dtype).mT).view(*self.query.shape[:2], *_shape(tile))
        scores.mul_(call.scale)
        if call.softcap:
            tanh = torch.tanh_(scores.div_(call.softcap))
            slope = 1 - tanh * tanh
            scores = tanh.mul_(call.softcap)
        additive, visible = self.additive(tile), self.visible(tile)
        if additive is not None:
            scores = scores.add_(additive)
        if visible is not None:
            scores = scores.masked_fill_(~visible, -torch.inf)
        return scores, slope

    def kept(self, tile: Tile) -> Tensor | None:
        """Which weights of a tile dropout keeps, (b, H, rows, cols); None without dropout."""
        call = self.call
        if call.dropout_seed is None:
            return None
        batch, num_heads, device = call.query.shape[0], self.query.shape[1], self.query.device
        sequences = torch.arange(self.first_sequence, self.first_sequence + batch, device=device)
        heads = sequences[:, None] * num_heads + torch.arange(num_heads, device=device)
        return keep_mask(call.dropout_seed, self.of(heads), tile.rows, tile.cols, call.dropout_p)


def _nothing_seen(call: AttentionCall, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """(out, lse) of rows that see no key."""
    lse = call.query.new_full(shape[:3], -torch.inf, dtype=accumulation_dtype(call.query.dtype))
    return empty_in_order(call.query, shape).zero_(), lse


def _log_add_exp(a: Tensor, b: Tensor) -> Tensor:
    """log(exp(a) + exp(b)), of infinities too.

    torch.logaddexp rounds the last elements of a tensor in another way than the rest: a row's result would depend on
    the batch it is in.
    """
    largest = torch.finfo(a.dtype).max
    base = torch.maximum(a, b).clamp(-largest, largest)
    return base + torch.log(torch.exp(a - base) + torch.exp(b - base))


def _with_sinks(call: AttentionCall, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """(out, lse) once each head's sink joins the softmax."""
    if call.sinks is None:
        return out, lse
    total = _log_add_exp(lse, call.sinks[:, None])
    share = torch.exp(lse - total.masked_fill(total == -torch.inf, 0))  # a sink of -inf is no sink
    return out.mul_(share[..., None]), total


def _references(lse: Tensor) -> tuple[Tensor, bool]:
    """(what to subtract from scores: lse, +inf in rows that see nothing so that their weights are 0; if one is NaN)."""
    lowest = lse.min().item() if lse.numel() else 0.0  # NaN if one element is
    if lowest > -torch.inf:
        return lse, False
    return lse.masked_fill(lse == -torch.inf, torch.inf), lowest != lowest


def _probs(scores: Tensor, reference: Tensor, has_nan: bool) -> Tensor:
    """exp(score - reference) in place of the scores; 0 where a query may not look, even if its reference is NaN."""
    hidden = scores == -torch.inf if has_nan else None
    probs = scores.sub_(reference[..., None]).exp_()
    return probs if hidden is None else probs.masked_fill_(hidden, 0)


def _delta(out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None) -> Tensor:
    """rowsum(dout * out) - dlse, which dscore = p * (dp - delta) subtracts; 0 in rows that see nothing."""
    delta = (dout.to(lse.dtype) * out).sum(-1)
    if dlse is not None:
        delta -= dlse
    return delta.masked_fill_(lse == -torch.inf, 0)


def _dsinks(sink_weight: Tensor | None, delta: Tensor | None, needs: GradsNeeded) -> Tensor | None:
    if not needs.sinks or sink_weight is None or delta is None:
        return None
    terms = sink_weight * delta
    return -terms.sum((0, 2), dtype=torch.float64).to(terms.dtype)  # few results of many terms that cancel


def _is_extreme(call: AttentionCall, lse: Tensor) -> bool:
    """Whether some row's scores are so large, by its bias, that exp(score - lse) no longer gives its weights."""
    return call.bias is not None and bool(((lse.abs() > EXTREME_LSE) & lse.isfinite()).any())


def _in_order(tensor: Tensor, like: Tensor) -> Tensor:
    """`tensor` in the memory order of `like`, copied only where it has another."""
    if tensor.is_contiguous() and like.is_contiguous():
        return tensor
    wanted = empty_in_order(like, tuple(tensor.shape))
    return tensor if wanted.stride() == tensor.stride() else wanted.copy_(tensor)


class _Sums:
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

    def add(self, part: _Part, tile: Tile, kv_heads: slice, dq: Tensor, dk: Tensor, dv: Tensor) -> None:
        """Add one tile's share of the gradients of some key heads and the query heads they serve."""
        _rows(part.of(self.query)[:, _query_heads(part, kv_heads)], tile).add_(dq)
        _cols(part.of(self.key)[:, kv_heads], tile).add_(dk)
        _cols(part.of(self.value)[:, kv_heads], tile).add_(dv)

    def add_scores(self, part: _Part, tile: Tile, dscores: Tensor, slope: Tensor | None) -> None:
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
        dscores = _grouped(dscores * self.call.scale, num_kv_heads)
        query = _grouped(_rows(part.query, tile).to(dscores.dtype), num_kv_heads)
        dq = dscores @ _cols(part.key, tile).to(dscores.dtype)
        _rows(part.of(self.query), tile).add_(dq.view(_rows(part.query, tile).shape))
        _cols(part.of(self.key), tile).add_(dscores.mT @ query)

    def results(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        """The sums in their tensors' own dtypes and memory order."""
        call = self.call
        operands = ((self.query, call.query), (self.key, call.key), (self.value, call.value))
        dq, dk, dv = (total.to(t.dtype) for total, t in operands)
        bias = self.bias.to(call.bias.dtype) if self.bias is not None and call.bias is not None else None
        slopes = None if self.slopes is None else self.slopes.to(accumulation_dtype(call.query.dtype))
        return dq, dk, dv, bias, slopes


def _parts(call: AttentionCall, first_sequence: int = 0) -> Iterator[_Part]:
    """The batch in runs of sequences that share one schedule: one run unless lengths or segments differ."""
    batch, seqlen_k = call.query.shape[0], call.key.shape[2]
    right = call.window_right if call.window_right >= 0 else None
    if call.causal != "none":
        right = 0
    band = Band(call.window_left if call.window_left >= 0 else None, right, call.position_shift)
    last_band: list[tuple[tuple[int, int, int], Tensor]] = []
    if call.key_lengths is None and call.query_segments is None:
        if batch:
            yield _Part(
                call,
                first_sequence,
                slice(0, batch),
                call.query,
                call.key,
                call.value,
                None,
                band,
                last_band,
            )
        return
    lengths = [seqlen_k] * batch if call.key_lengths is None else call.key_lengths.tolist()
    ids_q = None if call.query_segments is None else call.query_segments.cpu().numpy()
    ids_k = None if call.key_segments is None else call.key_segments.cpu().numpy()

    def alike(a: int, b: int) -> bool:
        if lengths[a] != lengths[b]:
            return False
        if ids_q is None or ids_k is None:
            return True
        return bool(np.array_equal(ids_q[a], ids_q[b]) and np.array_equal(ids_k[a], ids_k[b]))

    edges = [0, *(b for b in range(1, batch) if not alike(b - 1, b)), batch] if batch else []
    for start, stop in itertools.pairwise(edges):
        rows, length = slice(start, stop), lengths[start]
        segments = None if ids_q is None or ids_k is None else Segments(ids_q[start], ids_k[start])
        yield _Part(
            call, first_sequence, rows, call.query[rows], call.key[rows, :, :length], call.value[rows, :, :length],
            segments, band, last_band,
        )  # fmt: skip


def _fused_runs(spec: AttentionSpec) -> bool:
    """Whether torch's fused CPU kernel can express the tiles of a call."""
    if not torch_compat.has_cpu_flash_attention(backward=False):
        return False
    if spec.device != "cpu" or spec.softcap or spec.dropout or spec.bias_grad or spec.alibi_grad:
        return False
    if (
        spec.head_dim != spec.value_dim or spec.head_dim % 8
    ):  # odd dims: its products round worse than the rule
        return False
    exact = spec.dtype in (torch.float32, torch.float64)  # additive terms reach the kernel in the input dtype
    return exact or not (spec.bias or spec.alibi)


def _fused_mask(part: _Part, tile: Tile) -> Tensor | None:
    """The tile's additive mask in the input dtype, or None where every pair is visible."""
    if tile.structure == "causal":
        return None
    mask, visible = part.additive(tile), part.visible(tile)
    if visible is not None:
        zero = torch.zeros((), dtype=part.query.dtype)
        mask = torch.where(visible, zero if mask is None else mask, -torch.inf)
    return mask


def _fused_rows(part: _Part, row_tiles: list[Tile]) -> tuple[Tensor, Tensor]:
    """One row range by torch's fused kernel; its at most two tiles are merged by their lse."""
    out: Tensor | None = None
    for tile in row_tiles:
        mask = _fused_mask(part, tile)
        tile_out, tile_lse = torch_compat.cpu_flash_attention(
            _rows(part.query, tile), _cols(part.key, tile), _cols(part.value, tile),
            tile.structure == "causal", mask, part.call.scale,
        )  # fmt: skip
        tile_out, tile_lse = _with_irregular_rows(part, tile, mask, tile_out, tile_lse)
        if out is None:
            out, lse = tile_out, tile_lse
        else:
            total = _log_add_exp(lse, tile_lse)
            base = total.masked_fill(total == -torch.inf, 0)[..., None]
            out = out * torch.exp(lse[..., None] - base) + tile_out * torch.exp(tile_lse[..., None] - base)
            lse = total
    assert out is not None
    return (out if out.dtype == part.query.dtype else out.to(part.query.dtype)), lse


def _with_irregular_rows(
    part: _Part, tile: Tile, mask: Tensor | None, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor]:
    """The results of torch's fused kernel on a tile, corrected in rows without a finite largest score.

    The kernel gives out 0 and lse 0 where it finds no largest score: in a row that sees nothing, one whose scores are
    all -inf and, depending on their number, one whose scores are NaN. A largest score of +inf becomes its lse. All
    other rows with a NaN have NaN in both. So a look at lse, rarely 0 otherwise, tells that there is nothing to do.
    """
    if not lse.numel():
        return out, lse
    lowest, highest = torch.aminmax(lse)  # both NaN if one element is
    most = highest.item()
    if most < torch.inf and (lowest.item() > 0 or most < 0 or bool(lse.all())):
        return out, lse
    if mask is not None:
        seen = mask.amax(-1) != -torch.inf
        out, lse = out.masked_fill(~seen[..., None], 0), lse.masked_fill(~seen, -torch.inf)
    lse = lse.masked_fill(lse == torch.inf, torch.nan)
    doubtful = (lse == 0) & (out == 0).all(-1)
    if bool(doubtful.any()):
        largest = _largest_scores(part, tile)
        lse = torch.where(doubtful & ~(largest < torch.inf), torch.nan, lse)  # +inf or NaN
        lse = torch.where(doubtful & (largest == -torch.inf), -torch.inf, lse)
    return out.masked_fill(lse.isnan()[..., None], torch.nan), lse


def _largest_scores(part: _Part, tile: Tile) -> Tensor:
    """The largest score of each row of a tile, NaN if one is NaN: (b, H, rows), in O(rows) memory."""
    found = []
    for start in range(tile.rows.start, tile.rows.stop, ROW_BLOCK):
        rows = range(start, min(start + ROW_BLOCK, tile.rows.stop))
        largest: Tensor | None = None
        for first in range(tile.cols.start, tile.cols.stop, COL_BLOCK):
            cols = range(first, min(first + COL_BLOCK, tile.cols.stop))
            of_block = part.scores(Tile(rows, cols, "masked"))[0].amax(-1)
            largest = of_block if largest is None else torch.maximum(largest, of_block)
        assert largest is not None
        found.append(largest)
    return torch.cat(found, dim=-1)


def _kv_head_chunks(part: _Part, tile: Tile) -> Iterator[slice]:
    """The key heads in runs whose shares of a tile's gradients stay small, yet give every thread a head."""
    batch, num_kv_heads = part.key.shape[:2]
    per_head = batch * max(len(tile.rows), len(tile.cols)) * part.key.shape[3] * part.key.element_size()
    chunk = max(FUSED_SHARE_BYTES // max(per_head, 1), -(-torch.get_num_threads() // max(batch, 1)))
    for start in range(0, num_kv_heads, chunk):
        yield slice(start, min(start + chunk, num_kv_heads))


def _query_heads(part: _Part, kv_heads: slice) -> slice:
    group_size = part.call.group_size
    return slice(kv_heads.start * group_size, kv_heads.stop * group_size)


def _fused_tile_bwd(
    part: _Part, tile: Tile, out: Tensor, lse_safe: Tensor, dout: Tensor, kv_heads: slice | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """A tile's share of dq, dk and dv, of some key heads and the query heads they serve, or of all."""
    kv_heads = kv_heads or slice(0, part.key.shape[1])
    heads = _query_heads(part, kv_heads)
    key, value = (_cols(t[:, kv_heads], tile) for t in (part.key, part.value))
    dout, query, out, lse_safe = (
        _rows(t[:, heads], tile) for t in (part.of(dout), part.query, part.of(out), part.of(lse_safe))
    )
    group_size = part.call.group_size
    if group_size > 1:  # the kernel sums a group over all its rows at once, which rounds worse than per head
        key, value = (t.repeat_interleave(group_size, dim=1) for t in (key, value))
    mask = _fused_mask(part, tile)
    if mask is not None and mask.dim() == 4 and mask.shape[1] > 1:
        mask = mask[:, heads]
    dq, dk, dv = torch_compat.cpu_flash_attention_backward(
        dout, query, key, value, out, lse_safe, tile.structure == "causal", mask, part.call.scale
    )  # fmt: skip
    if group_size > 1:
        dk, dv = (g.unflatten(1, (g.shape[1] // group_size, group_size)).sum(2) for g in (dk, dv))
    return dq, dk, dv


def _blockwise_rows(part: _Part, row_tiles: list[Tile]) -> tuple[Tensor, Tensor]:
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
        probs = torch.exp_(scores.sub_(base[..., None]))
        rescale = torch.exp(row_max - base)
        row_sum = row_sum * rescale + probs.sum(-1)
        values = _grouped(_dropped(part, tile, probs), part.key.shape[1]) @ _cols(part.value, tile).to(dtype)
        acc = acc.mul_(rescale[..., None]).add_(values.view(acc.shape))
        row_max = new_max
    out = acc / torch.where(row_sum == 0, 1, row_sum)[..., None]
    return out.to(part.query.dtype), row_max + torch.log(row_sum)


@dataclass(frozen=True, slots=True)
class _RowStatistics:
    """Row statistics of the blockwise backward, all (B, H, Sq)."""

    lse_safe: Tensor  # +inf in rows that see nothing
    delta: Tensor | None
    dlse: Tensor | None
    sink_weight: Tensor | None
    normalise: bool  # make the weights of each row, with its sink's, sum to 1
    alone: bool  # the tile at hand holds all that its rows see, so sums over its columns are exact
    has_nan: bool  # some row's lse is NaN


def _blockwise_tile_bwd(part: _Part, tile: Tile, rows: _RowStatistics, dout: Tensor, sums: _Sums) -> None:
    """dv += (keep p)^T dout; dscore = p * (keep dp - delta), and from it every other gradient."""
    num_kv_heads = part.key.shape[1]
    scores, slope = part.scores(tile)
    lse = _rows(part.of(rows.lse_safe), tile)
    weightless = scores == -torch.inf if rows.has_nan else None
    probs = scores.sub_(lse[..., None]).exp_()
    if rows.normalise:
        total = probs.sum(-1)
        if rows.sink_weight is not None:
            total += _rows(part.of(rows.sink_weight), tile)
        probs.div_(torch.where(total == 0, 1, total)[..., None])
    if weightless is not None:
        probs.masked_fill_(weightless, 0)
    dout_rows = _grouped(_rows(part.of(dout), tile).to(probs.dtype), num_kv_heads)
    dprobs = (dout_rows @ _cols(part.value, tile).to(probs.dtype).mT).view(probs.shape)
    keep = part.kept(tile)
    weights = probs
    if keep is not None:
        factor = keep.to(probs.dtype).mul_(keep_scale(part.call.dropout_p))
        weights, dprobs = probs * factor, dprobs.mul_(factor)
    _cols(part.of(sums.value), tile).add_(_grouped(weights, num_kv_heads).mT @ dout_rows)
    if rows.alone:  # rowsum(p * dp) of the tile itself cancels exactly where dscore is 0
        dscores = dprobs.mul_(probs)
        delta = dscores.sum(-1)
        if rows.dlse is not None:
            delta -= _rows(part.of(rows.dlse), tile)
        delta = torch.where(lse == torch.inf, 0, delta)
        dscores = dscores.addcmul_(probs, delta[..., None], value=-1)
    else:
        assert rows.delta is not None
        dscores = dprobs.sub_(_rows(part.of(rows.delta), tile)[..., None]).mul_(probs)
    if rows.has_nan and (hidden := part.hidden(tile)) is not None:
        dscores.masked_fill_(hidden, 0)  # the delta of some rows is NaN
    sums.add_scores(part, tile, dscores, slope)


def _dropped(part: _Part, tile: Tile, probs: Tensor) -> Tensor:
    keep = part.kept(tile)
    return probs if keep is None else probs * keep * keep_scale(part.call.dropout_p)


def _rows(tensor: Tensor, tile: Tile) -> Tensor:
    return _along_length(tensor, tile.rows)


def _cols(tensor: Tensor, tile: Tile) -> Tensor:
    return _along_length(tensor, tile.cols)


def _along_length(tensor: Tensor, part: range) -> Tensor:
    return tensor if len(part) == tensor.shape[2] else tensor[:, :, part.start : part.stop]


def _shape(tile: Tile) -> tuple[int, int]:
    return len(tile.rows), len(tile.cols)


def _grouped(tensor: Tensor, num_kv_heads: int) -> Tensor:
    """(b, H, rows, n) -> (b, Hkv, group * rows, n): the query heads of one key head share its products."""
    batch, num_heads, rows, width = tensor.shape
    return tensor.reshape(batch, num_kv_heads, num_heads // num_kv_heads * rows, width)
