"""Launches of the attention kernels: the grid, the arguments and the compiled variant of a call and its tiles."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastattn.kernels import (
    attention_bwd,
    attention_bwd_splits,
    attention_dbias,
    attention_fwd,
    attention_lse_correction,
    attention_weights,
    segments,
    sequences,
)
from fastattn.kernels.splits import SPLIT_ROWS, WHOLE, Split
from fastattn.kernels.tiles import DELTA_ROWS, SEGMENT_CHUNK, SLOT_CHUNK, TMA_ARCH, Tile
from fastattn.philox import keep_scale, keep_threshold
from fastattn.spec import AttentionCall, AttentionSpec


class AttentionVariant(NamedTuple):
    """Everything a compiled attention kernel depends on beside its tile: one value is one set of binaries."""

    head_dim: int
    value_dim: int
    group_size: int = 1
    has_left: bool = False  # the window bounds keys before a query's position
    has_right: bool = False  # and after it; causal is right = 0
    varlen: bool = False  # sequences lie packed one after another
    key_lengths: bool = False
    mask: bool = False
    bias: bool = False
    segments: bool = False
    alibi: bool = False
    softcap: bool = False
    sinks: bool = False
    dropout: bool = False
    dweights: bool = False  # backward of the weights rather than of the output
    alibi_grad: bool = False
    bias_one_row: bool = False  # the bias whose gradient is computed is broadcast over queries
    bias_one_col: bool = False  # or keys
    unit_mask: bool = False  # neighbouring columns are neighbours in memory
    unit_bias: bool = False
    unit_dweights: bool = False
    fold_scale: bool = False  # q.k is scaled within the exponent: `_folds_scale`
    dot_precision: str = "ieee"  # of float32 products: "ieee", "tf32x3" or "tf32"
    unit: int = (
        1  # strides are passed in multiples of this many elements, 16 bytes where everything is aligned
    )
    int64_offsets: bool = False  # offsets within a tile need 64 bits


class Packing(NamedTuple):
    """The sequences of a packed call, whose tensors hold all tokens as one (1, H, T, D) sequence."""

    cu_seqlens_q: Tensor  # (B + 1,) int32
    cu_seqlens_k: Tensor

    @property
    def batch_size(self) -> int:
        """How many sequences there are."""
        return self.cu_seqlens_q.shape[0] - 1


class Launch(NamedTuple):
    """One kernel launch, complete: what runs on a GPU is what the compile checks compile."""

    kernel: Any
    grid: tuple[int, ...]
    args: dict[str, Any]
    num_warps: int
    num_stages: int
    max_registers: int | None = None  # per thread

    @property
    def options(self) -> dict[str, Any]:
        """Compiler options."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}
        return options if self.max_registers is None else options | {"maxnreg": self.max_registers}

    def run(self) -> None:
        """Launch on the device of the first tensor, unless there is nothing to do."""
        if 0 in self.grid:
            return
        with torch.cuda.device_of(next(value for value in self.args.values() if isinstance(value, Tensor))):
            self.kernel[self.grid](**self.args, **self.options)


def forward_launch(
    spec: AttentionSpec, call: AttentionCall, out: Tensor, lse: Tensor, segment_blocks: Tensor | None, tile: Tile,
    packing: Packing | None = None,
) -> Launch:  # fmt: skip
    """attention_fwd_kernel on a call."""
    unit = _unit(call.query, call.key, call.value, out)
    args = _call_arguments(spec, call, unit, packing) | _strides("o", out, unit)
    args |= {"out": out, "lse": lse, "segment_blocks": segment_blocks}
    args |= _tma_arguments(spec, call, tile)
    grid = num_tiles(call.query, tile.block_m, packing)
    return _launch(attention_fwd.attention_fwd_kernel, grid, args, tile)


