"""Attention's providers by name: each turns a workload into a function of (query, key, value), or raises CannotRun."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from inputs.attention import AttentionInputs
from measure.protocols import CannotRun

Attention = Callable[[Tensor, Tensor, Tensor], Any]  # takes query, key and value, returns out


def find(name: str) -> Callable[[AttentionInputs], Attention]:
    """The maker of a provider's attention."""
    family, _, variant = name.partition("-")
    makers = {
        "fastattn": fastattn,
        "sdpa": sdpa,
        "composite": composite,
        "flex": flex,
        "flash_attn": flash_attn,
        "xformers": xformers,
    }
    return lambda work: makers[family](work, variant)


def fastattn(work: AttentionInputs, backend: str) -> Attention:
    """This project's call, on the backend it chooses or on a named one."""
    import fastattn as library

    try:
        library.explain(work.query, work.key, work.value, **work.options, backend=backend or "auto")
    except RuntimeError as refusal:
        raise CannotRun(str(refusal)) from None
    return lambda q, k, v: library.attention(q, k, v, **work.options, backend=backend or "auto")


def sdpa(work: AttentionInputs, backend: str) -> Attention:
    """torch.nn.functional.scaled_dot_product_attention, pinned to a backend where one is named.

    Options without an argument of SDPA (windows, documents, ALiBi) are passed as the equivalent dense mask, built
    beforehand; with the backend "dense" all options are.
    """
    from torch.nn.attention import sdpa_kernel

    case = work.case
    if case.softcap:
        raise CannotRun("it has no softcap")
    dense, backend = backend == "dense", "" if backend == "dense" else backend
    oblong = case.causal and case.seqlen_q != case.seqlen_k
    if (dense or oblong) and not (work.needs_dense_mask or case.alibi or case.bias):
        mask: Tensor | None = work.dense_mask()
    else:
        mask = (
            work.dense_additive_mask()
            if case.alibi or case.bias
            else work.dense_mask()
            if work.needs_dense_mask
            else None
        )
    is_causal = case.causal and mask is None
    gqa = case.kv_heads != case.heads

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(sdpa_backend(backend)) if backend else nullcontext():
            return F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, dropout_p=case.dropout_p, is_causal=is_causal, enable_gqa=gqa
            )

    return call


def sdpa_backend(name: str) -> Any:
    """torch's name for a backend of its SDPA."""
    from torch.nn.attention import SDPBackend

    return {
        "cudnn": SDPBackend.CUDNN_ATTENTION,
        "flash": SDPBackend.FLASH_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
        "math": SDPBackend.MATH,
    }[name]


def composite(work: AttentionInputs, variant: str) -> Attention:
    """The formula as one writes it in torch, eager or compiled: scores and weights are tensors; mask and bias were
    built beforehand.
    """
    case = work.case
    mask = work.dense_mask() if work.needs_dense_mask or case.causal else None
    bias = work.dense_bias() if case.alibi or case.bias else None
    group = case.heads // case.kv_heads

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if group > 1:
            k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        scores = q @ k.mT * case.head_dim**-0.5
        if case.softcap:
            scores = case.softcap * torch.tanh(scores / case.softcap)
        if bias is not None:
            scores = scores + bias
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        weights = torch.softmax(scores, -1)
        return F.dropout(weights, case.dropout_p) @ v

    compiled: Attention = torch.compile(call, dynamic=False) if variant == "compile" else call
    return compiled


def flex(work: AttentionInputs, _: str) -> Attention:
    """torch's FlexAttention, compiled; its block mask is built before the timing."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    case = work.case
    if case.dropout_p:
        raise CannotRun("it has no dropout")
    if case.random_mask:
        raise CannotRun("a dense random mask can be a mask_mod only as a lookup of every element")
    if work.device.type == "cpu" and case.direction != "forward":
        raise CannotRun("it has no backward on the CPU")
    block_mask = None
    if case.causal or case.window or case.documents > 1:
        lengths = case.seqlen_q, case.seqlen_k
        block_mask = create_block_mask(_flex_mask(work), None, None, *lengths, device=str(work.device))
    compiled: Any = torch.compile(flex_attention, dynamic=False)
    score_mod, gqa = _flex_score(work), case.kv_heads != case.heads
    return lambda q, k, v: compiled(q, k, v, score_mod=score_mod, block_mask=block_mask, enable_gqa=gqa)


def _flex_mask(work: AttentionInputs) -> Callable[..., Tensor]:
    case, shift = work.case, work.case.seqlen_k - work.case.seqlen_q
    left, right = case.window or (-1, -1)
    segments = work.segments()

    def mask_mod(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        distance = i + shift - j
        visible = distance >= 0 if case.causal else distance == distance
        if left >= 0:
            visible = visible & (distance <= left)
        if right >= 0:
            visible = visible & (-distance <= right)
        if segments is not None:
            visible = visible & (segments[0, i + shift] == segments[0, j])
        return visible

    return mask_mod


def _flex_score(work: AttentionInputs) -> Callable[..., Tensor] | None:
    case, shift = work.case, work.case.seqlen_k - work.case.seqlen_q
    if case.alibi:
        slopes = work.slopes()
        return lambda score, b, h, i, j: score - slopes[h] * (i + shift - j).abs()
    if case.softcap:
        return lambda score, b, h, i, j: case.softcap * torch.tanh(score / case.softcap)
    if case.bias:
        bias = work.bias()
        return lambda score, b, h, i, j: score + bias[0, h, i, j]
    return None


def flash_attn(work: AttentionInputs, _: str) -> Attention:
    """The flash-attn package's own kernels, where it is installed."""
    flash_attn_func = import_module("flash_attn").flash_attn_func

    case = work.case
    if case.bias or case.random_mask or case.documents > 1:
        raise CannotRun("flash_attn_func has no mask, bias or documents")
    slopes = work.slopes() if case.alibi else None
    window = case.window or (-1, -1)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = flash_attn_func(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            dropout_p=case.dropout_p,
            causal=case.causal,
            window_size=window,
            softcap=case.softcap,
            alibi_slopes=slopes,
        )
        return out.transpose(1, 2)

    return call


def xformers(work: AttentionInputs, _: str) -> Attention:
    """xFormers' memory-efficient attention, where it is installed."""
    fmha = import_module("xformers.ops.fmha")
    case = work.case
    if case.softcap or case.documents > 1 or case.window or case.kv_heads != case.heads:
        raise CannotRun("the bench does not have this case for xFormers")
    mask = fmha.attn_bias.LowerTriangularMask() if case.causal else None
    if case.alibi or case.bias:
        mask = work.dense_additive_mask()
    elif case.random_mask:
        visible = work.dense_mask().expand(-1, case.heads, -1, -1)
        zero = torch.zeros((), dtype=case.dtype, device=work.device)
        mask = torch.where(visible, zero, -torch.inf)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows = (t.transpose(1, 2) for t in (q, k, v))
        out: Tensor = fmha.memory_efficient_attention(*rows, attn_bias=mask, p=case.dropout_p)
        return out.transpose(1, 2)

    return call
