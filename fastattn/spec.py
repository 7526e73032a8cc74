"""Calls and specs: the tensors and options of one call, and the hashable summary that a backend decides on.

Shape legend, used by every file:
    B batch    H query heads    Hkv key/value heads    Sq, Sk query/key lengths    D head dim    Dv value dim
Tensors are logical (B, H, S, D) with any strides; lse is (B, H, Sq) float32 (float64 for float64), natural log.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastattn.strides import ALIGNED, ALIGNMENT, DESCRIBABLE, passes_32_bits, row_class

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MAX_HEAD_DIM = 256
TMA_ARCH = 90  # the first architecture with TMA
# With at most so many key/value heads, kernels whose programs own keys have too few programs.
FEW_KV_HEADS = 2


# Calls are never changed; they are not frozen because that doubles the time to make one, which matters for one query.
@dataclass(slots=True)
class AttentionCall:
    """One attention call, normalised: every optional tensor has its full rank and every option its plain type."""

    query: Tensor  # (B, H, Sq, D)
    key: Tensor  # (B, Hkv, Sk, D)
    value: Tensor  # (B, Hkv, Sk, Dv)
    mask: Tensor | None = None  # bool, True = attend; 4-D, each size 1 or that of (B, H, Sq, Sk)
    bias: Tensor | None = None  # any float dtype; 4-D, each size 1 or that of (B, H, Sq, Sk)
    query_segments: Tensor | None = None  # (B, Sq) int32
    key_segments: Tensor | None = None  # (B, Sk) int32, given together with query_segments
    key_lengths: Tensor | None = None  # (B,) int32, each within [0, Sk]
    alibi_slopes: Tensor | None = None  # (1 or B, H) in the accumulation dtype
    sinks: Tensor | None = None  # (H,) in the accumulation dtype
    dropout_seed: Tensor | None = None  # one int64 element on the query's device; given iff dropout_p > 0
    causal: str = "none"  # "none" | "bottom_right" | "top_left"
    window_left: int = -1  # keys visible before the query's position; -1 = unbounded
    window_right: int = -1  # and after it
    softcap: float = 0.0  # 0 = none
    dropout_p: float = 0.0
    scale: float = 1.0

    @property
    def position_shift(self) -> int:
        """pos(i) = i + position_shift: where query i stands among the keys."""
        return 0 if self.causal == "top_left" else self.key.shape[2] - self.query.shape[2]

    @property
    def group_size(self) -> int:
        """Query heads served by one key/value head."""
        return self.query.shape[1] // max(self.key.shape[1], 1)


@dataclass(slots=True)
class VarlenCall:
    """One call on packed sequences: sequence b owns tokens cu_seqlens[b] .. cu_seqlens[b + 1]."""

    query: Tensor  # (T, H, D)
    key: Tensor  # (Tk, Hkv, D)
    value: Tensor  # (Tk, Hkv, Dv)
    cu_seqlens_q: Tensor  # (B + 1,) int32, ascending from 0
    cu_seqlens_k: Tensor  # (B + 1,) int32
    alibi_slopes: Tensor | None = None  # (1 or B, H) in the accumulation dtype
    sinks: Tensor | None = None  # (H,) in the accumulation dtype
    dropout_seed: Tensor | None = None  # one int64 element on the query's device; given iff dropout_p > 0
    max_seqlen_q: int = -1  # upper bounds of the lengths; -1 = not given
    max_seqlen_k: int = -1
    causal: str = "none"
    window_left: int = -1
    window_right: int = -1
    softcap: float = 0.0
    dropout_p: float = 0.0
    scale: float = 1.0

    def as_one_sequence(self) -> AttentionCall:
        """The packed tokens as a single (1, H, T, D) sequence: what a spec is made of."""
        query, key, value = (t.transpose(0, 1)[None] for t in (self.query, self.key, self.value))
        return AttentionCall(
            query, key, value, alibi_slopes=self.alibi_slopes, sinks=self.sinks, dropout_seed=self.dropout_seed,
            causal=self.causal, window_left=self.window_left, window_right=self.window_right, softcap=self.softcap,
            dropout_p=self.dropout_p, scale=self.scale,
        )  # fmt: skip

    def sequence(self, b: int, rows: slice, cols: slice) -> AttentionCall:
        """Sequence b by itself, a (1, H, S, D) view of its tokens."""
        whole = self.as_one_sequence()
        slopes = self.alibi_slopes
        if slopes is not None and slopes.shape[0] > 1:
            slopes = slopes[b : b + 1]
        return replace(
            whole, query=whole.query[:, :, rows], key=whole.key[:, :, cols], value=whole.value[:, :, cols],
            alibi_slopes=slopes,
        )  # fmt: skip


@dataclass(slots=True)
class KVCacheCall:
    """One call against a key/value cache; Sn new keys per sequence are appended first where given."""

    query: Tensor  # (B, H, Sq, D)
    k_cache: Tensor  # (B, Hkv, S, D), or paged (P, Hkv, page, D); written to
    v_cache: Tensor  # (B, Hkv, S, Dv), or paged (P, Hkv, page, Dv); written to
    cache_lengths: Tensor  # (B,) int32: tokens in the cache before the append
    key: Tensor | None = None  # (B, Hkv, Sn, D)
    value: Tensor | None = None  # (B, Hkv, Sn, Dv)
    block_table: Tensor | None = None  # (B, pages) int32: indices of a sequence's pages in a paged cache
    rotary_cos: Tensor | None = None  # (positions, rotary_dim / 2)
    rotary_sin: Tensor | None = None
    alibi_slopes: Tensor | None = None  # (1 or B, H) in the accumulation dtype
    sinks: Tensor | None = None  # (H,) in the accumulation dtype
    rotary_interleaved: bool = False  # pairs (0, 1), (2, 3) ... instead of (0, r / 2), (1, r / 2 + 1) ...
    causal: str = "bottom_right"
    window_left: int = -1
    window_right: int = -1
    softcap: float = 0.0
    scale: float = 1.0
    num_splits: int = 0  # pieces a kernel cuts the keys into; 0 = its own choice

    @property
    def new_keys(self) -> int:
        """Sn."""
        return 0 if self.key is None else self.key.shape[2]

    @property
    def capacity(self) -> int:
        """Tokens a sequence may have."""
        page = self.k_cache.shape[2]
        return page if self.block_table is None else page * self.block_table.shape[1]

    def attending(
        self, query: Tensor, key: Tensor, value: Tensor, alibi_slopes: Tensor | None
    ) -> AttentionCall:
        """The attention of queries to keys that are in place, with this call's options."""
        return AttentionCall(
            query, key, value, alibi_slopes=alibi_slopes, sinks=self.sinks, causal=self.causal,
            window_left=self.window_left, window_right=self.window_right, softcap=self.softcap, scale=self.scale,
        )  # fmt: skip