def delta_launch(
    spec: AttentionSpec,
    call: AttentionCall,
    lse: Tensor,
    reference: Tensor,
    out: Tensor | None = None,
    dout: Tensor | None = None,
    dlse: Tensor | None = None,
    delta: Tensor | None = None,
) -> Launch:
    """attention_delta_kernel on the results of a call and their gradients, or for the reference alone."""
    batch, num_heads, seqlen_q = lse.shape
    args: dict[str, Any] = {"out": out, "dout": dout, "lse": lse, "dlse": dlse, "delta": delta}
    unit = 1
    if out is None or dout is None:
        args |= {f"stride_{name}{dim}": 0 for name in ("o", "do") for dim in "bhs"}
    else:
        unit = _unit(out, dout)
        args |= _strides("o", out, unit) | _strides("do", dout, unit)
    variant = AttentionVariant(spec.head_dim, spec.value_dim, unit=unit, int64_offsets=spec.int64_offsets)
    variant = variant._replace(fold_scale=_folds_scale(spec, call))
    args |= {"reference": reference, "VARIANT": variant, "num_heads": num_heads, "seqlen_q": seqlen_q}
    tile = Tile(DELTA_ROWS, 0, num_warps=4, num_stages=1)
    return _launch(
        attention_bwd.attention_delta_kernel, batch * num_heads * _cdiv(seqlen_q, DELTA_ROWS), args, tile
    )


def lse_correction_launch(
    spec: AttentionSpec, call: AttentionCall, lse: Tensor, lse_correction: Tensor, tile: Tile
) -> Launch:
    """attention_lse_correction_kernel on a call."""
    args = _call_arguments(spec, call, _unit(call.query, call.key)) | {
        "lse": lse,
        "lse_correction": lse_correction,
    }
    grid = num_tiles(call.query, tile.block_m, None)
    return _launch(attention_lse_correction.attention_lse_correction_kernel, grid, args, tile)


class UpstreamGrads(NamedTuple):
    """The gradients that the passes start from: the output's, with delta, or the weights'."""

    reference: Tensor  # (B, H, Sq) float32, from attention_delta_kernel: lse for the passes' exponents
    lse_correction: Tensor | None = None  # (B, H, Sq) float32, given with a bias
    delta: Tensor | None = None  # (B, H, Sq) float32, from attention_delta_kernel
    dout: Tensor | None = None
    dweights: Tensor | None = None  # (B, H, Sq, Sk), any strides
    dweights_factor: float = 1.0  # their multiplier

    def arguments(self, unit: int) -> dict[str, Any]:
        """Their kernel arguments."""
        names = ("reference", "lse_correction", "delta", "dout", "dweights")
        args: dict[str, Any] = {name: getattr(self, name) for name in names}
        args |= _score_strides("dweights", self.dweights)
        if self.dout is not None:
            return args | _strides("do", self.dout, unit)
        return args | {"stride_dob": 0, "stride_doh": 0, "stride_dos": 0}

    def tensors(self) -> list[Tensor]:
        """Those whose rows are loaded as tiles."""
        return [] if self.dout is None else [self.dout]


def dkdv_launch(
    spec: AttentionSpec,
    call: AttentionCall,
    upstream_grads: UpstreamGrads,
    dkey: Tensor,
    dvalue: Tensor | None,
    segment_blocks: Tensor | None,
    tile: Tile,
    packing: Packing | None = None,
    split: Split = WHOLE,
    first_split: int = 0,
) -> Launch:
    """attention_dkdv_kernel on a call, writing the gradients of key and value.

    With a split, dkey and dvalue are (splits, B, Hkv, Sk, D) float32 and take the splits from `first_split` on.
    """
    dvalue = dkey if dvalue is None else dvalue
    first_dkey, first_dvalue = (dkey, dvalue) if split == WHOLE else (dkey[0], dvalue[0])
    unit = _unit(call.query, call.key, call.value, first_dkey, first_dvalue, *upstream_grads.tensors())
    args = _call_arguments(spec, call, unit, packing, upstream_grads)
    args |= _strides("dk", first_dkey, unit) | _strides("dv", first_dvalue, unit)
    args |= {"dk": dkey, "dv": dvalue, "segment_blocks": segment_blocks}
    args |= _tma_arguments(spec, call, tile, upstream_grads)
    args |= {"SPLIT_HEADS": split.heads, "SPLIT_QUERIES": split.queries, "first_split": first_split}
    args |= {"stride_split_dk": 0, "stride_split_dv": 0}
    grid = num_tiles(call.key, tile.block_n, packing)
    if split == WHOLE:
        return _launch(attention_bwd.attention_dkdv_kernel, grid, args, tile)
    args |= {"stride_split_dk": dkey.stride(0), "stride_split_dv": dvalue.stride(0)}
    return _launch(attention_bwd.attention_dkdv_kernel, grid, args, tile)._replace(grid=(grid, dkey.shape[0]))


