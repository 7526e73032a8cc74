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

from fastattn import torch_compat
from fastattn.backends.torch.dropout import scaled_keep_mask
from fastattn.integers import cdiv
from fastattn.spec import AttentionSpec, VarlenCall, accumulation_dtype
from fastattn.visibility import distances

STEP = 16  # tokens to a multiple of which sequences are padded
# Weights of sequences that run together: what stays in a core's cache. The operations of a sequence with more take
# longer than starting them.
GROUPED_ELEMENTS = 2**19

# (start, stop) of each sequence's queries and of its keys
Bounds = Sequence[tuple[tuple[int, int], tuple[int, int]]]


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


def can_run(spec: AttentionSpec) -> bool:
    """Whether scores of a call depend on queries and keys alone, and which are seen on causality alone."""
    changed = spec.alibi or spec.sinks or spec.window_left or spec.window_right or spec.softcap
    return spec.device == "cpu" and not changed


def groups(call: VarlenCall, bounds: Bounds, fewer_keys: int | None = None) -> Sequence[Group]:
    """The sequences that are short, have keys, fewer than `fewer_keys`, and of which each causal row sees one; shortest
    first."""
    return _groups(tuple(bounds), call.causal, call.query.shape[1], fewer_keys)


@lru_cache(maxsize=4)  # the layers of a model, forward and backward, are given the same sequences
def _groups(bounds: Bounds, causal: str, num_heads: int, fewer_keys: int | None) -> Sequence[Group]:
    padded: dict[tuple[int, int], list[int]] = {}
    for number, ((q_start, q_stop), (k_start, k_stop)) in enumerate(bounds):
        rows, cols = q_stop - q_start, k_stop - k_start
        unseen = causal == "bottom_right" and rows > cols
        many = fewer_keys is not None and cols >= fewer_keys
        size = (cdiv(rows, STEP) * STEP, cdiv(cols, STEP) * STEP)
        if rows and cols and not (unseen or many) and num_heads * size[0] * size[1] <= GROUPED_ELEMENTS:
            padded.setdefault(size, []).append(number)
    found = []
    with torch.inference_mode(False):
        for (rows, cols), numbers in sorted(padded.items()):
            most = max(1, GROUPED_ELEMENTS // (num_heads * rows * cols))
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
            distance = distance + torch.tensor(more)[:, None, None]
        hidden = distance < 0 if hidden is None else hidden | (distance < 0)
    return Group(numbers, of_rows, of_cols, hidden)


def _places(bounds: Sequence[tuple[int, int]], length: int) -> Places:
    edges, places = torch.tensor(bounds), torch.arange(length)
    inside = places < edges[:, 1:] - edges[:, :1]
    tokens = edges[:, :1] + places * inside
    if bool(inside.all()):
        return Places(tokens)
    flat = inside.flatten().nonzero()[:, 0]
    return Places(tokens, inside, flat, tokens.flatten()[flat])


class Operands:
    """What a group's products take, in the accumulation dtype: one matrix for each key/value head of each sequence."""

    def __init__(self, call: VarlenCall, group: Group) -> None:
        self.call, self.group = call, group
        self.count, self.num_rows = group.rows.tokens.shape
        self.num_cols = group.cols.tokens.shape[1]
        self.num_heads, self.num_kv_heads = call.query.shape[1], call.key.shape[1]
        self.dtype = accumulation_dtype(call.query.dtype)
        self.query = self.of_rows(call.query)
        self.key, self.value = (
            group.cols.padded(t, self.dtype).flatten(0, 1) for t in (call.key, call.value)
        )

    def of_rows(self, tokens: Tensor) -> Tensor:
        """(T, H, n) -> (count * Hkv, group * Sq, n)."""
        gathered = self.group.rows.padded(tokens, self.dtype)
        return gathered.view(self.count * self.num_kv_heads, -1, tokens.shape[2])

    def gradients_of_rows(self, tokens: Tensor) -> Tensor:
        """The same, and 0 in the rows beyond a sequence."""
        gathered = self.of_rows(tokens)
        if (inside := self.group.rows.inside) is not None:
            self.by_head(gathered).masked_fill_(~inside[:, None, :, None], 0)
        return gathered

    def by_head(self, matrices: Tensor) -> Tensor:
        """(count * Hkv, group * Sq, n) -> (count, H, Sq, n)."""
        return matrices.view(self.count, self.num_heads, self.num_rows, matrices.shape[2])

    def scores(self) -> Tensor:
        """(count * Hkv, group * Sq, Sk), -inf where a row does not see a key."""
        scores = product(self.query, self.key.mT).mul_(self.call.scale)
        if self.group.hidden is not None:
            self.by_head(scores).masked_fill_(self.group.hidden[:, None], -torch.inf)
        return scores

    def keep(self) -> Tensor | None:
        """What dropout multiplies weights by, 0 or 1 / (1 - p), as the scores; None without dropout."""
        call = self.call
        if call.dropout_seed is None:
            return None
        heads = torch.tensor(self.group.numbers)[:, None] * self.num_heads + torch.arange(self.num_heads)
        rows, cols = range(self.num_rows), range(self.num_cols)
        keep = scaled_keep_mask(call.dropout_seed, heads, rows, cols, call.dropout_p, self.dtype)
        return keep.view(self.count * self.num_kv_heads, -1, self.num_cols)


def product(a: Tensor, b: Tensor) -> Tensor:
    """The products of matrices; a single one is given twice, as a batch of one uses other code."""
    if a.shape[0] == 1:
        return torch.bmm(a.expand(2, -1, -1), b.expand(2, -1, -1))[:1]
    return torch.bmm(a, b)


def forward(call: VarlenCall, group: Group) -> tuple[Tensor, Tensor]:
    """(out (count, H, Sq, Dv), lse (count, H, Sq)) in the accumulation dtype; rows beyond a sequence hold anything."""
    operands = Operands(call, group)
    scores = operands.scores()
    probs = torch.softmax(scores, -1)
    lse = scores.amax(-1) - probs.amax(-1).log_()  # the largest weight is exp(0) / sum
    if (keep := operands.keep()) is not None:
        probs.mul_(keep)
    out = operands.by_head(product(probs, operands.value))
    return out, lse.view(out.shape[:3])


def backward(
    call: VarlenCall, group: Group, dout: Tensor, dlse: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq (count, H, Sq, D), dk (count, Hkv, Sk, D), dv (count, Hkv, Sk, Dv)) in the accumulation dtype, of gradients
    (T, H, Dv) and (H, T). The weights come from the scores anew, and so sum to 1."""
    operands = Operands(call, group)
    probs = torch.softmax(operands.scores(), -1)
    douts = operands.gradients_of_rows(dout)
    dprobs = product(douts, operands.value.mT)
    weights = probs
    if (keep := operands.keep()) is not None:
        weights = probs * keep
        dprobs.mul_(keep)
    dv = product(weights.mT, douts)
    dscores = torch_compat.softmax_gradient(dprobs, probs)
    if dlse is not None:
        dscores.addcmul_(probs, operands.gradients_of_rows(dlse.T[:, :, None]))
    dscores.mul_(call.scale)
    dq, dk = product(dscores, operands.key), product(dscores.mT, operands.query)
    by_key = (operands.count, operands.num_kv_heads, operands.num_cols, -1)
    return operands.by_head(dq), dk.view(by_key), dv.view(by_key)
