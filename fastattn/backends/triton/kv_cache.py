"""Attention against a key/value cache on the Triton backend: append, split attention, combine."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastattn.spec import AttentionCall, AttentionSpec, KVCacheCall, empty_in_order, with_unit_last_stride

if TYPE_CHECKING:
    from fastattn.kernels.decode_tiles import KeySplits
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

    call = _with_plain_layouts(call)
    if call.key is not None:
        append_launch(spec, call).run()
    if tile is None:
        tile = decode_tile_for(spec, spec.group_size * call.query.shape[2], call.block_table is not None)
    return _attend(spec, call, _splits(spec, call, tile), tile)


def decodes(spec: AttentionSpec) -> bool:
    """Whether a padded call has one query per head and asks for nothing a cache call has not."""
    unknown = spec.mask or spec.bias or spec.segments or spec.dropout
    # positions count from the last key there is room for, in a cache from the last there is
    placed = spec.alibi or spec.window_left or spec.window_right or spec.causal == "top_left"
    return spec.single_query and not unknown and not (spec.key_lengths and placed)


def single_query_fwd(spec: AttentionSpec, call: AttentionCall) -> tuple[Tensor, Tensor]:
    """(out, lse) of a padded call that `decodes`: its keys and values are a dense cache that is full."""
    from fastattn.kernels.decode_tiles import decode_tile_for

    lengths = call.query.new_empty(0, dtype=torch.int32) if call.key_lengths is None else call.key_lengths
    cached = KVCacheCall(
        call.query, call.key, call.value, lengths, alibi_slopes=call.alibi_slopes, sinks=call.sinks,
        causal=call.causal, window_left=call.window_left, window_right=call.window_right, softcap=call.softcap,
        scale=call.scale,
    )  # fmt: skip
    tile = decode_tile_for(spec, spec.group_size, paged=False)
    return _attend(spec, cached, _splits(spec, cached, tile), tile)


def _attend(spec: AttentionSpec, call: KVCacheCall, splits: KeySplits, tile: Tile) -> tuple[Tensor, Tensor]:
    """(out, lse) of the queries over what is in the cache."""
    from fastattn.kernels.decode_launches import combine_launch, decode_launch

    query = call.query
    out = empty_in_order(query, (*query.shape[:3], spec.value_dim))
    lse = query.new_empty(query.shape[:3], dtype=torch.float32)
    num_splits = splits.count
    if num_splits == 1 and not splits.combine:
        decode_launch(spec, call, out, lse, splits, tile).run()
        return out, lse
    split_out = query.new_empty((num_splits, *out.shape), dtype=torch.float32)
    split_lse = query.new_empty((num_splits, *lse.shape), dtype=torch.float32)
    decode_launch(spec, call, split_out, split_lse, splits, tile).run()
    combine_launch(spec, call, split_out, split_lse, out, lse).run()
    return out, lse


def _splits(spec: AttentionSpec, call: KVCacheCall, tile: Tile) -> KeySplits:
    """The splits asked for, of which more than blocks there can be would be empty, or those of a fixed size."""
    from fastattn.kernels.decode_tiles import KeySplits, splits_for

    if call.num_splits:
        return KeySplits(max(1, min(call.num_splits, -(-call.capacity // tile.block_n))))
    return splits_for(spec, call.query.shape[2] * spec.group_size, _keys_seen(call), tile)


def _keys_seen(call: KVCacheCall) -> int:
    """The most keys that the queries may see, however many there are now."""
    right = 0 if call.causal != "none" else call.window_right
    if call.window_left < 0 or right < 0:
        return call.capacity
    return min(call.capacity, call.window_left + call.query.shape[2] + right)


def _with_plain_layouts(call: KVCacheCall) -> KVCacheCall:
    """The call with the layouts kernels rely on; the caches stay as they are."""
    changed: dict[str, Any] = {}
    for name in ("query", "key", "value", "block_table", "rotary_cos", "rotary_sin"):
        if (tensor := getattr(call, name)) is not None and tensor.stride(-1) != 1:
            changed[name] = with_unit_last_stride(tensor)
    for name in ("cache_lengths", "alibi_slopes", "sinks"):
        if (tensor := getattr(call, name)) is not None and not tensor.is_contiguous():
            changed[name] = tensor.contiguous()
    return replace(call, **changed) if changed else call
