"""Layouts, normalised once for each call before a backend sees it: what a backend may rely on without checking.

Every backend relies on adjacent columns in q, k, v, dout (`operands`, `upstream`). How much more, it states as its
LAYOUT, a level that includes those before it:
    STRIDED      nothing: every other tensor may have any strides
    ROWS         tensors that kernels step through are contiguous, or have adjacent columns (LAYOUTS names them); where
                 the spec is aligned, every row of the operands, of out, dout and of new keys and values begins at a
                 multiple of 16 bytes
    UNEXPANDED   every row of the operands, of out and dout does, and none of these repeats rows by a stride of 0
Masks, biases and gradients of weights may have any strides at every level: they may be as large as the scores. So may
caches, which are written to.
"""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType
from typing import NamedTuple, TypeVar

from torch import Tensor

from fastattn.spec import (
    AttentionCall,
    AttentionSpec,
    CrossEntropyCall,
    KVCacheCall,
    LinearCrossEntropyCall,
    SoftmaxCall,
    VarlenCall,
)
from fastattn.strides import ALIGNED, DESCRIBABLE, dense, is_expanded, row_class, with_adjacent_columns
from fastattn.visibility import lower_triangle

STRIDED, ROWS, UNEXPANDED = range(3)

CallT = TypeVar("CallT")


class Layout(NamedTuple):
    """The tensors of a kind of call, by what is relied on."""

    operands: tuple[str, ...] = ()  # columns are adjacent for every backend
    tables: tuple[str, ...] = ()  # for kernels
    appended: tuple[str, ...] = ()  # for kernels, and rows are aligned where the spec is
    small: tuple[str, ...] = ()  # contiguous for kernels
    strided: tuple[str, ...] = ()  # any strides


QKV = ("query", "key", "value")
SMALL = ("alibi_slopes", "sinks", "dropout_seed")
LAYOUTS: dict[type, Layout] = {
    AttentionCall: Layout(
        operands=QKV,
        small=(*SMALL, "query_segments", "key_segments", "key_lengths"),
        strided=("mask", "bias"),
    ),
    VarlenCall: Layout(operands=QKV, small=(*SMALL, "cu_seqlens_q", "cu_seqlens_k")),
    KVCacheCall: Layout(
        operands=("query",),
        tables=("block_table", "rotary_cos", "rotary_sin"),
        appended=("key", "value"),
        small=("cache_lengths", "alibi_slopes", "sinks"),
        strided=("k_cache", "v_cache"),
    ),
    SoftmaxCall: Layout(strided=("x", "mask")),
    CrossEntropyCall: Layout(tables=("logits",), small=("target", "class_weight")),
    LinearCrossEntropyCall: Layout(small=("target", "class_weight"), strided=("hidden", "weight", "bias")),
}


def operands(call: CallT) -> CallT:
    """The call with adjacent columns in what every backend reads by rows; its spec is made of this one."""
    names = LAYOUTS[type(call)].operands
    for name in names:
        if getattr(call, name).stride(-1) != 1:
            return _with(call, {each: with_adjacent_columns(getattr(call, each)) for each in names})
    return call


def for_backend(backend: ModuleType, call: CallT, spec: AttentionSpec | None = None) -> CallT:
    """The call, of which `operands` and the spec have been made, as the backend chosen for it needs it."""
    if backend.LAYOUT == STRIDED:
        return call
    layout, changed = LAYOUTS[type(call)], {}
    for name in layout.small:
        if (tensor := getattr(call, name)) is not None and not tensor.is_contiguous():
            changed[name] = tensor.contiguous()
    for name in (*layout.tables, *layout.appended):
        if (tensor := getattr(call, name)) is not None:
            made = with_adjacent_columns(tensor)
            if spec is not None and spec.unit > 1 and name in layout.appended and row_class(made) < ALIGNED:
                made = dense(made)
            if made is not tensor:
                changed[name] = made
    if backend.LAYOUT == UNEXPANDED:
        for name in layout.operands:
            if is_expanded(tensor := getattr(call, name)):
                changed[name] = dense(tensor)
    return _with(call, changed) if changed else call


def upstream(
    backend: ModuleType, spec: AttentionSpec, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None
) -> tuple[AttentionSpec, Tensor, Tensor, Tensor, Tensor | None]:
    """(spec, out, lse, dout, dlse) of a backward as the backend chosen for it needs them; lse is contiguous.

    out and dout (B, H, Sq, Dv) or (T, H, Dv) may have any strides and addresses. At the level of ROWS the spec becomes
    that of their rows too, at UNEXPANDED they are copied where they need it.
    """
    dout, lse = with_adjacent_columns(dout), lse.contiguous()
    if backend.LAYOUT == STRIDED:
        return spec, out, lse, dout, dlse
    out, dlse = with_adjacent_columns(out), None if dlse is None else dlse.contiguous()
    if backend.LAYOUT == ROWS:
        return spec.with_rows(_as_heads(out), _as_heads(dout)), out, lse, dout, dlse
    out, dout = (dense(t) if t.numel() and row_class(_as_heads(t)) < DESCRIBABLE else t for t in (out, dout))
    return spec, out, lse, dout, dlse


def masks_diagonal(backend: ModuleType, call: SoftmaxCall) -> bool:
    """Whether a softmax is causal along neither of the last two dimensions, which kernels have no variant for."""
    return call.causal and call.dim < call.x.dim() - 2 and backend.LAYOUT != STRIDED


def with_diagonal_as_mask(call: SoftmaxCall) -> SoftmaxCall:
    """Such a call with the diagonal in its mask: all entries of a row are on the same side of it."""
    rows, columns = call.x.shape[-2:]
    below = lower_triangle(rows, columns, call.x.device)[(None,) * (call.x.dim() - 2)]
    return replace(call, mask=below if call.mask is None else call.mask & below, causal=False)


def contiguous(backend: ModuleType, tensor: Tensor) -> Tensor:
    """A tensor of row statistics or their gradients, contiguous where the backend's kernels rely on that."""
    return tensor if backend.LAYOUT == STRIDED else tensor.contiguous()


def _as_heads(tensor: Tensor) -> Tensor:
    """(T, H, D) as (1, H, T, D)."""
    return tensor if tensor.dim() == 4 else tensor.transpose(0, 1)[None]


def _with(call: CallT, changed: dict[str, Tensor]) -> CallT:
    made: CallT = replace(call, **changed)  # type: ignore[type-var]
    return made