def sum_splits_launch(partials: Tensor, out: Tensor) -> Launch:
    """sum_splits_kernel on partials (splits, B, Hkv, Sk, D), rows one behind another, into `out` (B, Hkv, Sk, D)."""
    num_splits, batch, num_kv_heads, seqlen_k, dim = partials.shape
    args: dict[str, Any] = {"partials": partials, "out": out, "stride_split": partials.stride(0)}
    args |= {f"stride_{name}": stride for name, stride in zip("bhs", out.stride())}
    args |= {"num_splits": num_splits, "num_kv_heads": num_kv_heads, "seqlen_k": seqlen_k}
    args |= {"DIM": dim, "ROW": partials.stride(3), "BLOCK": SPLIT_ROWS}
    grid = batch * num_kv_heads * _cdiv(seqlen_k, SPLIT_ROWS)
    return Launch(attention_bwd_splits.sum_splits_kernel, (grid,), args, num_warps=4, num_stages=1)


def dq_launch(
    spec: AttentionSpec,
    call: AttentionCall,
    upstream_grads: UpstreamGrads,
    dquery: Tensor,
    dslope_tiles: Tensor | None,
    dlse: Tensor | None,
    segment_blocks: Tensor | None,
    tile: Tile,
    packing: Packing | None = None,
) -> Launch:
    """attention_dq_kernel on a call, writing the gradients of the query and the sums over its keys: slopes and lse."""
    unit = _unit(call.query, call.key, call.value, dquery, *upstream_grads.tensors())
    args = _call_arguments(spec, call, unit, packing, upstream_grads) | _strides("dq", dquery, unit)
    args |= {"dq": dquery, "dslope_tiles": dslope_tiles, "dlse": dlse, "segment_blocks": segment_blocks}
    args |= _tma_arguments(spec, call, tile, upstream_grads)
    args["VARIANT"] = args["VARIANT"]._replace(alibi_grad=dslope_tiles is not None)
    grid = num_tiles(call.query, tile.block_m, packing)
    return _launch(attention_bwd.attention_dq_kernel, grid, args, tile)


def sequence_sums_launch(
    tiles: Tensor, packing: Packing, num_tokens: int, block: int, sums: Tensor
) -> Launch:
    """sequence_sums_kernel on the numbers (H, slots) of attention_dq_kernel, one per tile of `block` queries."""
    args: dict[str, Any] = {"tiles": tiles, "cu_seqlens": packing.cu_seqlens_q, "sums": sums}
    args |= {"batch_size": sums.shape[0], "num_heads": sums.shape[1], "num_tokens": num_tokens}
    args |= {"BLOCK": block, "CHUNK": SLOT_CHUNK}
    return Launch(sequences.sequence_sums_kernel, (sums.numel(),), args, 1, 1)


def dbias_launch(
    spec: AttentionSpec, call: AttentionCall, upstream_grads: UpstreamGrads, dbias: Tensor, tile: Tile
) -> Launch:
    """attention_dbias_kernel on a call, writing the gradient of the bias in the bias's own shape, contiguous."""
    bias_batch, bias_heads, bias_rows, bias_cols = dbias.shape
    unit = _unit(call.query, call.key, call.value, *upstream_grads.tensors())
    args = _call_arguments(spec, call, unit, None, upstream_grads)
    args |= {
        "bias_batch": bias_batch,
        "bias_heads": bias_heads,
        "bias_rows": bias_rows,
        "bias_cols": bias_cols,
    }
    args["dbias"] = dbias
    args["VARIANT"] = args["VARIANT"]._replace(bias_one_row=bias_rows == 1, bias_one_col=bias_cols == 1)
    tiles = bias_batch * bias_heads * _cdiv(bias_rows, tile.block_m) * _cdiv(bias_cols, tile.block_n)
    return _launch(attention_dbias.attention_dbias_kernel, tiles, args, tile)


def weights_launch(
    spec: AttentionSpec,
    call: AttentionCall,
    lse: Tensor,
    lse_correction: Tensor | None,
    weights: Tensor,
    mean: bool,
    tile: Tile,
) -> Launch:
    """attention_weights_kernel on a call: (B, H, Sq, Sk), or (B, Sq, Sk) for the mean over heads, contiguous."""
    seqlen_q, seqlen_k = weights.shape[-2:]
    args = _call_arguments(spec, call, _unit(call.query, call.key))
    args |= {"lse": lse, "lse_correction": lse_correction, "weights": weights, "MEAN": mean}
    batch_heads = weights.shape[:-2].numel()
    grid = batch_heads * _cdiv(seqlen_q, tile.block_m) * _cdiv(seqlen_k, tile.block_n)
    return _launch(attention_weights.attention_weights_kernel, grid, args, tile)