class AttentionGrads(NamedTuple):
    """Gradients of one call, each in its tensor's own shape and dtype; None where it was not asked for."""

    query: Tensor | None
    key: Tensor | None
    value: Tensor | None
    bias: Tensor | None = None
    alibi_slopes: Tensor | None = None
    sinks: Tensor | None = None


class GradsNeeded(NamedTuple):
    """Which gradients a backward call must produce."""

    query: bool = True
    key: bool = True
    value: bool = True
    bias: bool = False
    alibi_slopes: bool = False
    sinks: bool = False


class WeightsGradsNeeded(NamedTuple):
    """Which gradients the backward of the weights must produce, in this order."""

    query: bool = True
    key: bool = True
    lse: bool = True
    bias: bool = False
    alibi_slopes: bool = False


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """The properties of a call by which a kernel is chosen: no lengths, batch or strides, only classes of them."""

    device: str  # "cpu", "cuda", ...
    arch: int | None  # 10 * major + minor of a CUDA device, else None
    dtype: torch.dtype
    head_dim: int
    value_dim: int
    group_size: int
    causal: str
    window_left: bool
    window_right: bool
    mask: bool
    bias: bool
    segments: bool
    key_lengths: bool
    alibi: bool
    softcap: bool
    sinks: bool
    dropout: bool
    float32_precision: str  # "ieee" (torch's 'highest') | "tf32"; "ieee" for every other dtype
    single_query: bool  # Sq == 1
    aligned: bool  # every row of q, k, v begins at a multiple of 16 bytes
    describable: bool  # and TMA descriptors can describe them: nothing is empty or expanded
    int64_offsets: bool  # some element offset passes 2**31
    few_kv_heads: bool = False  # FEW_KV_HEADS at most
    backward: bool = False
    bias_grad: bool = False
    alibi_grad: bool = False

    @staticmethod
    def of(call: AttentionCall, needs: GradsNeeded | None = None) -> AttentionSpec:
        """The spec of a forward call, or of its backward when the needed gradients are given. Needs real tensors."""
        query, key, value = call.query, call.key, call.value
        rows = min(row_class(query), row_class(key), row_class(value))
        return _attention_spec(
            device=query.device.type,
            arch=arch_of(query) if query.is_cuda else None,
            dtype=query.dtype,
            head_dim=query.shape[3],
            value_dim=value.shape[3],
            group_size=call.group_size,
            causal=call.causal,
            window_left=call.window_left >= 0,
            window_right=call.window_right >= 0,
            mask=call.mask is not None,
            bias=call.bias is not None,
            segments=call.query_segments is not None,
            key_lengths=call.key_lengths is not None,
            alibi=call.alibi_slopes is not None,
            softcap=call.softcap != 0.0,
            sinks=call.sinks is not None,
            dropout=call.dropout_p > 0.0,
            float32_precision=float32_precision(query.dtype),
            single_query=query.shape[2] == 1,
            aligned=rows >= ALIGNED,
            describable=rows == DESCRIBABLE,
            int64_offsets=passes_32_bits(query, key, value, call.mask, call.bias),
            few_kv_heads=key.shape[1] <= FEW_KV_HEADS,
            backward=needs is not None,
            bias_grad=needs is not None and needs.bias,
            alibi_grad=needs is not None and needs.alibi_slopes,
        )

    @property
    def unit(self) -> int:
        """Elements that strides of operands and results count: 16 bytes where all are multiples of it, else one."""
        unit = ALIGNMENT // self.dtype.itemsize
        return unit if self.aligned and not (self.head_dim % unit or self.value_dim % unit) else 1

    @property
    def fits_tma(self) -> bool:
        """Whether TMA can load the operands: from Hopper on, of 16-bit dtypes, whose products run on wgmma."""
        return self.describable and self.dtype.itemsize == 2 and (self.arch is None or self.arch >= TMA_ARCH)

    def with_rows(self, *tensors: Tensor) -> AttentionSpec:
        """The spec of a kernel that reads the rows of these tensors (B, H, S, D) too."""
        rows = min(map(row_class, tensors))
        aligned, describable = self.aligned and rows >= ALIGNED, self.describable and rows == DESCRIBABLE
        if (aligned, describable) == (self.aligned, self.describable):
            return self
        return self.replace(aligned=aligned, describable=describable)

    def features(self) -> tuple[str, ...]:
        """Names of the features in use, for messages and tables."""
        names = [f.name for f in fields(self) if f.type == "bool" and getattr(self, f.name)]
        classes = ("single_query", "aligned", "describable", "int64_offsets", "few_kv_heads", "backward")
        return tuple(n for n in names if n not in classes)

    def replace(self, **changes: Any) -> AttentionSpec:
        """A copy with some fields changed."""
        return replace(self, **changes)


