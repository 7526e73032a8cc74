"""Short packed sequences: those of about one length together, as dense matrix products.

A sequence is padded to a length that follows from its own, so that its bits do not depend on the others: a batched
product gives a matrix the same bits at any place of the batch, except in a batch of one, and padding weighs nothing.
Starting an operation takes as long as a product of a few tokens, so tokens are gathered and results put back for many
sequences at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from fastattn.backends.torch.dense import fused_bwd_min_keys
from fastattn.backends.torch.dropout import Grid, kept_weights_of
from fastattn.backends.torch.memory import shared
from fastattn.backends.torch.whole_rows import ELEMENTS, Matrices, minus_infinity, product_dtype
from fastattn.integers import cdiv
from fastattn.philox import keep_scale
from fastattn.spec import AttentionCall, AttentionSpec, VarlenCall, accumulation_dtype
from fastattn.visibility import distances

STEP = 16  # tokens to a multiple of which sequences are padded
BATCH_ROWS = 2**13  # of queries, of all heads, that are gathered at a time: operands of a few megabytes
# (start, stop) of each sequence's queries and of its keys
Bounds = Sequence[tuple[tuple[int, int], tuple[int, int]]]


@dataclass(frozen=True)
class Sequences:
    """Tokens in any order of sequences, each of which attends to itself or to one other.

    Args:
        query, key, value: (T, H, D), (Tk, Hkv, D) and (Tk, Hkv, Dv).
        call: of which they are, for the options.
        bounds: of each sequence.
        streams: of each, the sequence of the dropout stream that it is part of, and its first position there; None =
            its number, and 0.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    call: VarlenCall | AttentionCall
    bounds: Bounds
    streams: Sequence[tuple[int, int]] | None = None

    @classmethod
    def of(cls, call: VarlenCall, bounds: Bounds) -> Sequences:
        """Those of a packed call."""
        return cls(call.query, call.key, call.value, call, bounds)

    def batches(self, fewer_keys: int | None = None) -> Sequence[Batch]:
        """The sequences that are short, have keys, fewer than `fewer_keys`, and of which each causal row sees one;
        shortest first."""
        heads = self.query.shape[1], self.key.shape[1]
        return _batches(tuple(self.bounds), self.call.causal, heads, fewer_keys)

    def keep(self, groups: Sequence[Group]) -> Sequence[Tensor | None]:
        """For each group 1 for the weights that dropout keeps, else 0, (n, H, rows, cols); None without dropout."""
        call, num_heads = self.call, self.query.shape[1]
        if call.dropout_seed is None:
            return [None] * len(groups)
        grids = []
        for group in groups:
            # those that start their stream are one grid of counters
            streams = [(n, 0) if self.streams is None else self.streams[n] for n in group.numbers]
            together = all(first == 0 for _, first in streams)
            for some, first in [(streams, 0)] if together else [([each], each[1]) for each in streams]:
                sequences = torch.tensor([sequence for sequence, _ in some], device="cpu")
                heads = sequences[:, None] * num_heads + torch.arange(num_heads, device="cpu")
                grids.append(
                    Grid(heads, range(first, first + group.num_rows), range(first, first + group.num_cols))
                )
        drawn = iter(kept_weights_of(call.dropout_seed, grids, call.dropout_p))
        found = []
        for group in groups:
            parts = [next(drawn)]
            while sum(map(len, parts)) < len(group.numbers):
                parts.append(next(drawn))
            found.append(torch.cat(parts) if len(parts) > 1 else parts[0])
        return found


@dataclass(frozen=True)
class Places:
    """Where the rows of some groups are among tokens: a group's are those of its sequences, padded to one length, head
    after head of sequence after sequence."""

    heads: int
    rows: Tensor  # (R,), token * heads + head of each row; beyond a sequence of its first token again
    outside: Tensor | None  # (R, 1), which are beyond a sequence; None = none
    tokens: Tensor  # (T,), the tokens that have rows, ascending
    of_tokens: Tensor  # (T * heads,), their rows

    def gathered(self, tokens: Tensor, dtype: torch.dtype, name: str) -> Tensor:
        """(tokens, heads, n) as (R, n), in memory of `shared` where they are of a usual size."""
        rows = tokens.reshape(-1, tokens.shape[2])
        shape = len(self.rows), tokens.shape[2]
        if shape[0] * shape[1] > ELEMENTS:
            return rows.index_select(0, self.rows).to(dtype)
        memory = shared(name, shape, dtype)
        if rows.dtype == dtype:
            return torch.index_select(rows, 0, self.rows, out=memory)
        return memory.copy_(rows.index_select(0, self.rows))

    def put(self, rows: Tensor, tokens: Tensor) -> None:
        """Write (R, ...) to (tokens, heads, ...)."""
        given = rows.index_select(0, self.of_tokens).to(tokens.dtype).unflatten(0, (-1, self.heads))
        if len(given) == len(tokens):
            tokens.copy_(given)
        else:
            tokens.index_copy_(0, self.tokens, given)


