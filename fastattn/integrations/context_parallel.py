"""Attention over a sequence that is split over processes: each has some rows of query, key and value.

Keys and values are gathered, each process attends with its own queries, and the gradients of keys and values are summed
and scattered back. `split` says who has which rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from fastattn.ops import arguments
from fastattn.ops.attention import attention as attend

Parts = Sequence[Sequence[range]]
# torch 2.13 renamed it.
_REDUCE_SCATTER = (
    "reduce_scatter_single" if hasattr(dist, "reduce_scatter_single") else "reduce_scatter_tensor"
)


def split(length: int, processes: int) -> list[tuple[range, ...]]:
    """Each process's rows of a sequence: the parts r and 2 * processes - 1 - r of 2 * processes nearly equal ones.

    Under a causal mask the later part of a pair attends to as many more keys as the earlier one to fewer, so that all
    processes have nearly the same work. Lengths need not divide; parts may be empty.

    Raises:
        ValueError: length is below 0, or processes below 1.
    """
    if length < 0:
        raise ValueError(f"length: got {length}, needs at least 0")
    if processes < 1:
        raise ValueError(f"processes: got {processes}, needs at least 1")
    count = 2 * processes
    ends = [length * i // count for i in range(count + 1)]
    parts = [range(first, last) for first, last in pairwise(ends)]
    return [(parts[r], parts[count - 1 - r]) for r in range(processes)]


def take(tensor: Tensor, rows: Sequence[range], dim: int) -> Tensor:
    """One process's rows of a whole tensor, in the order of `rows`."""
    return torch.cat([tensor.narrow(dim, part.start, len(part)) for part in rows], dim)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    parts: Parts,
    *,
    group: dist.ProcessGroup | None = None,
    causal: bool | str = True,
    window: tuple[int | None, int | None] | None = None,
    segment_ids: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """`fastattn.attention` of the whole sequence, on this process's rows of it.

    Args:
        query: (B, H, S_r, D), this process's rows in the order of its parts.
        key, value: (B, Hkv, S_r, D) and (B, Hkv, S_r, Dv), likewise.
        parts: the rows of each process, as `split` gives them; together every row once.
        group: the processes, the default group if None.
        segment_ids: (B, S_r) integers; only equal ids attend, negative ids nothing.
        causal, window, alibi_slopes, softcap, sinks, scale, return_lse, backend: as in `fastattn.attention`, of places
            in the whole sequence. Slopes need a causal mode. The gradient of slopes and sinks is this process's share:
            sum it over the group as those of other parameters.

    Returns:
        out (B, H, S_r, Dv), and lse (B, H, S_r) if asked for.

    Every process holds all keys and values of the call while it runs. (S - S_r) * B * Hkv * (D + Dv) elements come in
    for the forward pass, and as many sums of gradients are formed and scattered in the backward pass.

    Raises:
        ValueError, TypeError: an argument does not fit the parts or the group.
    """
    rank, length = _check(query, key, value, parts, group, segment_ids)
    causal = arguments.causal_mode(causal) != "none"  # the whole sequence is square, so both modes are one
    if alibi_slopes is not None and not causal:
        raise ValueError("alibi_slopes: needs causal=True or 'top_left' where the sequence is split")
    keys, values = (_Gather.apply(t, parts, rank, group) for t in (key, value))
    ids = None if segment_ids is None else _gathered(segment_ids, parts, 1, group)
    left, right = (None if side < 0 else side for side in arguments.window_bounds(window))
    results: list[Tensor] = []
    start = 0
    for part in parts[rank]:
        if not len(part):
            continue
        low = 0 if left is None else max(0, part.start - left)
        high = part.stop if causal else length if right is None else min(length, part.stop + right)
        beyond = high - part.stop  # the call takes its last query to stand at the last key
        sides = (None if left is None else left + beyond, None if right is None else right - beyond)
        rows = slice(start, start + len(part))
        options: dict[str, Any] = {}
        if ids is not None and segment_ids is not None:
            options["segment_ids"] = segment_ids[:, rows], ids[:, low:high]
        results += attend(
            query[:, :, rows], keys[:, :, low:high], values[:, :, low:high],
            causal=causal, window=None if sides == (None, None) else sides, alibi_slopes=alibi_slopes,
            softcap=softcap, sinks=sinks, scale=scale, return_lse=True, backend=backend, **options,
        )  # fmt: skip
        start += len(part)
    if not results:  # still part of the graph: the backward pass is a collective
        empty = (query.sum() + keys.sum() + values.sum()) * 0
        shape, wide = (*query.shape[:2], 0), torch.promote_types(query.dtype, torch.float32)
        results = [query.new_zeros(*shape, value.shape[3]) + empty, (query.new_zeros(shape) + empty).to(wide)]
    out = torch.cat(results[::2], 2)
    return (out, torch.cat(results[1::2], 2)) if return_lse else out