_attention_spec = lru_cache(maxsize=4096)(AttentionSpec)  # distinct specs are few, and slow to make


@dataclass(slots=True)
class SoftmaxCall:
    """One softmax: exp(scale * x) over its sum along `dim`, or the logarithm of that."""

    x: Tensor  # any shape, at least 1-D
    mask: Tensor | None  # bool, True = keep; of x's rank, each size 1 or x's
    dim: int  # 0 or more
    scale: float
    causal: bool  # entry (i, j) of the last two dims stays where j <= i + columns - rows
    log: bool
    dtype: torch.dtype  # of the result


@dataclass(frozen=True, slots=True)
class CrossEntropyCall:
    """One cross-entropy per row of logits."""

    logits: Tensor  # (N, V)
    target: Tensor  # (N,) int64
    ignore_index: int  # rows with this target have loss 0
    label_smoothing: float
    class_weight: Tensor | None = None  # (V,) in the accumulation dtype, contiguous
    z_loss: float = 0.0  # factor on lse**2

    def weight_mean(self) -> Tensor | None:
        """The mean of the class weights, where label smoothing needs it: one element."""
        return self.class_weight.mean() if self.class_weight is not None and self.label_smoothing else None


@dataclass(frozen=True, slots=True)
class LinearCrossEntropyCall:
    """One cross-entropy per row of softcap(hidden @ weight.T + bias)."""

    hidden: Tensor  # (N, E)
    weight: Tensor  # (V, E)
    bias: Tensor | None  # (V,)
    target: Tensor  # (N,) int64
    ignore_index: int
    label_smoothing: float
    softcap: float  # 0 = none
    class_weight: Tensor | None = None  # (V,) in the accumulation dtype, contiguous
    z_loss: float = 0.0  # factor on lse**2


