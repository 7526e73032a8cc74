"""Sizes of small random models, and every kind of GPT, for the tests of models."""

from __future__ import annotations

from typing import Any

import torch

from fastattn.models import GPT, GPTConfig

VOCAB = 61
GPT2: dict[str, Any] = {
    "vocab_size": VOCAB,
    "n_positions": 64,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "initializer_range": 0.3,  # by which the likeliest tokens stand out
}
BERT: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}
# Name -> what the config has besides the sizes.
KINDS: dict[str, dict[str, Any]] = {
    "learned": {},
    "rotary": {"positions": "rotary"},
    "alibi": {"positions": "alibi"},
    "gqa, window, qk_norm": {"positions": "rotary", "num_kv_heads": 2, "window": 5, "qk_norm": True},
    "no bias, untied": {"bias": False, "tie_word_embeddings": False, "n_inner": 40},
    "sinusoidal": {"positions": "sinusoidal", "scale_embedding": True},
    "llama": {
        "positions": "rotary",
        "norm": "rmsnorm",
        "gated_mlp": True,
        "activation_function": "silu",
        "bias": False,
        "num_kv_heads": 2,
        "n_inner": 44,
        "tie_word_embeddings": False,
    },
    "gemma": {
        "positions": "rotary",
        "rope_scaling": {"rope_type": "linear", "factor": 2.0},
        "rope_local_base_freq": 100.0,
        "layer_types": ["sliding_attention", "full_attention"],
        "window": 5,
        "norm": "rmsnorm",
        "norm_unit_offset": True,
        "sandwich_norms": True,
        "qk_norm": True,
        "head_dim": 12,
        "num_kv_heads": 1,
        "query_pre_attn_scalar": 20.0,
        "attn_logit_softcapping": 4.0,
        "final_logit_softcapping": 6.0,
        "scale_embedding": True,
        "gated_mlp": True,
        "activation_function": "gelu_pytorch_tanh",
        "bias": False,
        "attention_bias": True,
        "attention_out_bias": False,
    },
}


def make_gpt(dtype: torch.dtype = torch.float64, *, seed: int = 0, **options: Any) -> GPT:
    """A GPT in eval mode with random weights."""
    torch.manual_seed(seed)
    return GPT(GPTConfig(**{**GPT2, **options})).to(dtype).eval()
