"""Short packed sequences: those of about one length together, as dense matrix products.

A sequence is padded to a length that follows from its own, so that its bits do not depend on the others: a batched
product gives a matrix the same bits at any place of the batch, except in a batch of one, and padding weighs nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from fastattn.backends.torch.dense import fused_bwd_min_keys
from fastattn.backends.torch.dropout import kept_weights
from fastattn.backends.torch.whole_rows import ELEMENTS, Matrices, minus_infinity, product_dtype, shared
from fastattn.integers import cdiv
from fastattn.philox import keep_scale
from fastattn.spec import AttentionCall, AttentionSpec, VarlenCall, accumulation_dtype
from fastattn.visibility import distances

STEP = 16  # tokens to a multiple of which sequences are padded
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

    def groups(self, fewer_keys: int | None = None) -> Sequence[Group]:
        """The sequences that are short, have keys, fewer than `fewer_keys`, and of which each causal row sees one;
        shortest first."""
        return _groups(tuple(self.bounds), self.call.causal, self.query.shape[1], fewer_keys)

    def keep(self, numbers: Sequence[int], rows: int, cols: int) -> Tensor | None:
        """1 for the weights of some sequences that dropout keeps, else 0, (n, H, rows, cols); None without dropout."""
        call, num_heads = self.call, self.query.shape[1]
        if call.dropout_seed is None:
            return None
        streams = [(number, 0) if self.streams is None else self.streams[number] for number in numbers]

        def drawn(sequences: Sequence[int], first: int) -> Tensor:
            heads = torch.tensor(sequences, device="cpu")[:, None] * num_heads + torch.arange(
                num_heads, device="cpu"
            )
            of_rows, of_cols = range(first, first + rows), range(first, first + cols)
            assert call.dropout_seed is not None
            return kept_weights(call.dropout_seed, heads, of_rows, of_cols, call.dropout_p)

        if all(first == 0 for _, first in streams):
            return drawn([sequence for sequence, _ in streams], 0)
        return torch.cat([drawn([sequence], first) for sequence, first in streams])


@dataclass(frozen=True)
class Places:
    """Where the tokens of some sequences are among all, each sequence padded to one length."""

    tokens: Tensor  # (n, S); beyond a sequence its first token again
    inside: Tensor | None = None  # (n, S), which are of the sequence; None = all
    flat: Tensor | None = None  # (T,), the same as places in (n * S,)
    of_flat: Tensor | None = None  # (T,), their tokens

    def padded(self, tokens: Tensor, dtype: torch.dtype) -> Tensor:
        """(T, heads, m) as (n, heads, S, m), contiguous."""
        found = tokens.index_select(0, self.tokens.flatten()).unflatten(0, self.tokens.shape).transpose(1, 2)
        return found.to(dtype, memory_format=torch.contiguous_format).contiguous()

    def put(self, padded: Tensor, tokens: Tensor) -> None:
        """Write what is of the sequences, (n, heads, S, ...), to their tokens (T, heads, ...)."""
        rows = padded.transpose(1, 2).to(tokens.dtype).flatten(0, 1)
        if self.flat is None or self.of_flat is None:
            tokens.index_copy_(0, self.tokens.flatten(), rows)
        else:
            tokens.index_copy_(0, self.of_flat, rows.index_select(0, self.flat))


@dataclass(frozen=True)
class Group:
    """Sequences that run together."""

    numbers: list[int]
    rows: Places  # of queries
    cols: Places  # of keys
    hidden: Tensor | None  # (n, Sq or 1, Sk), which keys a row does not see; None = sees all

    def finite(self, *results: Tensor) -> set[int]:
        """The numbers of the sequences whose results, (n, ...) each, are finite."""
        if math.isfinite(sum(result.sum().item() for result in results)):
            return set(self.numbers)
        by_sequence = [result.flatten(1).isfinite().all(1).tolist() for result in results]
        return {number for number, *each in zip(self.numbers, *by_sequence) if all(each)}


def fewer_keys_bwd(spec: AttentionSpec) -> int | None:
    """The number of keys of a sequence from which on a backward is torch's fused kernel's; None = it is never."""
    return None if spec.dropout else fused_bwd_min_keys(spec.dtype)


def can_run(spec: AttentionSpec) -> bool:
    """Whether scores of a call depend on queries and keys alone, and which are seen on causality alone."""
    changed = spec.alibi or spec.sinks or spec.window_left or spec.window_right or spec.softcap
    return spec.device == "cpu" and not changed


@lru_cache(maxsize=4)  # the layers of a model, forward and backward, are given the same sequences
def _groups(bounds: Bounds, causal: str, num_heads: int, fewer_keys: int | None) -> Sequence[Group]:
    padded: dict[tuple[int, int], list[int]] = {}
    for number, ((q_start, q_stop), (k_start, k_stop)) in enumerate(bounds):
        rows, cols = q_stop - q_start, k_stop - k_start
        unseen = causal == "bottom_right" and rows > cols
        many = fewer_keys is not None and cols >= fewer_keys
        size = (cdiv(rows, STEP) * STEP, cdiv(cols, STEP) * STEP)
        if rows and cols and not (unseen or many) and num_heads * size[0] * size[1] <= ELEMENTS:
            padded.setdefault(size, []).append(number)
    found = []
    with torch.inference_mode(False):
        for (rows, cols), numbers in sorted(padded.items()):
            most = max(1, ELEMENTS // (num_heads * rows * cols))
            for first in range(0, len(numbers), most):
                found.append(_group(causal, bounds, numbers[first : first + most], rows, cols))
    return found


def _group(causal: str, bounds: Bounds, numbers: list[int], rows: int, cols: int) -> Group:
    of_rows, of_cols = (
        _places([bounds[number][side] for number in numbers], n) for side, n in ((0, rows), (1, cols))
    )
    hidden = None if of_cols.inside is None else ~of_cols.inside[:, None]
    if causal != "none":
        distance = distances((0, rows), (0, cols), 0, None)[None]
        if causal == "bottom_right":
            more = [(k[1] - k[0]) - (q[1] - q[0]) for q, k in (bounds[number] for number in numbers)]
            distance = distance + torch.tensor(more, device="cpu")[:, None, None]
        hidden = distance < 0 if hidden is None else hidden | (distance < 0)
    return Group(numbers, of_rows, of_cols, hidden)


def _places(bounds: Sequence[tuple[int, int]], length: int) -> Places:
    edges, places = torch.tensor(bounds, device="cpu"), torch.arange(length, device="cpu")
    inside = places < edges[:, 1:] - edges[:, :1]
    tokens = edges[:, :1] + places * inside
    if bool(inside.all()):
        return Places(tokens)
    flat = inside.flatten().nonzero()[:, 0]
    return Places(tokens, inside, flat, tokens.flatten()[flat])


def _matrices(given: Sequences, group: Group, dtype: torch.dtype) -> Matrices:
    call = given.call
    count, num_rows = group.rows.tokens.shape
    num_heads, num_kv_heads = given.query.shape[1], given.key.shape[1]
    num_cols = group.cols.tokens.shape[1]
    key, value = (group.cols.padded(t, dtype).flatten(0, 1) for t in (given.key, given.value))
    hidden = None if group.hidden is None else minus_infinity(group.hidden, dtype)[:, None]
    keep = given.keep(group.numbers, num_rows, num_cols)
    if keep is not None:
        keep = shared("keep", keep.shape, dtype).copy_(keep).view(count * num_kv_heads, -1, num_cols)
    query = _rows(given, group, given.query, dtype)
    heads = count, num_heads
    return Matrices(query, key, value, call.scale, heads, hidden, keep, keep_scale(call.dropout_p))


def _rows(given: Sequences, group: Group, tokens: Tensor, dtype: torch.dtype) -> Tensor:
    """(T, H, n) -> (count * Hkv, group * Sq, n)."""
    gathered = group.rows.padded(tokens, dtype)
    return gathered.view(gathered.shape[0] * given.key.shape[1], -1, tokens.shape[2])


def _gradients_of_rows(given: Sequences, group: Group, tokens: Tensor, dtype: torch.dtype) -> Tensor:
    """The same, and 0 in the rows beyond a sequence."""
    gathered = _rows(given, group, tokens, dtype)
    if (inside := group.rows.inside) is not None:
        _by_head(group, given.query.shape[1], gathered).masked_fill_(~inside[:, None, :, None], 0)
    return gathered


def _by_head(group: Group, num_heads: int, matrices: Tensor) -> Tensor:
    """(count * Hkv, group * S, n) -> (count, heads, S, n)."""
    return matrices.view(len(group.numbers), num_heads, -1, matrices.shape[2])


def forward(given: Sequences, group: Group) -> tuple[Tensor, Tensor]:
    """(out (count, H, Sq, Dv), lse (count, H, Sq)) in the accumulation dtype; rows beyond a sequence hold anything."""
    out, lse = _matrices(given, group, accumulation_dtype(given.query.dtype)).forward()
    out = _by_head(group, given.query.shape[1], out)
    return out, lse.view(out.shape[:3])


def backward(
    given: Sequences, group: Group, dout: Tensor, dlse: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq (count, H, Sq, D), dk (count, Hkv, Sk, D), dv (count, Hkv, Sk, Dv)) in the dtype of the products, of
    gradients (T, H, Dv) and (H, T)."""
    dtype = product_dtype(given.query.dtype, group.rows.tokens.shape[1], dlse is not None)
    douts = _gradients_of_rows(given, group, dout, dtype)
    dlses = None if dlse is None else _gradients_of_rows(given, group, dlse.T[:, :, None], dtype)
    dq, dk, dv = _matrices(given, group, dtype).backward(douts, dlses)
    num_heads, num_kv_heads = given.query.shape[1], given.key.shape[1]
    return (
        _by_head(group, num_heads, dq), _by_head(group, num_kv_heads, dk), _by_head(group, num_kv_heads, dv),
    )  # fmt: skip
