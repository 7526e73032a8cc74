"""The providers of a step of decoding by name: each turns inputs into a call that appends and attends."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from inputs.decode import DecodeInputs
from measure import calls
from measure.protocols import CannotRun
from peers.attention import sdpa_backend

Attention = Callable[[], Tensor]


def find(name: str) -> Callable[[DecodeInputs], Attention]:
    """The maker of a provider's call."""
    family, _, variant = name.partition("-")
    makers = {"fastattn": fastattn, "sdpa": sdpa, "flex": flex, "flash_attn": flash_attn}
    return lambda work: makers[family](work, variant)


def fastattn(work: DecodeInputs, backend: str) -> Attention:
    """This project's call, on the backend it chooses or on a named one."""
    import fastattn as library

    def call() -> Tensor:
        out = library.attention_kv_cache(
            work.query, work.k_cache, work.v_cache, work.lengths, key=work.key, value=work.value,
            block_table=work.block_table, backend=backend or "auto",
        )  # fmt: skip
        assert isinstance(out, Tensor)
        return out

    if backend:
        calls.unless_refused(call)
    return call


def sdpa(work: DecodeInputs, backend: str) -> Attention:
    """SDPA on the cached part; unequal lengths need a mask over the longest, pages are gathered first."""
    from torch.nn.attention import sdpa_kernel

    case = work.case
    gqa, stop = case.heads != case.kv_heads, case.length + 1
    places = torch.arange(case.batch, device=work.device), work.lengths.long()
    mask = None
    if case.group != "equal":
        mask = (torch.arange(stop, device=work.device) <= work.lengths[:, None])[:, None, None]

    def call() -> Tensor:
        if work.block_table is not None:
            work.append_paged()
            key, value = (work.gathered(cache)[:, :, :stop] for cache in (work.k_cache, work.v_cache))
        else:
            work.append(places)
            key, value = work.k_cache[:, :, :stop], work.v_cache[:, :, :stop]
        with sdpa_kernel(sdpa_backend(backend)) if backend else nullcontext():
            return F.scaled_dot_product_attention(work.query, key, value, attn_mask=mask, enable_gqa=gqa)

    return call


def flex(work: DecodeInputs, _: str) -> Attention:
    """FlexAttention's decoding, compiled for the shape; lengths are a mask_mod."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    case, lengths = work.case, work.lengths
    if work.block_table is not None:
        raise CannotRun("its paged form is experimental")
    places = torch.arange(case.batch, device=work.device), lengths.long()

    def mask_mod(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return j <= lengths[b]

    block_mask = None
    if case.group != "equal":
        block_mask = create_block_mask(
            mask_mod, case.batch, None, 1, case.length + 1, device=str(work.device)
        )
    compiled: Any = torch.compile(flex_attention, dynamic=False)
    gqa = case.heads != case.kv_heads

    def call() -> Tensor:
        work.append(places)
        out: Tensor = compiled(work.query, work.k_cache, work.v_cache, block_mask=block_mask, enable_gqa=gqa)
        return out

    return call


def flash_attn(work: DecodeInputs, _: str) -> Attention:
    """The flash-attn package's own cache kernel, where it is installed."""
    function = import_module("flash_attn").flash_attn_with_kvcache
    if work.case.page % 256:
        raise CannotRun("its pages hold a multiple of 256 tokens")

    def rows(tensor: Tensor) -> Tensor:
        return tensor.transpose(1, 2)

    def call() -> Tensor:
        out: Tensor = function(
            rows(work.query), rows(work.k_cache), rows(work.v_cache), rows(work.key), rows(work.value),
            cache_seqlens=work.lengths, block_table=work.block_table, causal=True,
        )  # fmt: skip
        return rows(out)

    return call
