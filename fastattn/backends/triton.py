"""The Triton backend: any CUDA GPU from compute capability 8.0 on, no compiler needed."""

from __future__ import annotations

import importlib.util
import os
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastattn.spec import (
    MAX_HEAD_DIM,
    AttentionCall,
    AttentionGrads,
    AttentionSpec,
    GradsNeeded,
    empty_in_order,
)

if TYPE_CHECKING:
    from fastattn.kernels.tiles import Tiles

NAME = "triton"
MIN_ARCH = 80
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MISSING_FEATURES = ("mask", "bias", "segments", "alibi", "softcap", "sinks", "dropout")


def why_not(spec: AttentionSpec) -> str | None:
    """Why this backend can't run `spec`, or None."""
    if not _installed():
        return "triton is not installed"
    if spec.device != "cuda" and not _interpreting():
        return f"device {spec.device!r} has no Triton kernels, they need a CUDA device"
    if spec.arch is not None and spec.arch < MIN_ARCH:
        return f"compute capability {spec.arch / 10} is below {MIN_ARCH / 10}"
    if spec.dtype not in DTYPES:
        return f"dtype {spec.dtype} is not one of float16, bfloat16, float32"
    if max(spec.head_dim, spec.value_dim) > MAX_HEAD_DIM:
        return f"head dim {max(spec.head_dim, spec.value_dim)} is over {MAX_HEAD_DIM}"
    missing = [feature for feature in spec.features() if feature in MISSING_FEATURES]
    if missing:
        return "not written yet: " + ", ".join(missing)
    return None


def why_not_auto(spec: AttentionSpec) -> str | None:
    """Why "auto" passes this backend over although it could run `spec`, or None."""
    return "Triton's interpreter is for tests, not for use" if spec.device != "cuda" else None


def tiles(spec: AttentionSpec) -> str | None:
    """The tiles `spec` runs with, in a line; None where triton is missing."""
    if not _installed():
        return None
    from fastattn.kernels.tiles import tiles_for

    chosen = tiles_for(spec)
    if spec.backward:
        return f"dk, dv {chosen.dkdv}; dq {chosen.dq}"
    return f"forward {chosen.forward}"


def attention_fwd(
    spec: AttentionSpec, call: AttentionCall, tiles: Tiles | None = None
) -> tuple[Tensor, Tensor]:
    """(out, lse) of a call, with the given tiles instead of the spec's own if any."""
    from fastattn.kernels import launches
    from fastattn.kernels.tiles import tiles_for

    call = _with_unit_stride(call)
    query, value = call.query, call.value
    tiles = tiles or tiles_for(spec)
    out = empty_in_order(query, (*query.shape[:3], value.shape[3]))
    lse = query.new_empty(query.shape[:3], dtype=torch.float32)
    launches.forward_launch(spec, call, out, lse, tiles.forward).run()
    return out, lse


def attention_bwd(
    spec: AttentionSpec,
    call: AttentionCall,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor | None,
    needs: GradsNeeded,
    tiles: Tiles | None = None,
) -> AttentionGrads:
    """The gradients a call needs, bitwise the same on every run."""
    from fastattn.kernels import launches
    from fastattn.kernels.tiles import tiles_for

    call = _with_unit_stride(call)
    query, key, value = call.query, call.key, call.value
    out, dout = _unit_stride(out), _unit_stride(dout)
    dlse = None if dlse is None else dlse.contiguous()
    lse = lse.contiguous()
    tiles = tiles or tiles_for(spec)
    delta = torch.empty_like(lse)
    launches.delta_launch(spec, call, out, lse, dout, dlse, delta).run()
    dquery = dkey = dvalue = None
    if needs.key or needs.value:
        dkey, dvalue = empty_in_order(key, key.shape), empty_in_order(value, value.shape)
        launches.dkdv_launch(spec, call, lse, delta, dout, dkey, dvalue, tiles.dkdv).run()
    if needs.query:
        dquery = empty_in_order(query, query.shape)
        launches.dq_launch(spec, call, lse, delta, dout, dquery, tiles.dq).run()
    return AttentionGrads(dquery, dkey if needs.key else None, dvalue if needs.value else None)


def _with_unit_stride(call: AttentionCall) -> AttentionCall:
    """The call with every operand's last dimension adjacent in memory, copied where it is not."""
    from dataclasses import replace

    return replace(
        call,
        query=_unit_stride(call.query),
        key=_unit_stride(call.key),
        value=_unit_stride(call.value),
        key_lengths=None if call.key_lengths is None else call.key_lengths.contiguous(),
    )


def _unit_stride(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


@cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"
