"""flash-attn's addressing of a cache, converted to the pages and positions of `attention_kv_cache`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastattn.integrations.flash_attn_arguments import (
    batch_integers,
    check_between,
    check_int32,
    value_range,
)
from fastattn.nn.positions import rotated_at
from fastattn.ops import arguments
from fastattn.ops.errors import ArgumentError
from fastattn.ops.kv_cache import check_rotary


class Cache(NamedTuple):
    """One of flash-attn's caches as `attention_kv_cache` takes it."""

    keys: Tensor  # (B, Hkv, S, D), or pages (P, Hkv, page, D)
    values: Tensor
    block_table: Tensor | None  # (B, pages)
    lengths: Tensor  # (B,) int32, tokens of each sequence before the append, without its left padding
    copied: bool = False  # keys and values are copies, to be written back


def lengths_of(
    cache_seqlens: int | Tensor | None, q: Tensor, k_cache: Tensor, block_table: Tensor | None
) -> Tensor:
    """(B,) int32 tokens in the cache, its whole capacity where they are not given."""
    if cache_seqlens is None:
        cache_seqlens = k_cache.shape[1]
        if block_table is not None:
            arguments.check_tensor("block_table", block_table)
            cache_seqlens *= block_table.shape[-1]
    if isinstance(cache_seqlens, Tensor):
        return batch_integers("cache_seqlens", cache_seqlens, q, q.shape[0])
    check_int32("cache_seqlens", cache_seqlens)
    return torch.full((q.shape[0],), cache_seqlens, dtype=torch.int32, device=q.device)


def address(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    new_keys: int,
    cache_batch_idx: Tensor | None,
    cache_leftpad: Tensor | None,
    block_table: Tensor | None,
) -> Cache:
    """The cache of a call, from flash-attn's (B, S, Hkv, D) or (P, page, Hkv, D) caches.

    Rows selected by cache_batch_idx become pages of a row's length. With cache_leftpad each token is one page, and
    the block table begins after the padding.
    """
    keys, values = k_cache.transpose(1, 2), v_cache.transpose(1, 2)
    if cache_batch_idx is None and cache_leftpad is None:
        return Cache(keys, values, block_table, lengths)
    batch, (blocks, page) = q.shape[0], k_cache.shape[:2]
    if block_table is None:
        block_table = _rows(q, blocks, cache_batch_idx, new_keys)
    elif cache_batch_idx is not None:
        raise ArgumentError("cache_batch_idx: got a tensor besides block_table, needs one of them")
    if cache_leftpad is None:
        return Cache(keys, values, block_table, lengths)
    table = _checked_table(block_table, q, blocks)
    capacity = page * table.shape[1]
    leftpad = batch_integers("cache_leftpad", cache_leftpad, q, batch)
    check_between("cache_leftpad", leftpad, lengths, "cache_seqlens")
    if (found := value_range(lengths)) is not None and found[1] + new_keys > capacity:
        raise ArgumentError(
            f"cache_seqlens: got {found[1]}, needs at most {capacity - new_keys}: the cache holds {capacity} tokens "
            f"and {new_keys} are appended"
        )
    if k_cache.shape[:3] != v_cache.shape[:3]:
        got, needs = arguments.shape_of(v_cache), arguments.shape_of(k_cache)[:3]
        raise ArgumentError(f"v_cache: got shape {got}, needs the k_cache's {needs} in front")
    steps = torch.arange(capacity, device=q.device)
    tokens = (leftpad.long()[:, None] + steps).clamp_(max=max(capacity - 1, 0))
    table = table.long().gather(1, tokens // max(page, 1)) * page + tokens % max(page, 1)
    copied = not (_rows_are_evenly_spaced(k_cache) and _rows_are_evenly_spaced(v_cache))
    if copied:
        k_cache, v_cache = k_cache.contiguous(), v_cache.contiguous()
    keys, values = (cache.flatten(0, 1).unsqueeze(2) for cache in (k_cache, v_cache))
    return Cache(keys, values, table.to(torch.int32), lengths - leftpad, copied)


def _rows(q: Tensor, rows: int, cache_batch_idx: Tensor | None, new_keys: int) -> Tensor:
    """(B, 1): the row of the cache that each sequence has."""
    batch = q.shape[0]
    if cache_batch_idx is None:
        if rows != batch:
            raise ArgumentError(f"k_cache: got batch size {rows}, needs the q's {batch}")
        return torch.arange(batch, dtype=torch.int32, device=q.device)[:, None]
    index = batch_integers("cache_batch_idx", cache_batch_idx, q, batch)
    if (found := value_range(index)) is not None:
        if found[0] < 0 or found[1] >= rows:
            raise ArgumentError(f"cache_batch_idx: got {index.tolist()}, needs 0 to {rows - 1}")
        if new_keys and index.unique().numel() != batch:
            raise ArgumentError(
                f"cache_batch_idx: got {index.tolist()}, needs rows of their own to write k into"
            )
    return index[:, None]


def _checked_table(block_table: Tensor, q: Tensor, blocks: int) -> Tensor:
    arguments.check_tensor("block_table", block_table)
    if block_table.dim() != 2:
        raise ArgumentError(
            f"block_table: got shape {arguments.shape_of(block_table)}, needs ({q.shape[0]}, pages)"
        )
    return arguments.check_integers("block_table", block_table, (q.shape[0], block_table.shape[1]), q)


def _rows_are_evenly_spaced(cache: Tensor) -> bool:
    """Whether the tokens of all rows have one stride, so that a single index addresses each."""
    rows, tokens = cache.shape[:2]
    return rows <= 1 or tokens <= 1 or cache.stride(0) == tokens * cache.stride(1)


def rotated(
    query: Tensor,
    key: Tensor,
    lengths: Tensor,
    cos: Tensor,
    sin: Tensor | None,
    interleaved: bool,
    query_advances: bool,
) -> tuple[Tensor, Tensor]:
    """Queries (B, H, Sq, D) and new keys (B, Hkv, Sn, D), turned to the positions from `lengths` on.

    query_advances: query i stands at lengths + i; otherwise all stand at lengths.
    """
    check_rotary(cos, sin, query)
    assert sin is not None
    if key.shape[0] != query.shape[0] or key.shape[3] != query.shape[3]:
        got = arguments.shape_of(key.transpose(1, 2))
        raise ArgumentError(
            f"k: got shape {got}, needs q's batch size {query.shape[0]} and head dim {query.shape[3]}"
        )
    starts = lengths.long()[:, None]
    last = max(key.shape[2], query.shape[2] if query_advances else 1) - 1
    if (found := value_range(starts)) is not None and (found[0] < 0 or found[1] + last >= cos.shape[0]):
        needs = f"positions {found[0]} to {found[1] + last}"
        raise ArgumentError(f"rotary_cos: got {cos.shape[0]} positions, needs {needs}")
    turned = []
    for tensor, advances in ((query, query_advances), (key, True)):
        steps = torch.arange(tensor.shape[2], device=query.device)
        positions = starts + (steps if advances else torch.zeros_like(steps))
        turned.append(rotated_at(tensor, (cos, sin), positions, interleaved=interleaved))
    return turned[0], turned[1]
