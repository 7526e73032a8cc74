"""What each kernel is launched with: a call and its tiles become grids, arguments and the variant that is compiled."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastattn.kernels.attention_bwd import attention_delta_kernel, attention_dkdv_kernel, attention_dq_kernel
from fastattn.kernels.attention_fwd import attention_fwd_kernel
from fastattn.kernels.tiles import DELTA_ROWS, Tile
from fastattn.spec import AttentionCall, AttentionSpec


class AttentionVariant(NamedTuple):
    """Everything a compiled attention kernel depends on beside its tile: one value is one set of binaries."""

    head_dim: int
    value_dim: int
    group_size: int
    has_left: bool  # the window bounds keys before a query's position
    has_right: bool  # and after it; causal is right = 0
    key_lengths: bool
    fold_scale: bool  # q.k is multiplied with the scale within the exponent; float32 and signs don't allow it
    dot_precision: str  # of float32 products: "ieee", "tf32x3" or "tf32"
    unit: int  # strides are passed in multiples of this many elements, 16 bytes where everything is aligned
    wide_offsets: bool  # offsets within a tile need 64 bits


class Launch(NamedTuple):
    """One kernel launch, complete: what runs on a GPU is what the compile checks compile."""

    kernel: Any
    grid: tuple[int]
    args: dict[str, Any]
    num_warps: int
    num_stages: int

    def run(self) -> None:
        """Launch, unless there is nothing to do."""
        if self.grid[0] > 0:
            self.kernel[self.grid](
                **self.args, num_warps=self.num_warps, num_stages=self.num_stages, enable_fp_fusion=True
            )


def forward_launch(spec: AttentionSpec, call: AttentionCall, out: Tensor, lse: Tensor, tile: Tile) -> Launch:
    """attention_fwd_kernel on a call."""
    query, key, value = call.query, call.key, call.value
    unit = _unit(query, key, value, out)
    args = {
        "query": query,
        "key": key,
        "value": value,
        "out": out,
        "lse": lse,
        "key_lengths": call.key_lengths,
        **_strides("query", query, unit),
        **_strides("key", key, unit),
        **_strides("value", value, unit),
        **_strides("out", out, unit),
        "num_heads": query.shape[1],
        **_positions(call),
        "VARIANT": _variant(spec, call, unit),
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
    }
    grid = (query.shape[0] * query.shape[1] * _cdiv(query.shape[2], tile.block_m),)
    return Launch(attention_fwd_kernel, grid, args, tile.num_warps, tile.num_stages)


def delta_launch(
    spec: AttentionSpec,
    call: AttentionCall,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor | None,
    delta: Tensor,
) -> Launch:
    """attention_delta_kernel on the results of a call and their gradients."""
    unit = _unit(out, dout)
    args = {
        "out": out,
        "dout": dout,
        "lse": lse,
        "dlse": dlse,
        "delta": delta,
        **_strides("out", out, unit),
        **_strides("dout", dout, unit),
        "num_heads": out.shape[1],
        "seqlen_q": out.shape[2],
        "VARIANT": _variant(spec, call, unit),
        "BLOCK_M": DELTA_ROWS,
    }
    grid = (out.shape[0] * out.shape[1] * _cdiv(out.shape[2], DELTA_ROWS),)
    return Launch(attention_delta_kernel, grid, args, num_warps=4, num_stages=1)


def dkdv_launch(
    spec: AttentionSpec,
    call: AttentionCall,
    lse: Tensor,
    delta: Tensor,
    dout: Tensor,
    dkey: Tensor,
    dvalue: Tensor,
    tile: Tile,
) -> Launch:
    """attention_dkdv_kernel on a call, writing the gradients of key and value."""
    query, key, value = call.query, call.key, call.value
    unit = _unit(query, key, value, dout, dkey, dvalue)
    args = {
        "query": query,
        "key": key,
        "value": value,
        "dout": dout,
        "lse": lse,
        "delta": delta,
        "dkey": dkey,
        "dvalue": dvalue,
        "key_lengths": call.key_lengths,
        **_strides("query", query, unit),
        **_strides("key", key, unit),
        **_strides("value", value, unit),
        **_strides("dout", dout, unit),
        **_strides("dkey", dkey, unit),
        **_strides("dvalue", dvalue, unit),
        "num_kv_heads": key.shape[1],
        **_positions(call),
        "VARIANT": _variant(spec, call, unit),
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
    }
    grid = (key.shape[0] * key.shape[1] * _cdiv(key.shape[2], tile.block_n),)
    return Launch(attention_dkdv_kernel, grid, args, tile.num_warps, tile.num_stages)


def dq_launch(
    spec: AttentionSpec,
    call: AttentionCall,
    lse: Tensor,
    delta: Tensor,
    dout: Tensor,
    dquery: Tensor,
    tile: Tile,
) -> Launch:
    """attention_dq_kernel on a call, writing the gradient of the query."""
    query, key, value = call.query, call.key, call.value
    unit = _unit(query, key, value, dout, dquery)
    args = {
        "query": query,
        "key": key,
        "value": value,
        "dout": dout,
        "lse": lse,
        "delta": delta,
        "dquery": dquery,
        "key_lengths": call.key_lengths,
        **_strides("query", query, unit),
        **_strides("key", key, unit),
        **_strides("value", value, unit),
        **_strides("dout", dout, unit),
        **_strides("dquery", dquery, unit),
        "num_heads": query.shape[1],
        **_positions(call),
        "VARIANT": _variant(spec, call, unit),
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
    }
    grid = (query.shape[0] * query.shape[1] * _cdiv(query.shape[2], tile.block_m),)
    return Launch(attention_dq_kernel, grid, args, tile.num_warps, tile.num_stages)


def _variant(spec: AttentionSpec, call: AttentionCall, unit: int) -> AttentionVariant:
    return AttentionVariant(
        head_dim=spec.head_dim,
        value_dim=spec.value_dim,
        group_size=spec.group_size,
        has_left=spec.window_left,
        has_right=spec.window_right or spec.causal != "none",
        key_lengths=spec.key_lengths,
        fold_scale=call.scale > 0.0 and spec.dtype != torch.float32,
        dot_precision=spec.float32_precision,
        unit=unit,
        wide_offsets=spec.wide_offsets,
    )


def _positions(call: AttentionCall) -> dict[str, int | float]:
    """Lengths and window of a call; bounds no longer than the sequences say the same and can't overflow."""
    seqlen_q, seqlen_k = call.query.shape[2], call.key.shape[2]
    longest = seqlen_q + seqlen_k
    right = call.window_right if call.window_right >= 0 else longest
    return {
        "seqlen_q": seqlen_q,
        "seqlen_k": seqlen_k,
        "shift": call.position_shift,
        "left": min(call.window_left, longest),
        "right": 0 if call.causal != "none" else min(right, longest),
        "scale": call.scale,
    }


def _unit(*tensors: Tensor) -> int:
    """How many elements make 16 bytes if every row of every tensor starts at a multiple of 16 bytes, else 1."""
    unit = 16 // tensors[0].element_size()
    for tensor in tensors:
        if tensor.data_ptr() % 16:
            return 1
        if any(stride % unit for stride, size in zip(tensor.stride()[:-1], tensor.shape) if size > 1):
            return 1
    return unit


def _strides(name: str, tensor: Tensor, unit: int) -> dict[str, int]:
    """The three outer strides in units; that of a dimension of size 1 is never used and may be odd."""
    names = ("batch", "head", "row")
    return {
        f"{name}_stride_{dim}": stride // unit if size > 1 else 0
        for dim, stride, size in zip(names, tensor.stride(), tensor.shape)
    }


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)
