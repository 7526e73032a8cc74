"""A call in parts whose tiles can be computed: what a tile's queries see, its scores and what dropout keeps of it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from fastattn import visibility
from fastattn.backends.torch.dropout import kept_weights
from fastattn.backends.torch.schedule import Band, Segments, Tile, block_tiles, whole_tiles
from fastattn.philox import keep_scale
from fastattn.spec import AttentionCall, accumulation_dtype

FUSED_ROW_BLOCK = 64  # rows of a tile along a window, for torch's fused kernel
FUSED_DENSE_ROW_BLOCK = 128  # the fewest along a dense mask or bias, whose tiles span all keys
FUSED_DENSE_ELEMENTS = 2**22  # of a mask's tile, which sets the rows where no band bounds the columns
ROW_BLOCK, COL_BLOCK = 128, 512  # the blockwise path; never a function of the batch size


@dataclass(slots=True)  # not frozen: that doubles the time to make one, which matters for one query
class Part:
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
        """Whether a tile holds the whole call: every row and every key of every sequence."""
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
        rows, cols = ((part.start, part.stop) for part in (tile.rows, tile.cols))
        return visibility.distances(rows, cols, self.band.shift, self.query.device)

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
            same = visibility.same_segment(ids_q, ids_k)
            seen = same if seen is None else seen & same
        return seen

    def _within_band(self, tile: Tile) -> Tensor | None:
        band = self.band
        if band.covers(tile.rows, tile.cols):
            return None
        key = (len(tile.rows), len(tile.cols), tile.rows.start + band.shift - tile.cols.start)
        if not self.last_band or self.last_band[0][0] != key:
            seen = visibility.within_band(self.distance(tile), False, band.left, band.right)
            assert seen is not None  # an unbounded band covers every tile and does not come here
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
        query = grouped(rows_of(self.query, tile).to(dtype), self.key.shape[1])
        scores = (query @ cols_of(self.key, tile).to(dtype).mT).view(*self.query.shape[:2], *_shape(tile))
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

    def keep(self, tile: Tile) -> Tensor | None:
        """What dropout multiplies a tile's weights by, 0 or 1 / (1 - p), (b, H, rows, cols) in the accumulation dtype;
        None without dropout."""
        call = self.call
        if call.dropout_seed is None:
            return None
        batch, num_heads, device = call.query.shape[0], self.query.shape[1], self.query.device
        sequences = torch.arange(self.first_sequence, self.first_sequence + batch, device=device)
        heads = sequences[:, None] * num_heads + torch.arange(num_heads, device=device)
        kept = kept_weights(call.dropout_seed, self.of(heads), tile.rows, tile.cols, call.dropout_p)
        return kept.to(accumulation_dtype(self.query.dtype)).mul_(keep_scale(call.dropout_p))


def parts(call: AttentionCall, first_sequence: int = 0) -> Iterator[Part]:
    """The batch in runs of sequences that share one schedule: one run unless lengths or segments differ."""
    batch, seqlen_k = call.query.shape[0], call.key.shape[2]
    right = call.window_right if call.window_right >= 0 else None
    if call.causal != "none":
        right = 0
    band = Band(call.window_left if call.window_left >= 0 else None, right, call.position_shift)
    last_band: list[tuple[tuple[int, int, int], Tensor]] = []
    if call.key_lengths is None and call.query_segments is None:
        if batch:
            yield Part(
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
        yield Part(
            call, first_sequence, rows, call.query[rows], call.key[rows, :, :length], call.value[rows, :, :length],
            segments, band, last_band,
        )  # fmt: skip


def one_sequence(call: AttentionCall, b: int) -> AttentionCall:
    """Sequence b of a call by itself, in views of its tensors."""
    names = (
        "query",
        "key",
        "value",
        "mask",
        "bias",
        "query_segments",
        "key_segments",
        "key_lengths",
        "alibi_slopes",
    )
    given = {name: getattr(call, name) for name in names}
    batch = call.query.shape[0]
    return replace(
        call, **{n: t[b : b + 1] for n, t in given.items() if t is not None and t.shape[0] == batch}
    )


def dropped(part: Part, tile: Tile, probs: Tensor) -> Tensor:
    keep = part.keep(tile)
    return probs if keep is None else probs * keep


def rows_of(tensor: Tensor, tile: Tile) -> Tensor:
    return _along_length(tensor, tile.rows)


def cols_of(tensor: Tensor, tile: Tile) -> Tensor:
    return _along_length(tensor, tile.cols)


def _along_length(tensor: Tensor, part: range) -> Tensor:
    return tensor if len(part) == tensor.shape[2] else tensor[:, :, part.start : part.stop]


def _shape(tile: Tile) -> tuple[int, int]:
    return len(tile.rows), len(tile.cols)


def grouped(tensor: Tensor, num_kv_heads: int) -> Tensor:
    """(b, H, rows, n) -> (b, Hkv, group * rows, n): the query heads of one key head share its products."""
    batch, num_heads, rows, width = tensor.shape
    return tensor.reshape(batch, num_kv_heads, num_heads // num_kv_heads * rows, width)


def merged(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(log(exp(a) + exp(b)), exp(a) and exp(b) as shares of that sum), of infinities too; no share of a sum of 0.

    The shares are ratios of exponentials: exp(a - total) would be wrong by the rounding of a large total. Nor is total
    by torch.logaddexp, which rounds the last elements of a tensor in another way than the rest: a row's result would
    depend on the batch it is in.
    """
    largest = torch.finfo(a.dtype).max
    base = torch.maximum(a, b).clamp(-largest, largest)
    of_a, of_b = torch.exp(a - base), torch.exp(b - base)
    both = of_a + of_b
    divisor = both.masked_fill(both == 0, 1)
    return base + torch.log(both), of_a / divisor, of_b / divisor