@dataclass(frozen=True, slots=True)
class SoftmaxSpec:
    """The properties of a softmax or a cross-entropy by which a kernel is chosen: the class of its rows."""

    device: str
    arch: int | None  # 10 * major + minor of a CUDA device, else None
    dtype: torch.dtype  # of the input
    columns: int  # the row length rounded up to a power of two
    unit_columns: bool  # neighbours in a row are neighbours in memory
    int64_offsets: bool  # some offset within a row, or across a tile of rows, may pass 2**31
    mask: bool = False
    causal: bool = False
    log: bool = False
    backward: bool = False
    aligned: bool = False  # every row along the last dimension begins at a multiple of 16 bytes

    @classmethod
    def of(
        cls,
        x: Tensor,
        dim: int = -1,
        *,
        mask: bool = False,
        causal: bool = False,
        log: bool = False,
        backward: bool = False,
    ) -> SoftmaxSpec:
        """The spec of rows along `dim` of x. Needs a real tensor."""
        return cls(
            device=x.device.type,
            arch=arch_of(x) if x.is_cuda else None,
            dtype=x.dtype,
            columns=1 << max(x.shape[dim] - 1, 0).bit_length(),
            unit_columns=x.stride(dim) == 1 or x.shape[dim] == 1,
            int64_offsets=x.numel() >= 2**31 or (not x.is_contiguous() and passes_32_bits(x)),
            mask=mask,
            causal=causal,
            log=log,
            backward=backward,
            aligned=row_class(x) >= ALIGNED,
        )

    def replace(self, **changes: Any) -> SoftmaxSpec:
        """A copy with some fields changed."""
        return replace(self, **changes)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype scores, lse and sums are kept in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def arch_of(tensor: Tensor) -> int | None:
    """10 * major + minor of a CUDA device, None of any other."""
    if tensor.device.type != "cuda":
        return None
    major, minor = torch.cuda.get_device_capability(tensor.device)
    return 10 * major + minor


def float32_precision(dtype: torch.dtype) -> str:
    """How products of float32 are rounded, "ieee" or "tf32"; "ieee" for every other dtype."""
    if dtype != torch.float32:
        return "ieee"
    try:
        return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
    except RuntimeError:
        # It was set by torch.backends.*.fp32_precision, which the older getter does not follow.
        return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


with warnings.catch_warnings():  # torch 2.9 warns at the first look, not of anything its user did
    warnings.simplefilter("ignore")
    float32_precision(torch.float32)
