"""The Triton backend: any CUDA GPU from compute capability 8.0 on, no compiler needed."""

from __future__ import annotations

import importlib.util
import os

import torch

from fastattn.backends import layout
from fastattn.backends.triton.attention import (
    attention_bwd,
    attention_fwd,
    attention_weights_bwd,
    attention_weights_fwd,
)
from fastattn.backends.triton.cross_entropy import (
    cross_entropy_bwd,
    cross_entropy_fwd,
    linear_cross_entropy_bwd,
    linear_cross_entropy_fwd,
)
from fastattn.backends.triton.kv_cache import is_decode_call, kv_cache_fwd, kv_cache_tiles
from fastattn.backends.triton.softmax import softmax_bwd, softmax_fwd, softmax_tiles
from fastattn.backends.triton.varlen import varlen_bwd, varlen_fwd
from fastattn.spec import MAX_HEAD_DIM, AttentionSpec, SoftmaxSpec

__all__ = [
    "DTYPES",
    "LAYOUT",
    "MIN_ARCH",
    "NAME",
    "READS_NO_VALUES",
    "attention_bwd",
    "attention_fwd",
    "attention_weights_bwd",
    "attention_weights_fwd",
    "cross_entropy_bwd",
    "cross_entropy_fwd",
    "kv_cache_fwd",
    "kv_cache_tiles",
    "linear_cross_entropy_bwd",
    "linear_cross_entropy_fwd",
    "softmax_bwd",
    "softmax_fwd",
    "softmax_tiles",
    "tiles",
    "varlen_bwd",
    "varlen_fwd",
    "varlen_tiles",
    "why_not",
    "why_not_auto",
]

NAME = "triton"
LAYOUT = layout.ROWS
READS_NO_VALUES = True
INSTALLED = importlib.util.find_spec("triton") is not None  # a trace of torch 2.9 cannot look for it
MIN_ARCH = 80
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
TILE_SOURCES = {"measured": "measured here", "model": "by the cycle model"}


def why_not(spec: AttentionSpec | SoftmaxSpec) -> str | None:
    """Why this backend can't run `spec`, or None."""
    if not _installed():
        return "triton is not installed"
    if spec.device != "cuda" and not _interpreting():
        return f"device {spec.device!r} has no Triton kernels, they need a CUDA device"
    if torch.version.hip is not None:
        return "the tiles are made for CUDA devices, this is a ROCm build of torch"
    if spec.arch is not None and spec.arch < MIN_ARCH:
        return f"compute capability {spec.arch / 10} is below {MIN_ARCH / 10}"
    if spec.dtype not in DTYPES:
        return f"dtype {spec.dtype} is not one of float16, bfloat16, float32"
    if isinstance(spec, AttentionSpec) and max(spec.head_dim, spec.value_dim) > MAX_HEAD_DIM:
        return f"head dim {max(spec.head_dim, spec.value_dim)} is over {MAX_HEAD_DIM}"
    return None


def why_not_auto(spec: AttentionSpec | SoftmaxSpec) -> str | None:
    """Why "auto" passes this backend over although it could run `spec`, or None."""
    return "Triton's interpreter is for tests, not for use" if spec.device != "cuda" else None


def tiles(spec: AttentionSpec) -> str | None:
    """The tiles `spec` runs with, in a line; None where triton is missing."""
    if _installed() and is_decode_call(spec) and not spec.backward:
        return kv_cache_tiles(spec)
    return _tiles(spec, packed=False)


def varlen_tiles(spec: AttentionSpec) -> str | None:
    """The same for packed sequences."""
    return _tiles(spec, packed=True)


def _tiles(spec: AttentionSpec, packed: bool) -> str | None:
    if not _installed():
        return None
    from fastattn.kernels.splits import split_count, split_of
    from fastattn.kernels.tiles import table_tiles
    from fastattn.kernels.tuned import entries_for, tiles_for

    chosen, built_in, found = tiles_for(spec, packed), table_tiles(spec), entries_for(spec, packed)
    sources = {entry.source for name, entry in found.items() if entry.tile != getattr(built_in, name)}
    source = "".join(f", {TILE_SOURCES[each]}" for each in sorted(sources))
    if spec.backward:
        split = split_of(spec, packed)
        split_into = f", {split}" if split.queries or split_count(split, spec.group_size, 0) > 1 else ""
        return f"dk, dv {chosen.dkdv}{split_into}; dq {chosen.dq}{source}"
    return f"forward {chosen.forward}{source}"


def _installed() -> bool:
    return INSTALLED


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"
