"""An attention call to measure, and its random inputs in every form that a provider takes."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from report import figures, schema


@dataclass(frozen=True)
class AttentionCall:
    """One call to measure: its sizes, features and target."""

    name: str
    group: str
    batch: int
    heads: int
    kv_heads: int
    seqlen_q: int
    seqlen_k: int
    head_dim: int
    dtype: torch.dtype = torch.float32
    direction: str = "forward+backward"
    causal: bool = False
    window: tuple[int, int] | None = None
    documents: int = 1  # packed in one row, of equal length
    alibi: bool = False
    softcap: float = 0.0
    bias: bool = False  # (1, H, Sq, Sk), with its gradient
    random_mask: bool = False  # (B, 1, Sq, Sk), nine in ten visible
    dropout_p: float = 0.0
    target: schema.Result | None = None
    peers: tuple[str, ...] = ()  # () = those of a GPU, and ours by backend

    @property
    def params(self) -> schema.Result:
        """The sizes and the features in use, for the result."""
        hidden = ("name", "group", "dtype", "direction", "target", "peers")
        sizes = ("batch", "heads", "kv_heads", "seqlen_q", "seqlen_k", "head_dim", "causal")
        params = {k: v for k, v in asdict(self).items() if k not in hidden and (v or k in sizes)}
        if self.documents == 1:
            del params["documents"]
        return params

    @property
    def label(self) -> str:
        """The call in words."""
        return figures.describe_attention(self.params, schema.dtype_name(self.dtype), self.direction)

    @property
    def axis(self) -> schema.Result | None:
        """Speed over length, for groups whose cases differ only in it; the grids have charts of their own."""
        if self.group not in ("dense", "window") or self.dtype != torch.float32:
            return None
        if self.group == "dense" and not self.causal:
            return None
        line = f"window ({self.window[0]}, {self.window[1]})" if self.window else "causal"
        return {"name": "sequence length", "value": self.seqlen_q, "line": line}

    @property
    def bytes(self) -> float | None:
        """None: arithmetic bounds it."""
        return None

    @property
    def flops(self) -> float:
        """2 * (D + Dv) per permitted pair and head; the backward counts as 2.5 forwards, recomputation excluded."""
        pairs = permitted_pairs(self.seqlen_q, self.seqlen_k, self.causal, self.window, self.documents)
        share = {"forward": 1.0, "backward": 2.5, "forward+backward": 3.5}[self.direction]
        return share * 4.0 * self.head_dim * pairs * self.batch * self.heads


class AttentionInputs:
    """The inputs of one case, the same for every provider."""

    def __init__(self, case: AttentionCall, device: torch.device) -> None:
        self.case, self.device = case, device
        generator = torch.Generator(device).manual_seed(7)

        def normal(heads: int, length: int) -> Tensor:
            shape = (case.batch, heads, length, case.head_dim)
            return torch.randn(shape, generator=generator, device=device, dtype=torch.float32).to(case.dtype)

        self.query, self.dout = normal(case.heads, case.seqlen_q), normal(case.heads, case.seqlen_q)
        self.key, self.value = normal(case.kv_heads, case.seqlen_k), normal(case.kv_heads, case.seqlen_k)
        self.needs_dense_mask = bool(case.window or case.documents > 1 or case.random_mask)
        self.wants_grad = case.direction != "forward"
        self.inputs = {"dq": self.query, "dk": self.key, "dv": self.value}
        for tensor in self.inputs.values():
            tensor.requires_grad_(self.wants_grad)
        if case.bias:
            shape = (1, case.heads, case.seqlen_q, case.seqlen_k)
            self._bias = torch.randn(shape, generator=generator, device=device).to(case.dtype)
            self.inputs["dbias"] = self._bias.requires_grad_(self.wants_grad)
        self._random = None
        if case.random_mask:
            shape = (case.batch, 1, case.seqlen_q, case.seqlen_k)
            self._random = torch.rand(shape, generator=generator, device=device) < 0.9

    @cached_property
    def options(self) -> dict[str, Any]:
        """The case as fastattn.attention's options."""
        case = self.case
        options: dict[str, Any] = {
            "causal": case.causal,
            "window": case.window,
            "softcap": case.softcap or None,
        }
        options |= {"segment_ids": self.segments(), "alibi_slopes": self.slopes() if case.alibi else None}
        options |= {"bias": self._bias if case.bias else None, "mask": self._random}
        if case.dropout_p:
            options |= {"dropout_p": case.dropout_p, "dropout_seed": 11}
        return {name: value for name, value in options.items() if value is not None}

    def segments(self) -> Tensor | None:
        """(B, S) document numbers, or None for a single document."""
        case = self.case
        if case.documents == 1:
            return None
        ids = torch.arange(case.seqlen_k, device=self.device) * case.documents // case.seqlen_k
        return ids.to(torch.int32).expand(case.batch, -1).contiguous()

    def slopes(self) -> Tensor:
        """(H,) ALiBi slopes."""
        return alibi_slopes(self.case.heads, self.device)

    def bias(self) -> Tensor:
        """The (1, H, Sq, Sk) learned bias."""
        return self._bias

    def dense_mask(self) -> Tensor:
        """(1 or B, 1, Sq, Sk) bool: causality, window, documents and mask of the case."""
        case = self.case
        rows = torch.arange(case.seqlen_q, device=self.device)[:, None] + case.seqlen_k - case.seqlen_q
        distance = rows - torch.arange(case.seqlen_k, device=self.device)
        visible = torch.ones_like(distance, dtype=torch.bool)
        if case.causal:
            visible &= distance >= 0
        if case.window:
            visible &= (distance <= case.window[0]) & (-distance <= case.window[1])
        segments = self.segments()
        if segments is not None:
            visible &= segments[0, -case.seqlen_q :, None] == segments[0]
        return visible[None, None] if self._random is None else visible & self._random

    def dense_bias(self) -> Tensor:
        """(1, H, Sq, Sk) in the case's dtype: the learned bias, or ALiBi's."""
        case = self.case
        if case.bias:
            return self._bias
        rows = torch.arange(case.seqlen_q, device=self.device)[:, None] + case.seqlen_k - case.seqlen_q
        distance = (rows - torch.arange(case.seqlen_k, device=self.device)).abs()
        return (-self.slopes()[:, None, None] * distance)[None].to(case.dtype)

    def dense_additive_mask(self) -> Tensor:
        """The bias with -inf where the case forbids a pair."""
        bias = self.dense_bias()
        if not (self.case.causal or self.needs_dense_mask):
            return bias
        return bias.masked_fill(~self.dense_mask(), float("-inf"))


def permitted_pairs(
    seqlen_q: int,
    seqlen_k: int,
    causal: bool = False,
    window: tuple[int, int] | None = None,
    documents: int = 1,
) -> int:
    """Permitted pairs of a query and a key, counted row by row."""
    position = torch.arange(seqlen_q) + seqlen_k - seqlen_q
    first, last = torch.zeros_like(position), torch.full_like(position, seqlen_k - 1)
    if causal:
        last = torch.minimum(last, position)
    if window:
        first = torch.maximum(first, position - window[0])
        last = torch.minimum(last, position + window[1])
    if documents > 1:
        number = position * documents // seqlen_k
        begin = (number * seqlen_k + documents - 1) // documents
        end = ((number + 1) * seqlen_k + documents - 1) // documents
        first, last = torch.maximum(first, begin), torch.minimum(last, end - 1)
    return int((last - first + 1).clamp_min(0).sum())


def alibi_slopes(heads: int, device: torch.device) -> Tensor:
    """The geometric slopes 2^(-8 (h + 1) / H) of the ALiBi paper."""
    return torch.tensor([math.pow(2.0, -8.0 * (head + 1) / heads) for head in range(heads)], device=device)