class _Gather(torch.autograd.Function):
    """All rows of a tensor (B, H, S_r, D), in the order of the whole sequence; gradients are summed over processes."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, parts: Parts, rank: int, group: dist.ProcessGroup | None) -> Tensor:
        ctx.parts, ctx.rank, ctx.group = parts, rank, group
        return _gathered(tensor, parts, 2, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (grad,) = grads
        longest = max(map(_rows, ctx.parts))
        pieces = [_padded(take(grad, rows, 2), 2, longest) for rows in ctx.parts]
        own = torch.empty_like(pieces[0])
        getattr(dist, _REDUCE_SCATTER)(own, torch.cat(pieces), group=ctx.group)
        return own.narrow(2, 0, _rows(ctx.parts[ctx.rank])).contiguous(), None, None, None


def _gathered(tensor: Tensor, parts: Parts, dim: int, group: dist.ProcessGroup | None) -> Tensor:
    """All processes' rows along `dim`, in the order of the whole sequence."""
    own = _padded(tensor, dim, max(map(_rows, parts)))
    found = [torch.empty_like(own) for _ in parts]
    dist.all_gather(found, own, group=group)
    pieces = []
    for rows, piece in zip(parts, found):
        start = 0
        for part in rows:
            pieces.append((part.start, piece.narrow(dim, start, len(part))))
            start += len(part)
    return torch.cat([piece for _, piece in sorted(pieces, key=lambda entry: entry[0])], dim)


def _padded(tensor: Tensor, dim: int, rows: int) -> Tensor:
    missing = rows - tensor.shape[dim]
    return F.pad(tensor, [0, 0] * (tensor.dim() - 1 - dim) + [0, missing]).contiguous()


def _rows(parts: Sequence[range]) -> int:
    return sum(map(len, parts))


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    parts: Parts,
    group: dist.ProcessGroup | None,
    segment_ids: Tensor | None,
) -> tuple[int, int]:
    """This process's rank in the group, and the length of the whole sequence."""
    if not dist.is_available() or not dist.is_initialized():
        raise ValueError("group: torch.distributed is not initialised, needs a process group")
    rank, world_size = dist.get_rank(group), dist.get_world_size(group)
    if len(parts) != world_size:
        raise ValueError(f"parts: got {len(parts)}, needs one for each of {world_size} processes")
    edges = sorted((part.start, part.stop) for rows in parts for part in rows if len(part))
    length = edges[-1][1] if edges else 0
    if [first for first, _ in edges] != [0, *(last for _, last in edges)][: len(edges)]:
        raise ValueError("parts: needs every row of the sequence once")
    here = _rows(parts[rank])
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.dim() != 4 or tensor.shape[2] != here:
            raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, needs (B, heads, {here}, D)")
    if segment_ids is not None and tuple(segment_ids.shape) != (query.shape[0], here):
        raise ValueError(
            f"segment_ids: got shape {tuple(segment_ids.shape)}, needs ({query.shape[0]}, {here})"
        )
    return rank, length
