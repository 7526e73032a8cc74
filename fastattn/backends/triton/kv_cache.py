"""Attention against a key/value cache on the Triton backend: append, split attention, combine."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastattn.integers import cdiv
from fastattn.spec import AttentionCall, AttentionSpec, KVCacheCall
from fastattn.strides import empty_in_order

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fastattn.kernels.decode_tiles import Splits
    from fastattn.kernels.tiles import Tile


def kv_cache_tiles(spec: AttentionSpec) -> str:
    """The tile a step of decoding runs with against a dense cache, or a chunk of a prompt, in a line."""
    from fastattn.kernels.decode_tiles import decode_tile_for
    from fastattn.kernels.tiles import table_tiles

    if spec.single_query:
        return f"decode {decode_tile_for(spec, spec.group_size, paged=False)}"
    return f"chunk {table_tiles(spec).forward}"


def kv_cache_fwd(spec: AttentionSpec, call: KVCacheCall, tile: Tile | None = None) -> tuple[Tensor, Tensor]:
    """(out, lse); the new keys and values are in the cache afterwards. Reads nothing back from the device."""
    from fastattn.kernels.decode_launches import append_launch
    from fastattn.kernels.decode_tiles import decode_tile_for

    if call.key is not None:
        append_launch(spec, call).run()
    if tile is None:
        tile = decode_tile_for(spec, spec.group_size * call.query.shape[2], call.block_table is not None)
    return _attend(spec, call, tile)


def is_decode_call(spec: AttentionSpec) -> bool:
    """Whether a padded call has one query per head and asks for nothing that a cache call lacks."""
    unknown = spec.mask or spec.bias or spec.segments or spec.dropout
    # a padded call counts positions from the end of the padding, a cache call from the last key
    placed = spec.alibi or spec.window_left or spec.window_right or spec.causal == "top_left"
    return spec.single_query and not unknown and not (spec.key_lengths and placed)


def single_query_fwd(spec: AttentionSpec, call: AttentionCall) -> tuple[Tensor, Tensor]:
    """(out, lse) of a padded call for which `is_decode_call`: its keys and values are a dense cache that is full."""
    from fastattn.kernels.decode_tiles import decode_tile_for

    lengths = call.query.new_empty(0, dtype=torch.int32) if call.key_lengths is None else call.key_lengths
    cached = KVCacheCall(
        call.query, call.key, call.value, lengths, alibi_slopes=call.alibi_slopes, sinks=call.sinks,
        causal=call.causal, window_left=call.window_left, window_right=call.window_right, softcap=call.softcap,
        scale=call.scale,
    )  # fmt: skip
    tile = decode_tile_for(spec, spec.group_size, paged=False)
    return _attend(spec, cached, tile)


def _attend(spec: AttentionSpec, call: KVCacheCall, tile: Tile) -> tuple[Tensor, Tensor]:
    """(out, lse) of the queries over what is in the cache."""
    from fastattn.kernels.decode_launches import decode_launch
    from fastattn.kernels.decode_tiles import WORKSPACE_BYTES, splits_for

    query = call.query
    out = empty_in_order(query, (*query.shape[:3], spec.value_dim))
    lse = query.new_empty(query.shape[:3], dtype=torch.float32)
    rows = query.shape[2] * spec.group_size
    splits = splits_for(rows, tile, blocks_seen(call, tile.block_n), call.num_splits)
    if splits.most == 1:
        decode_launch(spec, call, out, lse, splits, tile).run()
        return out, lse
    head_bytes = 4 * splits.most * rows * (spec.value_dim + 1)
    for batch, heads in batch_pieces(
        query.shape[0], call.k_cache.shape[1], WORKSPACE_BYTES // max(1, head_bytes)
    ):
        part, query_heads = call, slice(heads.start * spec.group_size, heads.stop * spec.group_size)
        if (batch.stop - batch.start, heads.stop - heads.start) != (query.shape[0], call.k_cache.shape[1]):
            part = _piece_of(call, batch, heads, query_heads)
        _attend_in_splits(spec, part, splits, tile, out[batch, query_heads], lse[batch, query_heads])
    return out, lse


def _attend_in_splits(
    spec: AttentionSpec, call: KVCacheCall, splits: Splits, tile: Tile, out: Tensor, lse: Tensor
) -> None:
    """Fill out and a contiguous lse from partial results."""
    from fastattn.kernels.decode_launches import combine_launch, decode_launch
    from fastattn.kernels.decode_tiles import loops, programs_for

    query, count = call.query, splits.most
    num_sms = 1
    if query.device.type == "cuda":
        num_sms = torch.cuda.get_device_properties(query.device).multi_processor_count
    tiles = query.shape[0] * call.k_cache.shape[1] * cdiv(query.shape[2] * spec.group_size, tile.block_m)
    several = loops(tile, full=call.cache_lengths.numel() == 0)
    programs = programs_for(several, tiles, count, keys_seen(call), num_sms)
    split_out = query.new_empty((count, *out.shape), dtype=torch.float32)
    split_lse = query.new_empty((count, *lse.shape), dtype=torch.float32)
    split_counts = query.new_empty(lse.shape, dtype=torch.int32)
    splits = splits._replace(programs=programs)
    decode_launch(spec, call, split_out, split_lse, splits, tile, split_counts).run()
    combine_launch(split_out, split_lse, split_counts, out, lse).run()


def batch_pieces(batch: int, heads: int, at_once: int) -> Iterator[tuple[slice, slice]]:
    """Sequences and key heads, at most `at_once` key heads in a piece or one, and only one sequence's if not all."""
    sequences, heads_at_once = max(1, at_once // max(1, heads)), max(1, min(heads, at_once))
    for first in range(0, batch, sequences):
        for first_head in range(0, heads, heads_at_once):
            yield (
                slice(first, min(first + sequences, batch)),
                slice(first_head, min(first_head + heads_at_once, heads)),
            )


def _piece_of(call: KVCacheCall, batch: slice, heads: slice, query_heads: slice) -> KVCacheCall:
    """The call of some sequences and key heads, and of the query heads that share these."""
    slopes, table, lengths = call.alibi_slopes, call.block_table, call.cache_lengths
    sequences = batch if table is None else slice(None)  # pages are any sequence's
    if slopes is not None:
        slopes = slopes[batch if slopes.shape[0] > 1 else slice(None), query_heads]
    return replace(
        call,
        query=call.query[batch, query_heads],
        k_cache=call.k_cache[sequences, heads],
        v_cache=call.v_cache[sequences, heads],
        cache_lengths=lengths[batch] if lengths.numel() else lengths,
        block_table=None if table is None else table[batch],
        alibi_slopes=slopes,
        sinks=None if call.sinks is None else call.sinks[query_heads],
    )


def blocks_seen(call: KVCacheCall, block_n: int) -> int:
    """The most key blocks that a query tile may see, wherever its window begins."""
    seen = keys_seen(call)
    return cdiv(min(call.capacity, seen + block_n - 1), block_n) if seen else 0


def keys_seen(call: KVCacheCall) -> int:
    """The most keys that the queries may see, however many there are now."""
    right = 0 if call.causal != "none" else call.window_right
    if call.window_left < 0 or right < 0:
        return call.capacity
    return min(call.capacity, call.window_left + call.query.shape[2] + right)
