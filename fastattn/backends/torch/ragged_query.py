"""One query per sequence that sees a range of keys of its own: lengths, segments, windows; a call for each range."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from fastattn.backends.torch import single_query
from fastattn.spec import AttentionCall, AttentionSpec, accumulation_dtype

Range = tuple[int, int]


def can_run(spec: AttentionSpec) -> bool:
    """Whether a call has one query per head that may see a range of keys; `ranges` says which do."""
    return single_query.can_run(spec.replace(segments=False) if spec.segments else spec)


def ragged_query(
    call: AttentionCall, by_tiles: Callable[[AttentionCall], tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """(out, lse) of a call that `can_run`, without its sinks; `by_tiles` gives those of sequences without a range."""
    seen = ranges(call)
    batch = len(seen)
    edges = [0, *(b for b in range(1, batch) if seen[b - 1] != seen[b] or seen[b] is None), batch]
    outs, lses = [], []
    for first, end in pairwise(edges):
        found = seen[first] if batch else (0, 0)
        if found is None:
            out, lse = by_tiles(_sequence(call, first))
        elif found[0] < found[1]:
            key, value = (_cut(t, first, end, *found) for t in (call.key, call.value))
            out, lse = single_query.single_query(call.query[first:end], key, value, call.scale)
        else:
            dtype, shape = accumulation_dtype(call.query.dtype), (end - first, call.query.shape[1], 1)
            out = call.query.new_zeros((*shape, call.value.shape[3]))
            lse = call.query.new_full(shape, -torch.inf, dtype=dtype)
        outs.append(out)
        lses.append(lse)
    return (outs[0], lses[0]) if len(outs) == 1 else (torch.cat(outs), torch.cat(lses))


def _sequence(call: AttentionCall, b: int) -> AttentionCall:
    """Sequence b by itself, without sinks."""
    one = slice(b, b + 1)
    query_segments, key_segments, key_lengths = (
        None if t is None else t[one] for t in (call.query_segments, call.key_segments, call.key_lengths)
    )
    return replace(
        call, query=call.query[one], key=call.key[one], value=call.value[one], query_segments=query_segments,
        key_segments=key_segments, key_lengths=key_lengths, sinks=None,
    )  # fmt: skip


def ranges(call: AttentionCall) -> list[Range | None]:
    """[start, stop) of the keys that each sequence's one query sees, (0, 0) for none; None if they are not a range."""
    batch, seqlen_k = call.query.shape[0], call.key.shape[2]
    position = call.position_shift
    if not seqlen_k:
        return [(0, 0)] * batch
    start = max(0, position - call.window_left) if call.window_left >= 0 else 0
    right = 0 if call.causal != "none" else call.window_right
    stop = min(seqlen_k, position + right + 1) if right >= 0 else seqlen_k
    stops = [stop] * batch if call.key_lengths is None else [min(stop, n) for n in call.key_lengths.tolist()]
    if call.query_segments is None or call.key_segments is None:
        return [(start, end) if start < end else (0, 0) for end in stops]
    of_query, of_key = call.query_segments.numpy(), call.key_segments.numpy()
    same = (of_key == of_query) & (of_query >= 0)  # (B, Sk)
    same[:, :start] = False
    if call.key_lengths is None:
        same[:, stop:] = False
    else:
        same &= np.arange(seqlen_k) < np.array(stops)[:, None]
    counts = same.sum(1)
    firsts = same.argmax(1)
    ends = seqlen_k - same[:, ::-1].argmax(1)
    return [
        (0, 0) if not count else (first, end) if end - first == count else None
        for first, end, count in zip(firsts.tolist(), ends.tolist(), counts.tolist())
    ]


def _cut(tensor: Tensor, first: int, end: int, start: int, stop: int) -> Tensor:
    """tensor[first:end, :, start:stop], as one view."""
    of_batch, of_head, of_row, of_column = tensor.stride()
    shape = (end - first, tensor.shape[1], stop - start, tensor.shape[3])
    offset = tensor.storage_offset() + first * of_batch + start * of_row
    return tensor.as_strided(shape, (of_batch, of_head, of_row, of_column), offset)
