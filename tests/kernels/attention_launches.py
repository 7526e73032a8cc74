"""Every kernel launch a call leads to, for checks that compile or specialise them without running."""

from __future__ import annotations

import torch

from fastattn.kernels import launches
from fastattn.kernels.splits import split_of
from fastattn.kernels.tiles import Tile, Tiles
from fastattn.spec import AttentionCall, AttentionSpec, GradsNeeded


def launches_of(
    call: AttentionCall, tiles: Tile | Tiles, packing: launches.Packing | None = None
) -> dict[str, launches.Launch]:
    """The launches of forward and backward by name; those of bias, weights and segments where they apply."""
    if isinstance(tiles, Tile):
        tiles = Tiles(tiles, tiles, tiles, tiles)
    query, key, value = call.query, call.key, call.value
    needs = GradsNeeded(bias=call.bias is not None, alibi_slopes=call.alibi_slopes is not None)
    forward, backward = AttentionSpec.of(call), AttentionSpec.of(call, needs)
    out = query.new_empty(*query.shape[:3], value.shape[3])
    lse = query.new_empty(query.shape[:3], dtype=torch.float32)
    blocks = None
    if call.query_segments is not None:
        blocks = torch.empty(query.shape[0], 4, 4, dtype=torch.int32)
    slope_sums = lse if needs.alibi_slopes else None
    lse_correction = None if call.bias is None else lse
    upstream_grads = launches.UpstreamGrads(lse, lse_correction, lse, out)
    made = {
        "forward": launches.forward_launch(forward, call, out, lse, blocks, tiles.forward, packing),
        "delta": launches.delta_launch(backward, call, lse, lse, out, out, lse, lse),
        "dkdv": launches.dkdv_launch(backward, call, upstream_grads, key, value, blocks, tiles.dkdv, packing),
        "dq": launches.dq_launch(
            backward, call, upstream_grads, query, slope_sums, None, blocks, tiles.dq, packing
        ),
    }
    sums = [torch.empty(2, *tensor.shape, dtype=torch.float32) for tensor in (key, value)]
    split = split_of(backward.replace(few_kv_heads=True), packing is not None)
    made["dkdv_split"] = launches.dkdv_launch(
        backward, call, upstream_grads, *sums, blocks, tiles.dkdv, packing, split, first_split=1
    )
    made["sum_splits"] = launches.sum_splits_launch(sums[0], key)
    if packing is not None:
        return made
    weights = torch.empty(*query.shape[:3], key.shape[2], dtype=query.dtype)
    made["weights"] = launches.weights_launch(forward, call, lse, lse_correction, weights, False, tiles.dbias)
    if call.bias is not None:
        made["lse_correction"] = launches.lse_correction_launch(backward, call, lse, lse, tiles.dq)
        made["dbias"] = launches.dbias_launch(backward, call, upstream_grads, call.bias, tiles.dbias)
    if call.query_segments is not None and call.key_segments is not None:
        ids, other_ids = call.query_segments, call.key_segments
        block, other_block = tiles.forward.block_m, tiles.forward.block_n
        made["segments"] = launches.segment_blocks_launch(ids, other_ids, blocks, block, other_block)
    return made
