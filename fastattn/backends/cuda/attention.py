"""Attention on the CUDA backend: the calls that the Hopper kernels support, and how the extension is called."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastattn import extension
from fastattn.backends.cuda.calls import run
from fastattn.backends.switches import switched_off
from fastattn.spec import (
    MAX_HEAD_DIM,
    AttentionCall,
    AttentionGrads,
    AttentionSpec,
    GradsNeeded,
    VarlenCall,
)

ARCH = 90  # whose wgmma and TMA the kernels are written for
CODE = "9.0a"  # the architecture the extension has to be built for
DTYPES = (torch.float16, torch.bfloat16)
HEAD_DIM_MULTIPLE = 8  # 16 bytes, the granularity of TMA
UNSUPPORTED = {  # field of the spec: its name in refusals
    "mask": "a mask",
    "bias": "a bias",
    "segments": "segment_ids",
    "alibi": "alibi_slopes",
    "sinks": "sinks",
    "dropout": "dropout",
}


@dataclass(frozen=True, slots=True)
class MeasuredHeads:
    """Head dims for which this backend was measured to be no slower than Triton."""

    arch: int
    backward: bool
    head_dim: int


MEASURED_HEADS: tuple[MeasuredHeads, ...] = ()  # nothing has been measured yet

# Head dims, of 128 at most, for which the backward in one pass was measured to be faster than in two.
ONE_PASS_HEAD_DIMS: frozenset[int] = frozenset()


def why_not(spec: AttentionSpec, built: Sequence[str]) -> str | None:
    """Why an extension built for these architectures can't run `spec`, or None."""
    if spec.arch != ARCH:
        here = "this device has none" if spec.arch is None else f"this GPU has {spec.arch / 10}"
        return f"the attention kernels need compute capability {ARCH / 10}, {here}"
    if CODE not in built:
        return f"the extension is built for {', '.join(built)}, attention needs {CODE}; {extension.ADVICE}"
    if spec.dtype not in DTYPES:
        return f"dtype {spec.dtype} is not one of float16, bfloat16"
    used = [name for field, name in UNSUPPORTED.items() if getattr(spec, field)]
    if used:
        return f"the CUDA kernels do not support {', '.join(used)}"
    if spec.value_dim != spec.head_dim:
        return f"value dim {spec.value_dim} is not the head dim {spec.head_dim}"
    if spec.head_dim % HEAD_DIM_MULTIPLE or not 0 < spec.head_dim <= MAX_HEAD_DIM:
        return f"head dim {spec.head_dim} is not a multiple of {HEAD_DIM_MULTIPLE} up to {MAX_HEAD_DIM}"
    if not spec.aligned:
        return "some data or stride of query, key or value is not a multiple of 16 bytes"
    return None


def why_not_auto(spec: AttentionSpec) -> str | None:
    """Why "auto" passes this backend over although it could run `spec`, or None."""
    if spec.single_query:
        return "a single query leaves most of a tile empty"
    if MeasuredHeads(ARCH, spec.backward, spec.head_dim) not in MEASURED_HEADS:
        return "not yet measured on this GPU; backend='cuda' or FASTATTN_BACKEND=cuda runs it"
    return None


def attention_tiles(spec: AttentionSpec) -> str:
    """The tiles `spec` runs with, in a line."""
    windowed = spec.causal != "none" or spec.window_left or spec.window_right
    if spec.backward:
        tiles = extension.module().attention_backward_tiles(spec.head_dim, spec.softcap)
        return "dk, dv {}x{}; dq {}x{}; 3 warpgroups, 2 stages".format(*tiles)
    queries, keys = extension.module().attention_forward_tile(spec.head_dim, windowed, spec.softcap)
    tiles = f"forward {queries}x{keys}, {queries // 64 + 1} warpgroups, 2 stages"
    full = not (windowed or spec.softcap or spec.key_lengths)
    blocks = (
        extension.module().attention_forward_cluster(spec.head_dim) if full and _may_use_clusters() else 1
    )
    return tiles if blocks == 1 else f"{tiles}, clusters of {blocks} where they take no more rounds of tiles"


