"""Padded calls whose segments are runs of tokens, as of packed documents: short runs go together as sequences."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastattn.backends.torch import short
from fastattn.spec import AttentionCall, AttentionGrads, AttentionSpec, accumulation_dtype
from fastattn.strides import empty_in_order

Forward = Callable[[AttentionCall, int], tuple[Tensor, Tensor]]
Backward = Callable[[AttentionCall, Tensor, Tensor, Tensor, "Tensor | None", int], AttentionGrads]


def can_run(spec: AttentionSpec) -> bool:
    """Whether calls have segments, and scores that depend on queries and keys alone."""
    return spec.segments and not (spec.mask or spec.bias or spec.key_lengths) and short.can_run(spec)


def attention_fwd(call: AttentionCall, first_sequence: int, alone: Forward) -> tuple[Tensor, Tensor] | None:
    """(out, lse) of a call with dropout that `can_run`; None where its segments are not runs, or one is long
    and its dropout does not count from 0.

    alone: (out, lse) of one run, a sequence of the dropout stream.
    """
    given = _sequences(call, first_sequence)
    if given is None or not _rest_can_run(given, batches := given.batches()):
        return None
    batch, num_heads, seqlen = call.query.shape[:3]
    out = empty_in_order(call.query, (batch, num_heads, seqlen, call.value.shape[3])).zero_()
    lse = call.query.new_full(out.shape[:3], -torch.inf, dtype=accumulation_dtype(out.dtype))
    outs, lses = _tokens(out), lse.new_full((batch * seqlen, num_heads), -torch.inf)
    done: set[int] = set()
    for together in batches:
        done |= short.forward(given, together, outs, lses)
    if not _rest_can_run(given, batches, done):
        return None
    _write(out, outs)
    lse.copy_(lses.view(batch, seqlen, num_heads).transpose(1, 2))
    for stream, b, place, run in _others(given, call, done):
        out[b, :, place], lse[b, :, place] = (t[0] for t in alone(run, stream))
    return out, lse


def attention_bwd(
    spec: AttentionSpec, call: AttentionCall, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None,
    first_sequence: int, alone: Backward,
) -> AttentionGrads | None:  # fmt: skip
    """The gradients of a call that `can_run`; None as in `attention_fwd`.

    alone: those of one run, of (call, out, lse, dout, dlse, its sequence of the dropout stream).
    """
    given = _sequences(call, first_sequence)
    if given is None or not _rest_can_run(given, batches := given.batches(short.fewer_keys_bwd(spec))):
        return None
    grads = [empty_in_order(t, tuple(t.shape)).zero_() for t in (call.query, call.key, call.value)]
    totals, douts = [_tokens(grad) for grad in grads], _tokens(dout)
    dlses = None if dlse is None else _tokens(dlse)
    done: set[int] = set()
    for together in batches:
        done |= short.backward(given, together, douts, dlses, totals)
    if not _rest_can_run(given, batches, done):
        return None
    for grad, total in zip(grads, totals):
        _write(grad, total)
    for stream, b, place, run in _others(given, call, done):
        rows = slice(b, b + 1), slice(None), place
        found = alone(run, out[rows], lse[rows], dout[rows], None if dlse is None else dlse[rows], stream)
        for grad, share in zip(grads, (found.query, found.key, found.value)):
            if share is not None:
                grad[rows] = share
    return AttentionGrads(*grads)


def _sequences(call: AttentionCall, first_sequence: int) -> short.Sequences | None:
    """The runs of equal segments, if queries and keys have the same and no segment has two of them."""
    query_ids, key_ids = call.query_segments, call.key_segments
    if query_ids is None or key_ids is None or query_ids.shape != key_ids.shape:
        return None
    if query_ids is not key_ids and not torch.equal(query_ids, key_ids):
        return None
    bounds, streams = [], []
    seqlen = query_ids.shape[1]
    for b, ids in enumerate(query_ids.numpy()):
        runs = _runs(ids)
        if runs is None:
            return None
        for start, stop in runs:
            place = b * seqlen + start, b * seqlen + stop
            bounds.append((place, place))
            streams.append((first_sequence + b, start))
    query, key, value = (_tokens(t) for t in (call.query, call.key, call.value))
    return short.Sequences(query, key, value, call, bounds, streams)


def _runs(ids: NDArray[np.int32]) -> list[tuple[int, int]] | None:
    """(start, stop) of the runs of equal ids >= 0; None where one has two runs."""
    edges = [0, *(np.flatnonzero(ids[1:] != ids[:-1]) + 1).tolist(), len(ids)]
    runs = [(a, b) for a, b in pairwise(edges) if b > a and ids[a] >= 0]
    return runs if len({int(ids[start]) for start, _ in runs}) == len(runs) else None


def _tokens(padded: Tensor) -> Tensor:
    """(B, H, S, ...) as (B * S, H, ...), a view where heads lie behind tokens."""
    return padded.transpose(1, 2).flatten(0, 1)


def _write(padded: Tensor, tokens: Tensor) -> None:
    """Write (B * S, H, n) to (B, H, S, n), unless they are the same memory."""
    if tokens.data_ptr() != padded.data_ptr():
        padded.copy_(tokens.view(padded.shape[0], padded.shape[2], *tokens.shape[1:]).transpose(1, 2))


def _rest_can_run(
    given: short.Sequences, batches: Sequence[short.Batch], done: set[int] | None = None
) -> bool:
    """Whether every run that is in no batch, or not `done`, can run alone: its dropout must count from 0."""
    if not given.call.dropout_p or given.streams is None:
        return True
    if done is None:
        done = {run for batch in batches for run in batch.numbers}
    return all(run in done or first == 0 for run, (_, first) in enumerate(given.streams))


def _others(
    given: short.Sequences, call: AttentionCall, done: set[int]
) -> Iterator[tuple[int, int, slice, AttentionCall]]:
    """(sequence of the dropout stream, b, place, call by itself) of every run that is not done."""
    assert given.streams is not None
    seqlen = call.query.shape[2]
    for run, (((start, stop), _), (stream, _)) in enumerate(zip(given.bounds, given.streams)):
        if run in done:
            continue
        b, offset = divmod(start, seqlen)
        place = slice(offset, offset + stop - start)
        query, key, value = (t[b : b + 1, :, place] for t in (call.query, call.key, call.value))
        alone = replace(call, query=query, key=key, value=value, query_segments=None, key_segments=None)
        yield stream, b, place, alone
