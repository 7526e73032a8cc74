"""Attention against a key/value cache on the Triton backend: append, split attention, combine."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastattn.spec import AttentionSpec, KVCacheCall, empty_in_order, with_unit_last_stride

if TYPE_CHECKING:
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
    from fastattn.kernels.decode_launches import append_launch, combine_launch, decode_launch
    from fastattn.kernels.decode_tiles import decode_tile_for

    call = _with_plain_layouts(call)
    query = call.query
    if call.key is not None:
        append_launch(spec, call).run()
    if tile is None:
        tile = decode_tile_for(spec, spec.group_size * query.shape[2], call.block_table is not None)
    out = empty_in_order(query, (*query.shape[:3], spec.value_dim))
    lse = query.new_empty(query.shape[:3], dtype=torch.float32)
    num_splits = _num_splits(spec, call, tile)
    if num_splits == 1:
        decode_launch(spec, call, out, lse, 1, tile).run()
        return out, lse
    split_out = query.new_empty((num_splits, *out.shape), dtype=torch.float32)
    split_lse = query.new_empty((num_splits, *lse.shape), dtype=torch.float32)
    decode_launch(spec, call, split_out, split_lse, num_splits, tile).run()
    combine_launch(spec, call, split_out, split_lse, out, lse).run()
    return out, lse


def _num_splits(spec: AttentionSpec, call: KVCacheCall, tile: Tile) -> int:
    """The splits asked for, of which more than blocks there can be would be empty, or those that fit the device."""
    from fastattn.kernels.decode_tiles import splits_for

    if call.num_splits:
        return max(1, min(call.num_splits, -(-call.capacity // tile.block_n)))
    seqlen_q = call.query.shape[2]
    seen = call.capacity
    right = 0 if call.causal != "none" else call.window_right
    if call.window_left >= 0 and right >= 0:
        seen = min(seen, call.window_left + seqlen_q + right)
    num_sms = 1
    if call.query.device.type == "cuda":
        num_sms = torch.cuda.get_device_properties(call.query.device).multi_processor_count
    query_tiles = -(-seqlen_q * spec.group_size // tile.block_m)
    return splits_for(call.query.shape[0], call.k_cache.shape[1], query_tiles, seen, num_sms)


def _with_plain_layouts(call: KVCacheCall) -> KVCacheCall:
    """The call with the layouts kernels rely on; the caches stay as they are."""

    def unit(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else with_unit_last_stride(tensor)

    def contiguous(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.contiguous()

    return replace(
        call,
        query=with_unit_last_stride(call.query),
        key=unit(call.key),
        value=unit(call.value),
        cache_lengths=call.cache_lengths.contiguous(),
        block_table=unit(call.block_table),
        rotary_cos=unit(call.rotary_cos),
        rotary_sin=unit(call.rotary_sin),
        alibi_slopes=contiguous(call.alibi_slopes),
        sinks=contiguous(call.sinks),
    )
