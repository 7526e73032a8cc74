"""flash-attn's packed sequences in pages, with used lengths, or with the softmax after dropout returned."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.integrations.flash_attn_arguments import batch_integers, check_between, value_range
from fastattn.ops import arguments
from fastattn.ops.attention import attention
from fastattn.ops.errors import ArgumentError, ArgumentTypeError
from fastattn.ops.varlen import kept_by_dropout


def checked_cu_seqlens(name: str, cu_seqlens: Tensor | None, query: Tensor) -> Tensor:
    """(B + 1,) int32, where each sequence starts, and the end of the last."""
    arguments.check_tensor(name, cu_seqlens)
    assert cu_seqlens is not None
    if cu_seqlens.dtype != torch.int32:
        raise ArgumentTypeError(f"{name}: got {cu_seqlens.dtype}, needs int32")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] == 0:
        raise ArgumentError(f"{name}: got shape {arguments.shape_of(cu_seqlens)}, needs (batch + 1,)")
    arguments.check_device(name, cu_seqlens, query)
    return cu_seqlens


def used_lengths(name: str, used: Tensor, cu_seqlens: Tensor, query: Tensor) -> Tensor:
    """(B,) int32, how many of each sequence's first tokens count."""
    used = batch_integers(name, used, query, cu_seqlens.shape[0] - 1)
    check_between(name, used, cu_seqlens.diff(), "the sequences' lengths")
    return used


def cu_seqlens_with_gaps(
    cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, used_q: Tensor | None, used_k: Tensor | None
) -> tuple[Tensor, Tensor]:
    """cu_seqlens of three sequences for each one: the tokens in use; unused queries without keys; unused keys without
    queries."""
    starts_q, stops_q, starts_k = cu_seqlens_q[:-1], cu_seqlens_q[1:], cu_seqlens_k[:-1]
    middle_q = stops_q if used_q is None else starts_q + used_q
    middle_k = cu_seqlens_k[1:] if used_k is None else starts_k + used_k
    with_gaps_q = torch.stack([starts_q, middle_q, stops_q], dim=1).flatten()
    with_gaps_k = torch.stack([starts_k, middle_k, middle_k], dim=1).flatten()
    return torch.cat([with_gaps_q, cu_seqlens_q[-1:]]), torch.cat([with_gaps_k, cu_seqlens_k[-1:]])


def gathered(
    query: Tensor, k: Tensor, v: Tensor, block_table: Tensor, cu_seqlens_q: Tensor, lengths: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(keys, values, cu_seqlens_k): the tokens (Tk, Hkv, D) of every sequence out of pages (P, page, Hkv, D).

    Tk is read from the lengths (B,), which synchronises.
    """
    for name, pages in (("k", k), ("v", v)):
        if pages.dim() != 4:
            got = arguments.shape_of(pages)
            raise ArgumentError(
                f"{name}: got shape {got}, needs (blocks, page, heads, dim) with a block_table"
            )
        if torch.is_grad_enabled() and pages.requires_grad:
            raise RuntimeError(
                f"{name}: requires grad, but keys and values in pages get no gradient; use detach()"
            )
    if k.shape[:3] != v.shape[:3]:
        got, needs = arguments.shape_of(v), arguments.shape_of(k)[:3]
        raise ArgumentError(f"v: got shape {got}, needs the k's {needs} in front")
    arguments.check_tensor("block_table", block_table)
    batch, (blocks, page) = cu_seqlens_q.shape[0] - 1, k.shape[:2]
    if block_table.dim() != 2:
        got = arguments.shape_of(block_table)
        raise ArgumentError(f"block_table: got shape {got}, needs ({batch}, pages)")
    table = arguments.check_integers("block_table", block_table, (batch, block_table.shape[1]), query)
    capacity = page * table.shape[1]
    if (found := value_range(lengths)) is not None and found[1] > capacity:
        raise ArgumentError(
            f"block_table: got {table.shape[1]} pages of {page} tokens, needs {found[1]} tokens"
        )
    cu_seqlens = F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    total = int(cu_seqlens[-1])
    sequence = torch.arange(batch, device=query.device).repeat_interleave(lengths, output_size=total)
    position = torch.arange(total, device=query.device) - cu_seqlens[sequence]
    block = table[sequence, position // page]
    if (found := value_range(block)) is not None and (found[0] < 0 or found[1] >= blocks):
        raise ArgumentError(f"block_table: got values from {found[0]} to {found[1]}, needs 0 to {blocks - 1}")
    at = (block.long(), position % page)
    return k[at], v[at], cu_seqlens


def signed_softmax(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, seed: Tensor, dropout_p: float,
    every: int, longest_q: int | None, longest_k: int | None, **options: Any,
) -> Tensor:  # fmt: skip
    """(B, H, longest Sq, longest Sk), the softmax of every sequence with a minus sign on what was dropped, 0 beyond it.

    every: only sequences whose number is a multiple of it count; the others are gaps.
    """
    lengths_q, lengths_k = cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist()
    numbers = range(0, len(lengths_q), every)
    longest = [
        max((lengths[n] for n in numbers), default=0) if given is None else given
        for lengths, given in ((lengths_q, longest_q), (lengths_k, longest_k))
    ]
    heads, slopes = q.shape[1], options.pop("alibi_slopes")
    result = q.new_zeros((len(numbers), heads, *longest))
    starts_q, starts_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    with torch.no_grad():
        for b, n in enumerate(numbers):
            rows, columns = lengths_q[n], lengths_k[n]
            one = [
                t[start : start + size].transpose(0, 1)[None]
                for t, start, size in (
                    (q, starts_q[n], rows), (k, starts_k[n], columns), (v, starts_k[n], columns),
                )
            ]  # fmt: skip
            own = slopes[n] if slopes is not None and slopes.dim() == 2 else slopes
            weights = cast(
                "tuple[Tensor, ...]", attention(*one, alibi_slopes=own, return_weights=True, **options)
            )[1][0]
            kept = kept_by_dropout(seed, n, heads, rows, columns, dropout_p)
            result[b, :, :rows, :columns] = torch.where(kept, weights, -weights)
    return result