def segment_blocks_launch(
    ids: Tensor, other_ids: Tensor, blocks: Tensor, block: int, other_block: int
) -> Launch:
    """segment_blocks_kernel on the ids of the side that owns the tiles and of the other, both (B, S) contiguous."""
    args: dict[str, Any] = {"ids": ids, "other_ids": other_ids, "blocks": blocks}
    args |= {"seqlen": ids.shape[1], "other_seqlen": other_ids.shape[1]}
    args |= {"BLOCK": block, "OTHER_BLOCK": other_block, "CHUNK": max(1, SEGMENT_CHUNK // other_block)}
    return Launch(segments.segment_blocks_kernel, (blocks.shape[0] * blocks.shape[1],), args, 4, 1)


def num_tiles(tensor: Tensor, block: int, packing: Packing | None) -> int:
    """Programs that own a tile of `block` rows of one head each; of packed tensors, slots of sequences.py."""
    batch, num_heads, length, _ = tensor.shape
    if packing is not None:
        return num_heads * (length // block + packing.batch_size + 1)
    return batch * num_heads * _cdiv(length, block)


def fits_tma(spec: AttentionSpec, operands: Iterable[Tensor]) -> bool:
    """Whether descriptors can stand for the operands of a call: everything at multiples of 16 bytes, nothing empty or
    broadcast; with 16-bit dtypes, whose products run on wgmma, from Hopper on.

    The stride of a batch of one counts too, although nothing is stepped over: a sequence cut out of a batch is then
    loaded, and rounded, as in the batch.
    """
    tensors = list(operands)
    unit = _unit(*tensors)
    if spec.dtype.itemsize != 2 or unit == 1 or (spec.arch is not None and spec.arch < TMA_ARCH):
        return False
    if any(tensor.stride(0) % unit or tensor.stride(0) <= 0 for tensor in tensors):
        return False
    sizes = [pair for tensor in tensors for pair in zip(tensor.shape, tensor.stride())]
    return all(size > 0 and (size == 1 or stride > 0) for size, stride in sizes)


def _tma_arguments(
    spec: AttentionSpec, call: AttentionCall, tile: Tile, upstream_grads: UpstreamGrads | None = None
) -> dict[str, Any]:
    """The TMA flag, and descriptors in place of the operands where the tile asks for them and they can stand for
    them."""
    operands = {
        "q": (call.query, tile.block_m),
        "k": (call.key, tile.block_n),
        "v": (call.value, tile.block_n),
    }
    if upstream_grads is not None and upstream_grads.dout is not None:
        operands["dout"] = (upstream_grads.dout, tile.block_m)
    if not (tile.tma and fits_tma(spec, [tensor for tensor, _ in operands.values()])):
        return {"TMA": False}
    descriptors = {name: _descriptor(tensor, block) for name, (tensor, block) in operands.items()}
    return descriptors | {"TMA": True}


def _descriptor(tensor: Tensor, block: int) -> Any:
    """A (B, H, S, D) tensor as TMA sees it, in blocks of `block` rows of one head; the stride of a dimension of size 1
    is never used, but has to be a multiple of 16 bytes."""
    from triton import next_power_of_2
    from triton.tools.tensor_descriptor import TensorDescriptor

    unit = 16 // tensor.element_size()
    strides = [stride if size > 1 else unit for size, stride in zip(tensor.shape[:3], tensor.stride())]
    width = max(16, next_power_of_2(tensor.shape[3]))
    return TensorDescriptor(tensor, list(tensor.shape), [*strides, 1], [1, 1, block, width])


def _launch(kernel: Any, grid: int, args: dict[str, Any], tile: Tile) -> Launch:
    """A launch with those of the arguments that the kernel takes."""
    args = args | {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n}
    if tile.tf32x3 and args["VARIANT"].dot_precision == "ieee":
        args["VARIANT"] = args["VARIANT"]._replace(dot_precision="tf32x3")
    chosen = {name: args[name] for name in kernel.arg_names}
    return Launch(kernel, (grid,), chosen, tile.num_warps, tile.num_stages, tile.max_registers)


def _call_arguments(
    spec: AttentionSpec,
    call: AttentionCall,
    unit: int,
    packing: Packing | None = None,
    upstream_grads: UpstreamGrads | None = None,
) -> dict[str, Any]:
    """Every argument that follows from the call. Windows are cut to the sequences, so that nothing overflows."""
    query, key, value, slopes = call.query, call.key, call.value, call.alibi_slopes
    longest = query.shape[2] + key.shape[2]
    right = call.window_right if call.window_right >= 0 else longest
    args: dict[str, Any] = {
        "q": query,
        "k": key,
        "v": value,
        "cu_seqlens_q": None if packing is None else packing.cu_seqlens_q,
        "cu_seqlens_k": None if packing is None else packing.cu_seqlens_k,
        "key_lengths": call.key_lengths,
        "mask": None if call.mask is None else call.mask.view(torch.uint8),
        "bias": call.bias,
        "query_ids": call.query_segments,
        "key_ids": call.key_segments,
        "slopes": slopes,
        "sinks": call.sinks,
        "seed": call.dropout_seed,
        "stride_slopes_b": slopes.stride(0) if slopes is not None and slopes.shape[0] > 1 else 0,
        "num_heads": query.shape[1],
        "batch_size": query.shape[0] if packing is None else packing.batch_size,
        "seqlen_q": query.shape[2],
        "seqlen_k": key.shape[2],
        "shift": call.position_shift if packing is None else int(call.causal != "top_left"),
        "left": min(call.window_left, longest),
        "right": 0 if call.causal != "none" else min(right, longest),
        "keep_threshold": keep_threshold(call.dropout_p),
        "keep_scale": keep_scale(call.dropout_p),
        "scale": call.scale,
        "softcap": call.softcap,
        "VARIANT": _variant(spec, call, unit, upstream_grads)._replace(varlen=packing is not None),
    }
    args |= _strides("q", query, unit) | _strides("k", key, unit) | _strides("v", value, unit)
    args |= _score_strides("mask", call.mask) | _score_strides("bias", call.bias)
    if upstream_grads is not None:
        args |= upstream_grads.arguments(unit)
        args["keep_scale"] *= upstream_grads.dweights_factor
    return args


def _variant(
    spec: AttentionSpec, call: AttentionCall, unit: int, upstream_grads: UpstreamGrads | None
) -> AttentionVariant:
    dweights = None if upstream_grads is None else upstream_grads.dweights
    return AttentionVariant(
        head_dim=spec.head_dim,
        value_dim=spec.value_dim,
        group_size=spec.group_size,
        has_left=spec.window_left,
        has_right=spec.window_right or spec.causal != "none",
        key_lengths=spec.key_lengths,
        mask=spec.mask,
        bias=spec.bias,
        segments=spec.segments,
        alibi=spec.alibi,
        softcap=spec.softcap,
        sinks=spec.sinks and upstream_grads is None,
        dropout=spec.dropout,
        dweights=dweights is not None,
        unit_mask=_unit_columns(call.mask),
        unit_bias=_unit_columns(call.bias),
        unit_dweights=_unit_columns(dweights),
        fold_scale=_folds_scale(spec, call),
        dot_precision=spec.float32_precision,
        unit=unit,
        int64_offsets=spec.int64_offsets or (dweights is not None and _last_offset(dweights) >= 2**31),
    )


def _folds_scale(spec: AttentionSpec, call: AttentionCall) -> bool:
    """Whether q.k is scaled within the exponent: not for float32, signs, sinks and changed scores."""
    changed = spec.softcap or spec.alibi or spec.bias or spec.sinks
    return call.scale > 0.0 and spec.dtype != torch.float32 and not changed


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
    return {
        f"stride_{name}{dim}": stride // unit if size > 1 else 0
        for dim, stride, size in zip("bhs", tensor.stride(), tensor.shape)
    }


def _score_strides(name: str, tensor: Tensor | None) -> dict[str, int]:
    """The four strides of a tensor that broadcasts to (B, H, Sq, Sk): 0 where it does, or where there is none."""
    if tensor is None:
        return {f"stride_{name}_{dim}": 0 for dim in "bhqk"}
    return {
        f"stride_{name}_{dim}": stride if size > 1 else 0
        for dim, stride, size in zip("bhqk", tensor.stride(), tensor.shape)
    }


def _last_offset(tensor: Tensor) -> int:
    return sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()) if size > 1)


def _unit_columns(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.shape[3] > 1 and tensor.stride(3) == 1


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)
