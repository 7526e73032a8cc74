"""A launch gives every parameter of its kernel the argument that the parameter's name says."""

from __future__ import annotations

import re
from typing import Any

import decode_compile
import pytest
import torch
from attention_launches import launches_of

from fastattn.kernels.launches import Packing
from fastattn.kernels.tiles import Tile
from fastattn.philox import keep_scale, keep_threshold
from fastattn.spec import AttentionCall

BATCH, HEADS, KV_HEADS, SEQLEN_Q, SEQLEN_K = 2, 6, 3, 5, 7  # all different, as are the strides
TILE = Tile(16, 32, 4, 2)
DIMS = "bhsd"
SCORE_DIMS = "bhqk"
POINTERS = {"o": "out", "do": "dout", "new_k": "key", "new_v": "value"}  # where they are called otherwise
SIZES = {
    "num_heads": HEADS, "seqlen_q": SEQLEN_Q, "seqlen_k": SEQLEN_K, "num_kv_heads": KV_HEADS, "left": 4, "right": 0,
    "scale": 0.25, "softcap": 2.0, "keep_threshold": keep_threshold(0.1), "keep_scale": keep_scale(0.1),
    "bias_batch": 1, "bias_heads": HEADS, "bias_rows": SEQLEN_Q, "bias_cols": SEQLEN_K, "BLOCK_M": 16, "BLOCK_N": 32,
}  # fmt: skip


def strided(*shape: int) -> torch.Tensor:
    """Float16 of a shape, none of whose strides is another's."""
    return torch.empty(*(size + place for place, size in enumerate(shape)), dtype=torch.float16)[
        tuple(slice(size) for size in shape)
    ]


def attention_call() -> AttentionCall:
    """With every feature."""
    return AttentionCall(
        strided(BATCH, HEADS, SEQLEN_Q, 16),
        strided(BATCH, KV_HEADS, SEQLEN_K, 16),
        strided(BATCH, KV_HEADS, SEQLEN_K, 32),
        mask=strided(BATCH, HEADS, SEQLEN_Q, SEQLEN_K).bool(),
        bias=strided(1, HEADS, SEQLEN_Q, SEQLEN_K),
        query_segments=torch.empty(BATCH, SEQLEN_Q, dtype=torch.int32),
        key_segments=torch.empty(BATCH, SEQLEN_K, dtype=torch.int32),
        key_lengths=torch.empty(BATCH, dtype=torch.int32),
        alibi_slopes=torch.empty(BATCH, HEADS),
        sinks=torch.empty(HEADS),
        dropout_seed=torch.empty(1, dtype=torch.int64),
        causal="bottom_right",
        window_left=4,
        softcap=2.0,
        dropout_p=0.1,
        scale=0.25,
    )


def expected_stride(name: str, arguments: dict[str, Any]) -> int | None:
    """The stride that a parameter is called after, in units; None of one that is not called after a tensor here."""
    if found := re.fullmatch(r"stride_(mask|bias|dweights)_([bhqk])", name):
        group = "upstream" if found[1] == "dweights" else "optional"
        tensor, dim, unit = getattr(arguments[group], found[1]), SCORE_DIMS.index(found[2]), 1
    elif found := re.fullmatch(r"stride_((?:new_)?d?[qkvo])([bhsd])", name):
        pointer = POINTERS.get(found[1], found[1])
        tensor, dim = arguments[pointer if pointer in arguments else f"{pointer}_cache"], DIMS.index(found[2])
        unit = 1 if found[2] == "d" else arguments["VARIANT"].unit
        tensor = tensor[0] if isinstance(tensor, torch.Tensor) and tensor.dim() == 5 else tensor  # a split
    else:
        return None
    if tensor is None:
        return 0
    return tensor.stride(dim) // unit if tensor.shape[dim] > 1 or found[2] == "d" else 0


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_attention(packed: bool) -> None:
    call, packing = attention_call(), None
    if packed:
        cu_seqlens = torch.zeros(5, dtype=torch.int32)
        packing = Packing(cu_seqlens, torch.zeros(5, dtype=torch.int32))
    sizes = SIZES | {"batch_size": 4 if packed else BATCH, "shift": 1 if packed else SEQLEN_K - SEQLEN_Q}
    for kernel, launch in launches_of(call, TILE, packing).items():
        if kernel in ("segments", "sum_splits", "delta"):
            continue
        arguments = launch.arguments
        optional = arguments["optional"]
        for name, value in arguments.items():
            stride = expected_stride(name, arguments)
            assert stride is None or value == stride, (kernel, name)
            assert name not in sizes or value == sizes[name], (kernel, name)
        assert arguments["stride_slopes_b"] == HEADS
        assert (optional.cu_seqlens_q, optional.cu_seqlens_k) == (packing or (None, None))
        assert optional.key_ids is call.key_segments
        assert optional.sinks is (call.sinks if kernel in ("forward", "lse_correction") else None)
    assert kernel == "segments" or packed


def test_cache() -> None:
    call = decode_compile.cache_call("pages of 16, all", 64, 16, batch=3, kv_heads=2, capacity=64)
    for kernel, launch in decode_compile.launches_of(call, 90, num_splits=1).items():
        arguments = launch.arguments
        for name, value in arguments.items():
            if kernel == "combine" and name != "num_heads":
                continue
            stride = expected_stride(name, arguments)
            assert stride is None or value == stride, (kernel, name)
        if kernel == "combine":
            continue
        tensors = arguments["cached"]
        assert tensors.block_table is call.block_table
        assert arguments["stride_table"] == 4
        assert arguments["capacity"] == 64
        assert arguments["num_kv_heads"] == 2
        assert arguments["rotary_positions"] == call.rotary_cos.shape[0]
        assert arguments["CACHE"].page_size == 16
