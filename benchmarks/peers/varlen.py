"""The providers of packed sequences by name: each turns a workload into its call, its inputs and dout."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import nullcontext
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from inputs.varlen import DROPOUT_SEED, VarlenInputs
from measure import calls
from measure.protocols import CannotRun
from peers.attention import sdpa_backend

Made = tuple[calls.Call, dict[str, Tensor], Tensor]


def find(name: str) -> Callable[[VarlenInputs], Made]:
    """The maker of a provider."""
    family, _, variant = name.partition("-")
    if family == "sdpa":
        kind, _, backend = variant.partition("-")
        return {"padded": lambda work: padded(work, backend), "loop": loop}[kind]
    if family == "fastattn":
        return lambda work: fastattn(work, variant)
    makers = {"flex": flex, "nested": nested, "varlen_attn": varlen_attn}
    return {**makers, "flash_attn": flash_attn, "xformers": xformers}[family]


def fastattn(work: VarlenInputs, backend: str) -> Made:
    """This project's call, on the backend it chooses or on a named one."""
    from fastattn import attention_varlen

    cu_seqlens, longest = work.cu_seqlens, work.longest
    causal, dropout_p, name = work.case.causal, work.case.dropout_p, backend or "auto"

    def call(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return attention_varlen(
            query, key, value, cu_seqlens, cu_seqlens, longest, longest, causal=causal, dropout_p=dropout_p,
            dropout_seed=DROPOUT_SEED if dropout_p else None,
            backend=name,
        )  # fmt: skip

    if backend:
        calls.unless_refused(lambda: call(*work.inputs.values()))
    return call, work.inputs, work.dout


def padded(work: VarlenInputs, backend: str) -> Made:
    """SDPA on (B, H, longest, D) tensors padded behind, with a mask of the padding unless causality hides it.

    Queries in the padding are computed; their results are unused and their upstream gradients 0.
    """
    from torch.nn.attention import sdpa_kernel

    case = work.case
    mask = None
    if not case.causal:
        lengths = torch.tensor(case.lengths, device=work.device)
        mask = (torch.arange(work.longest, device=work.device) < lengths[:, None])[:, None, None]
    gqa = case.heads != case.kv_heads

    def call(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        with sdpa_kernel(sdpa_backend(backend)) if backend else nullcontext():
            return F.scaled_dot_product_attention(
                query,
                key,
                value,
                attn_mask=mask,
                dropout_p=case.dropout_p,
                is_causal=case.causal,
                enable_gqa=gqa,
            )

    def pad(packed: Tensor) -> Tensor:
        shape = (case.batch, packed.shape[1], work.longest, packed.shape[2])
        rows = packed.new_zeros(shape)
        for number, length in enumerate(case.lengths):
            start = work.starts[number]
            rows[number, :, :length] = packed.detach()[start : start + length].transpose(0, 1)
        return rows

    inputs = calls.leaves_of({name: pad(tensor) for name, tensor in work.inputs.items()}, case.direction)
    return call, inputs, pad(work.dout)


def loop(work: VarlenInputs) -> Made:
    """SDPA once per sequence, on views of the packed tensors."""
    case, gqa = work.case, work.case.heads != work.case.kv_heads

    def call(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        parts = []
        for start, stop in itertools.pairwise(work.starts):
            q, k, v = (t[start:stop].transpose(0, 1)[None] for t in (query, key, value))
            out = F.scaled_dot_product_attention(
                q, k, v, dropout_p=case.dropout_p, is_causal=case.causal, enable_gqa=gqa
            )
            parts.append(out[0].transpose(0, 1))
        return torch.cat(parts)

    return call, work.inputs, work.dout


def nested(work: VarlenInputs) -> Made:
    """SDPA on torch's nested tensors in the jagged layout."""
    case = work.case
    if case.heads != case.kv_heads:
        raise CannotRun("its nested path has no grouped heads")

    def call(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        q, k, v = (
            torch.nested.nested_tensor_from_jagged(
                t, work.cu_seqlens, max_seqlen=work.longest, min_seqlen=min(case.lengths)
            ).transpose(1, 2)
            for t in (query, key, value)
        )
        out = F.scaled_dot_product_attention(q, k, v, is_causal=case.causal)
        values: Tensor = out.transpose(1, 2).values()
        return values

    return call, work.inputs, work.dout


def flex(work: VarlenInputs) -> Made:
    """FlexAttention, compiled for the shape; the block mask of the documents is built beforehand."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    case = work.case
    if work.device.type == "cpu" and case.direction != "forward":
        raise CannotRun("it has no backward on the CPU")
    lengths = torch.tensor(case.lengths, device=work.device)
    document = torch.repeat_interleave(torch.arange(case.batch, device=work.device), lengths)

    def mask_mod(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        alike = document[i] == document[j]
        return alike & (i >= j) if case.causal else alike

    block_mask = create_block_mask(mask_mod, None, None, work.tokens, work.tokens, device=str(work.device))
    compiled: Any = torch.compile(flex_attention, dynamic=False)
    gqa = case.heads != case.kv_heads

    def call(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out: Tensor = compiled(query, key, value, block_mask=block_mask, enable_gqa=gqa)
        return out

    rows = {name: tensor.detach().transpose(0, 1)[None] for name, tensor in work.inputs.items()}
    return call, calls.leaves_of(rows, case.direction), work.dout.transpose(0, 1)[None]


def varlen_attn(work: VarlenInputs) -> Made:
    """torch's own packed attention; it needs a GPU."""
    if work.device.type != "cuda":
        raise CannotRun("it has CUDA kernels only")
    if work.case.heads != work.case.kv_heads:
        raise CannotRun("it has no grouped heads in this version of torch")
    torch_varlen = import_module("torch.nn.attention.varlen").varlen_attn
    window = (-1, 0) if work.case.causal else (-1, -1)  # causal
    cu_seqlens, longest = work.cu_seqlens, work.longest

    def call(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out: Tensor = torch_varlen(
            query, key, value, cu_seqlens, cu_seqlens, longest, longest, window_size=window
        )
        return out

    return call, work.inputs, work.dout


def flash_attn(work: VarlenInputs) -> Made:
    """The flash-attn package's packed kernels, where it is installed."""
    function = import_module("flash_attn").flash_attn_varlen_func
    cu_seqlens, longest = work.cu_seqlens, work.longest

    def call(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out: Tensor = function(
            query, key, value, cu_seqlens, cu_seqlens, longest, longest, causal=work.case.causal
        )
        return out

    return call, work.inputs, work.dout


def xformers(work: VarlenInputs) -> Made:
    """xFormers' memory-efficient attention under a block-diagonal mask, where it is installed."""
    fmha = import_module("xformers.ops.fmha")
    if work.case.heads != work.case.kv_heads:
        raise CannotRun("the bench does not have grouped heads for xFormers")
    mask = fmha.attn_bias.BlockDiagonalMask.from_seqlens(work.case.lengths)
    mask = mask.make_causal() if work.case.causal else mask

    def call(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        rows = (t[None] for t in (query, key, value))
        out: Tensor = fmha.memory_efficient_attention(*rows, attn_bias=mask)
        return out[0]

    return call, work.inputs, work.dout