@dataclass(frozen=True)
class Group:
    """Sequences that run together."""

    numbers: list[int]
    num_rows: int  # of queries of each, as padded
    num_cols: int  # of keys
    at_rows: slice  # of its queries among those of the batch, of all heads
    at_cols: slice
    hidden: Tensor | None  # (n, Sq or 1, Sk), which keys a row does not see; None = sees all

    def finite(self, of_rows: Sequence[Tensor], of_cols: Sequence[Tensor] = ()) -> set[int]:
        """The numbers of the sequences whose results are finite, of those of the batch, (R, ...) each."""
        results = [r[self.at_rows] for r in of_rows] + [r[self.at_cols] for r in of_cols]
        by_sequence = [r.view(len(self.numbers), -1).isfinite().all(1).tolist() for r in results]
        return {number for number, *each in zip(self.numbers, *by_sequence) if all(each)}


@dataclass(frozen=True)
class Batch:
    """Groups whose tokens are gathered together."""

    groups: list[Group]
    rows: Places  # of queries
    cols: Places  # of keys

    @property
    def numbers(self) -> set[int]:
        """Of their sequences."""
        return {number for group in self.groups for number in group.numbers}

    def finite(self, of_rows: Sequence[Tensor], of_cols: Sequence[Tensor] = ()) -> set[int]:
        """The numbers of the sequences whose results, (R, ...) each, are finite."""
        if math.isfinite(sum(result.sum().item() for result in (*of_rows, *of_cols))):
            return self.numbers
        return {number for group in self.groups for number in group.finite(of_rows, of_cols)}


def fewer_keys_bwd(spec: AttentionSpec) -> int | None:
    """The number of keys of a sequence from which on a backward is torch's fused kernel's; None = it is never."""
    return None if spec.dropout else fused_bwd_min_keys(spec.dtype)


def can_run(spec: AttentionSpec) -> bool:
    """Whether scores of a call depend on queries and keys alone, and which are seen on causality alone."""
    changed = spec.alibi or spec.sinks or spec.window_left or spec.window_right or spec.softcap
    return spec.device == "cpu" and not changed


