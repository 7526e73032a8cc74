"""The parts of a GPT that `GPTDecoder` uses, and the check that it computes the same as the model's forward."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import nn

from fastattn import torch_compat
from fastattn.models.config import GPTConfig
from fastattn.nn.attention import MultiHeadAttention, keep_forward
from fastattn.nn.blocks import Mlp, PostNormBlock, PreNormBlock, Transform
from fastattn.nn.cross_attention import CrossAttention
from fastattn.nn.kv_cache import KVCache
from fastattn.nn.linear import Linear
from fastattn.nn.norms import RMSNorm
from fastattn.nn.positions import Rotary


class Decodable(Protocol):
    """The parts of a GPT, which imports this file."""

    config: GPTConfig
    quantized: str | None
    wte: nn.Embedding
    wpe: nn.Embedding | None
    wtt: nn.Embedding | None
    ln_emb: nn.Module | None
    rotary: dict[str, Rotary]
    h: nn.ModuleList
    ln_f: nn.Module
    lm_transform: Transform | None
    lm_head: Linear

    def new_cache(self, batch: int, capacity: int) -> list[KVCache]: ...


def can_decode(model: Decodable) -> bool:
    """Whether a decoder computes what the model's forward does: the modules are the usual ones, without hooks, adapters
    or parametrisations, and autocast is off.
    """
    if torch.is_autocast_enabled(model.wte.weight.device.type) or torch.compiler.is_compiling():
        return False
    expected: list[tuple[nn.Module, type]] = [(model.wte, nn.Embedding), (model.lm_head, Linear)]
    norm = nn.LayerNorm if model.config.norm == "layernorm" else RMSNorm
    expected.append((model.ln_f, nn.Identity if model.config.post_norm else norm))
    expected += [(table, nn.Embedding) for table in (model.wpe, model.wtt) if table is not None]
    if model.ln_emb is not None:
        expected.append((model.ln_emb, norm))
    if (head := model.lm_transform) is not None:
        expected += [(head, Transform), (head.dense, Linear), (head.norm or nn.Identity(), norm)]
    kind = PostNormBlock if model.config.post_norm else PreNormBlock
    for block in model.h:
        expected.append((block, kind))
        if type(block) is not kind or type(block.mlp) is not Mlp:
            return False
        if (cross := block.cross_attn) is not None:
            expected += [(cross, CrossAttention), (block.ln_cross or cross, norm)]
            expected += [(product, Linear) for product in (cross.q, cross.kv, cross.out_proj)]
        if type(block.attn) is not MultiHeadAttention or not _as_gpt_makes(block.attn):
            return False
        mlp = block.mlp
        expected += [(mlp, Mlp), (mlp.c_fc, Linear), (mlp.c_proj, Linear)]
        norms = (block.ln_1, block.ln_1_out, block.ln_2, block.ln_2_out)
        expected += [(module, norm) for module in norms if module is not None]
        expected.append((block.attn.out_proj, type(block.attn.out_proj)))
    return all(type(module) is usual and not torch_compat.has_hooks(module) for module, usual in expected)


def _as_gpt_makes(attn: MultiHeadAttention) -> bool:
    hooks = torch_compat.hooks_of(attn)
    return (
        hooks is not None
        and all(hook is keep_forward for hook in hooks)
        and attn.in_proj_weight is not None
        and attn.bias_k is None
        and not attn.add_zero_attn
        and attn.rotary is None
    )