def attention_fwd(spec: AttentionSpec, call: AttentionCall) -> tuple[Tensor, Tensor]:
    """(out, lse) of a call."""
    query, scale = _with_positive_scale(call.query, call.scale)
    out, lse = run(
        "attention_forward",
        query,
        call.key,
        call.value,
        call.key_lengths,
        *_mask_options(call),
        call.softcap,
        scale,
        _may_use_clusters(),
    )
    return out, lse


def attention_bwd(
    spec: AttentionSpec,
    call: AttentionCall,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor | None,
    needs: GradsNeeded,
) -> AttentionGrads:
    """The gradients a call needs, bitwise the same on every run."""
    query, scale = _with_positive_scale(call.query, call.scale)
    grads = run(
        "attention_backward",
        dout,
        query,
        call.key,
        call.value,
        out,
        lse,
        dlse,
        call.key_lengths,
        *_mask_options(call),
        call.softcap,
        scale,
        needs.query,
        needs.key or needs.value,
        _in_one_pass(spec, needs),
    )
    return _needed_grads(call.scale, grads, needs)


def varlen_fwd(spec: AttentionSpec, call: VarlenCall) -> tuple[Tensor, Tensor]:
    """(out (T, H, D), lse (H, T)); tokens of no sequence get 0 and -inf. Never waits for the device."""
    query, scale = _with_positive_scale(call.query, call.scale)
    out, lse = run(
        "varlen_forward",
        query,
        call.key,
        call.value,
        call.cu_seqlens_q,
        call.cu_seqlens_k,
        *_mask_options(call),
        call.softcap,
        scale,
    )
    return out, lse


def varlen_bwd(
    spec: AttentionSpec,
    call: VarlenCall,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor | None,
    needs: GradsNeeded,
) -> AttentionGrads:
    """Gradients of (out, lse) of packed sequences; tokens of no sequence get 0. Never waits for the device."""
    query, scale = _with_positive_scale(call.query, call.scale)
    grads = run(
        "varlen_backward",
        dout,
        query,
        call.key,
        call.value,
        out,
        lse,
        dlse,
        call.cu_seqlens_q,
        call.cu_seqlens_k,
        *_mask_options(call),
        call.softcap,
        scale,
        needs.query,
        needs.key or needs.value,
        _in_one_pass(spec, needs),
    )
    return _needed_grads(call.scale, grads, needs)


def _may_use_clusters() -> bool:
    """Whether the forward may run in clusters; the extension uses them where they add no round of tiles."""
    return switched_off("cuda", "clusters") is None


def _in_one_pass(spec: AttentionSpec, needs: GradsNeeded) -> bool:
    """Whether one pass computes all gradients: where it supports the call and was measured to be faster."""
    wanted = needs.query and (needs.key or needs.value)
    allowed = wanted and not spec.softcap and switched_off("cuda", "one_pass") is None
    return allowed and spec.head_dim in ONE_PASS_HEAD_DIMS


def _needed_grads(
    scale: float, grads: tuple[Tensor | None, Tensor | None, Tensor | None], needs: GradsNeeded
) -> AttentionGrads:
    """Which of (dq, dk, dv) are needed; dq is the gradient of the query that `_with_positive_scale` made."""
    dquery, dkey, dvalue = grads
    if dquery is not None and scale <= 0.0:
        dquery = -dquery if scale < 0.0 else dquery.zero_()
    return AttentionGrads(dquery, dkey if needs.key else None, dvalue if needs.value else None)


def _mask_options(call: AttentionCall | VarlenCall) -> tuple[bool, int, int]:
    """(top_left, window_left, window_right): to the kernels, causality is a window of 0 keys to the right."""
    right = call.window_right if call.causal == "none" else 0
    return call.causal == "top_left", call.window_left, right


def _with_positive_scale(query: Tensor, scale: float) -> tuple[Tensor, float]:
    """The query and scale of the same scores with a scale above 0: the kernels take maxima before they scale."""
    if scale > 0.0:
        return query, scale
    return (-query, -scale) if scale < 0.0 else (query * 0.0, 1.0)
