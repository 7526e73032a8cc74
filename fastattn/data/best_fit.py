"""Documents packed into rows of one size by best fit, each document a segment of its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastattn.constants import IGNORE_INDEX, MAX_INT32
from fastattn.data.checks import check_integer
from fastattn.data.packing import PADDING_SEGMENT, TokenStream

Spans = npt.NDArray[np.int64]


def best_fit(lengths: npt.ArrayLike, size: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Assign pieces to rows: the longest first, each to the fullest row that has room for it, else to a new row.

    Best-fit decreasing; Ding et al. 2024, "Fewer Truncations Improve Language Modeling". The same lengths give the same
    rows. A piece costs O(size / 64).

    Args:
        lengths: (N,) of the pieces, each within [1, size].
        size: tokens of a row.

    Returns:
        The numbers of the pieces in the order of the rows, (N,), and the start of each row among them, (rows + 1,).
    """
    sizes = np.asarray(lengths, np.int64)
    size = check_integer("size", size, 1, MAX_INT32)
    if sizes.ndim != 1 or (len(sizes) and not 1 <= sizes.min() <= sizes.max() <= size):
        raise ValueError(f"lengths: needs whole numbers within [1, {size}]")
    order = np.argsort(-sizes, kind="stable")
    rows_with: list[list[int]] = [[] for _ in range(size + 1)]  # by the room that is left in them
    rooms = 0  # bit r is set where some row has room r
    row_of = np.empty(len(sizes), np.int64)
    rows = 0
    for piece, length in zip(order.tolist(), sizes[order].tolist()):
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = rows_with[room].pop()
            if not rows_with[room]:
                rooms ^= 1 << room
        else:
            room, row = size, rows
            rows += 1
        row_of[piece] = row
        if room > length:
            rows_with[room - length].append(row)
            rooms |= 1 << room - length
    placed = order[np.argsort(row_of[order], kind="stable")]
    return placed, np.searchsorted(row_of[placed], np.arange(rows + 1))