@lru_cache(maxsize=4)  # the layers of a model, forward and backward, are given the same sequences
def _batches(bounds: Bounds, causal: str, heads: tuple[int, int], fewer_keys: int | None) -> Sequence[Batch]:
    padded: dict[tuple[int, int], list[int]] = {}
    for number, ((q_start, q_stop), (k_start, k_stop)) in enumerate(bounds):
        rows, cols = q_stop - q_start, k_stop - k_start
        unseen = causal == "bottom_right" and rows > cols
        many = fewer_keys is not None and cols >= fewer_keys
        size = (cdiv(rows, STEP) * STEP, cdiv(cols, STEP) * STEP)
        if rows and cols and not (unseen or many) and heads[0] * size[0] * size[1] <= ELEMENTS:
            padded.setdefault(size, []).append(number)
    batches: list[list[tuple[int, int, list[int]]]] = []
    room = 0
    for (rows, cols), numbers in sorted(padded.items()):
        most = max(1, ELEMENTS // (heads[0] * rows * cols))
        for first in range(0, len(numbers), most):
            some = numbers[first : first + most]
            taken = len(some) * heads[0] * rows
            if taken > room:
                batches.append([])
                room = BATCH_ROWS
            batches[-1].append((rows, cols, some))
            room -= taken
    with torch.inference_mode(False):
        return [_batch(bounds, causal, heads, groups) for groups in batches]


def _batch(
    bounds: Bounds, causal: str, heads: tuple[int, int], padded: Sequence[tuple[int, int, list[int]]]
) -> Batch:
    """The batch of groups of (rows, cols, numbers of the sequences)."""
    groups = []
    of_rows: list[tuple[Tensor, Tensor]] = []
    of_cols: list[tuple[Tensor, Tensor]] = []
    row = col = 0
    for rows, cols, numbers in padded:
        of_rows.append(_padded([bounds[number][0] for number in numbers], rows))
        of_cols.append(_padded([bounds[number][1] for number in numbers], cols))
        next_row, next_col = (at + len(numbers) * h * n for at, h, n in zip((row, col), heads, (rows, cols)))
        hidden = _hidden(causal, [bounds[number] for number in numbers], of_cols[-1][1], rows)
        groups.append(Group(numbers, rows, cols, slice(row, next_row), slice(col, next_col), hidden))
        row, col = next_row, next_col
    return Batch(groups, _places(of_rows, heads[0]), _places(of_cols, heads[1]))


def _padded(bounds: Sequence[tuple[int, int]], length: int) -> tuple[Tensor, Tensor]:
    """The tokens of sequences, (n, length), beyond a sequence its first one again, and which are of the sequence."""
    edges, places = torch.tensor(bounds, device="cpu"), torch.arange(length, device="cpu")
    inside = places < edges[:, 1:] - edges[:, :1]
    return edges[:, :1] + places * inside, inside


def _places(padded: Sequence[tuple[Tensor, Tensor]], heads: int) -> Places:
    of_heads = torch.arange(heads, device="cpu")[:, None]
    rows = torch.cat([(tokens[:, None] * heads + of_heads).flatten() for tokens, _ in padded])
    inside = torch.cat([each[:, None].expand(-1, heads, -1).flatten() for _, each in padded])
    real = inside.nonzero()[:, 0]
    order = rows[real].argsort()
    tokens = rows[real][order][::heads] // heads
    return Places(heads, rows, None if bool(inside.all()) else ~inside[:, None], tokens, real[order])


def _hidden(causal: str, bounds: Bounds, inside: Tensor, rows: int) -> Tensor | None:
    """Which keys (n, Sk), those that are not `inside` among them, rows do not see: (n, Sq or 1, Sk)."""
    hidden = None if bool(inside.all()) else ~inside[:, None]
    if causal != "none":
        distance = distances((0, rows), (0, inside.shape[1]), 0, None)[None]
        if causal == "bottom_right":
            more = [(k[1] - k[0]) - (q[1] - q[0]) for q, k in bounds]
            distance = distance + torch.tensor(more, device="cpu")[:, None, None]
        hidden = distance < 0 if hidden is None else hidden | (distance < 0)
    return hidden


def forward(given: Sequences, batch: Batch, out: Tensor, lse: Tensor) -> set[int]:
    """Write out (T, H, Dv) and lse (T, H) of a batch's tokens; the numbers of the sequences where they are finite."""
    dtype = accumulation_dtype(given.query.dtype)
    outs, lses = [], []
    for _, matrices in _matrices(given, batch, dtype):
        of_rows, lse_of_rows = matrices.forward()
        outs.append(of_rows.flatten(0, 1))
        lses.append(lse_of_rows.flatten())
    results = _joined(outs), _joined(lses)
    batch.rows.put(results[0], out)
    batch.rows.put(results[1], lse)
    return batch.finite(results)


def backward(
    given: Sequences, batch: Batch, dout: Tensor, dlse: Tensor | None, grads: Sequence[Tensor]
) -> set[int]:
    """Write the gradients of query, key and value of a batch's tokens, (T, heads, n) each; the numbers of the sequences
    where they are finite.

    dout (T, H, Dv), dlse (T, H).
    """
    dtype = product_dtype(given.query.dtype, STEP, dlse is not None)
    upstream = [dout] if dlse is None else [dout, dlse[:, :, None]]
    of_rows = [batch.rows.gathered(t, dtype, f"upstream {n}") for n, t in enumerate(upstream)]
    if (outside := batch.rows.outside) is not None:
        for each in of_rows:
            each.masked_fill_(outside, 0)
    found = []
    for group, matrices in _matrices(given, batch, dtype):
        douts, *dlses = (_of_heads(given, group, each) for each in of_rows)
        found.append([grad.flatten(0, 1) for grad in matrices.backward(douts, dlses[0] if dlses else None)])
    dq, dk, dv = (_joined(each) for each in zip(*found))
    for places, grad, total in zip((batch.rows, batch.cols, batch.cols), (dq, dk, dv), grads):
        places.put(grad, total)
    return batch.finite([dq], [dk, dv])


def _matrices(given: Sequences, batch: Batch, dtype: torch.dtype) -> Iterator[tuple[Group, Matrices]]:
    """What the products of each group take; the dropout of one is in memory that the next uses again."""
    call, num_heads = given.call, given.query.shape[1]
    query = batch.rows.gathered(given.query, dtype, "query")
    key, value = (
        batch.cols.gathered(t, dtype, name) for t, name in ((given.key, "key"), (given.value, "value"))
    )
    for group, keep in zip(batch.groups, given.keep(batch.groups)):
        count = len(group.numbers)
        hidden = None if group.hidden is None else minus_infinity(group.hidden, dtype)[:, None]
        if keep is not None:
            keep = shared("keep", keep.shape, dtype).copy_(keep)
            keep = keep.view(count * given.key.shape[1], -1, group.num_cols)
        keys, values = (t[group.at_cols].view(-1, group.num_cols, t.shape[1]) for t in (key, value))
        yield group, Matrices(
            _of_heads(given, group, query), keys, values, call.scale, (count, num_heads), hidden, keep,
            keep_scale(call.dropout_p),
        )  # fmt: skip


def _of_heads(given: Sequences, group: Group, rows: Tensor) -> Tensor:
    """A group's rows of a batch's (R, n), those of a key/value head together: (count * Hkv, H / Hkv * Sq, n)."""
    return rows[group.at_rows].view(len(group.numbers) * given.key.shape[1], -1, rows.shape[1])


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))