class BestFitDataset:
    """Pieces of token runs packed into rows of one size, for a causal language model that shifts the labels.

    Each item is a dict of (T,) int64 tensors: `input_ids`; `labels`, IGNORE_INDEX at the first token of every piece, at
    padding and where `counted` is False; `segment_ids`, 0, 1, ... by piece and PADDING_SEGMENT at padding. Positions
    restart with each segment and there is no attention between segments, so the loss is that of the separate pieces.

    Args:
        tokens: (N,) ids, possibly memory-mapped.
        spans: (pieces, 2) first and last token (exclusive) of each piece.
        block_size: T, at least 2.
        bos_id: the token before every piece; None for no such token.
        pad_id: the token that fills rows.
        counted: (N,) bool, the tokens that count in the loss; all by default.
        dropped: number of tokens that the caller left out of `spans`.

    Attributes:
        dropped: number of tokens in no row: the caller's, and those of pieces without a token that counts.
        padding: share of the rows that is padding.
        cut: `dropped`.
        cut_rows: the number of texts longer than a row, which the caller sets.

    Raises:
        TypeError: an argument is of another type than it needs.
        ValueError: an array has another dtype or shape, a piece is empty or longer than the block with its BOS, or no
            piece has a token that counts.
    """

    def __init__(
        self,
        tokens: npt.NDArray[Any],
        spans: Spans,
        block_size: int,
        *,
        bos_id: int | None = None,
        pad_id: int = 0,
        counted: npt.NDArray[np.bool_] | None = None,
        dropped: int = 0,
    ) -> None:
        self.block_size = check_integer("block_size", block_size, 2, MAX_INT32)
        self.pad_id = check_integer("pad_id", pad_id, 0)
        self.bos_id = None if bos_id is None else check_integer("bos_id", bos_id, 0)
        _check_array("tokens", tokens, np.integer, (None,))
        _check_array("spans", spans, np.integer, (None, 2))
        if counted is not None:
            _check_array("counted", counted, np.bool_, (len(tokens),))
        dropped = check_integer("dropped", dropped, 0)
        self.tokens, self.counted = tokens, counted
        spans = np.asarray(spans, np.int64)
        if not ((spans[:, 0] >= 0) & (spans[:, 0] < spans[:, 1]) & (spans[:, 1] <= len(tokens))).all():
            raise ValueError(f"spans: needs a first token below the last, within {len(tokens)} tokens")
        useful = self._targets(spans) > 0
        self.dropped = dropped + int((spans[~useful, 1] - spans[~useful, 0]).sum())
        self.cut, self.cut_rows = self.dropped, 0  # their names in other training sets
        self.spans = spans[useful]
        if not len(self.spans):
            raise ValueError("spans: no piece has a token that counts, needs at least one")
        lengths = self.spans[:, 1] - self.spans[:, 0] + (self.bos_id is not None)
        if lengths.max() > self.block_size:
            raise ValueError(f"spans: a piece takes {lengths.max()} tokens, rows have {self.block_size}")
        self._placed, self._begins = best_fit(lengths, self.block_size)
        self.padding = 1.0 - float(lengths.sum()) / (len(self) * self.block_size)

    @classmethod
    def of_stream(
        cls, stream: TokenStream, block_size: int, *, bos_id: int | None = None, pad_id: int = 0
    ) -> BestFitDataset:
        """The documents of a stream; documents longer than a row are divided into pieces as long as a row.

        Args:
            stream: the tokens.
            block_size, bos_id, pad_id: as for the class.

        Raises:
            TypeError: stream is not a TokenStream, or a number is not an integer.
            ValueError: block_size is below 2, an id below 0, or no piece has a token that counts.
        """
        if not isinstance(stream, TokenStream):
            raise TypeError(f"stream: got a {type(stream).__name__}, needs a TokenStream")
        room = check_integer("block_size", block_size, 2, MAX_INT32) - (bos_id is not None)
        ends = np.append(stream.starts[1:], len(stream))
        pieces = -(-(ends - stream.starts) // room)
        document = np.repeat(np.arange(len(ends)), pieces)
        number = np.arange(len(document)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
        first = stream.starts[document] + number * room
        spans = np.stack((first, np.minimum(first + room, ends[document])), 1)
        return cls(stream.tokens, spans, block_size, bos_id=bos_id, pad_id=pad_id)

    def __len__(self) -> int:
        return len(self._begins) - 1

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"index: got {index}, the dataset has {len(self)} rows")
        row = {
            "input_ids": np.full(self.block_size, self.pad_id, np.int64),
            "labels": np.full(self.block_size, IGNORE_INDEX, np.int64),
            "segment_ids": np.full(self.block_size, PADDING_SEGMENT, np.int64),
        }
        at = 0
        for segment, (ids, labels) in enumerate(self.pieces_of(index)):
            part = slice(at, at + len(ids))
            row["input_ids"][part], row["labels"][part], row["segment_ids"][part] = ids, labels, segment
            at += len(ids)
        return {name: torch.from_numpy(values) for name, values in row.items()}

    def pieces_of(self, index: int) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
        """The ids and labels of each piece of a row, with its BOS."""
        index %= len(self)
        for piece in self._placed[self._begins[index] : self._begins[index + 1]]:
            first, last = self.spans[piece]
            ids = np.asarray(self.tokens[first:last], np.int64)
            labels = ids if self.counted is None else np.where(self.counted[first:last], ids, IGNORE_INDEX)
            if self.bos_id is not None:
                ids, labels = np.append(self.bos_id, ids), np.append(IGNORE_INDEX, labels)
            else:
                labels = np.append(IGNORE_INDEX, labels[1:])
            yield ids, labels

    def num_targets(self) -> int:
        """Tokens that count in the loss over one pass."""
        return int(self._targets(self.spans).sum())

    def _targets(self, spans: Spans) -> npt.NDArray[np.int64]:
        """The number of tokens of each piece that count, without its first if there is no BOS."""
        first = spans[:, 0] + (self.bos_id is None)
        if self.counted is None:
            return np.maximum(spans[:, 1] - first, 0)
        sums = np.concatenate([np.zeros(1, np.int64), np.cumsum(self.counted, dtype=np.int64)])
        return sums[spans[:, 1]] - sums[np.minimum(first, spans[:, 1])]


def _check_array(name: str, value: Any, kind: Any, shape: tuple[int | None, ...]) -> None:
    """TypeError or ValueError unless `value` is an array of this kind and shape; None in `shape` is any size."""
    if not isinstance(value, np.ndarray):
        raise TypeError(f"{name}: got a {type(value).__name__}, needs a NumPy array")
    fits = value.ndim == len(shape) and all(n is None or n == m for n, m in zip(shape, value.shape))
    if not fits or not np.issubdtype(value.dtype, kind):
        needed = ", ".join("any" if n is None else str(n) for n in shape)
        raise ValueError(
            f"{name}: got {value.dtype} of shape {value.shape}, needs {kind.__name__} of shape ({needed})"
        )


def packed_sequences(
    sequences: Sequence[tuple[Sequence[int], Sequence[bool]]],
    block_size: int,
    *,
    pad_id: int = 0,
    dropped: int = 0,
) -> BestFitDataset:
    """A dataset of token sequences in memory, each with a flag for every token: whether it counts."""
    lengths = np.array([len(ids) for ids, _ in sequences], np.int64)
    ends = np.cumsum(lengths)
    tokens = np.concatenate([np.empty(0, np.uint32), *(np.asarray(ids, np.uint32) for ids, _ in sequences)])
    counted = np.concatenate([np.empty(0, bool), *(np.asarray(marks, bool) for _, marks in sequences)])
    spans = np.stack((ends - lengths, ends), 1)
    return BestFitDataset(tokens, spans, block_size, pad_id=pad_id, counted=counted, dropped=dropped)
