"""The decoder families as small random models: transformers' config of each, and both models with the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastattn.models import GPT
from fastattn.models.checkpoint import DECODERS, Family
from fastattn.models.checkpoint.names import to_file

VOCAB = 61
ORIGINAL = 16  # tokens that the rotary frequencies are meant for
FIRST_ID = 3  # below it are the special ones
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": ORIGINAL,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GPT2_SIZES = {
    "vocab_size": VOCAB,
    "n_embd": 32,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 4 * ORIGINAL,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    **dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0),
}


def _rope(kind: str, **numbers: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 500.0, **numbers}}


_LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": 5}
# Name -> the beginning of transformers' class names, and what its config has besides the sizes.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2", {}),
    "llama": ("Llama", {}),
    "llama, biases": (
        "Llama",
        {"attention_bias": True, "mlp_bias": True, "head_dim": 12, "hidden_act": "gelu", "num_key_value_heads": 4},
    ),
    "smollm": ("Llama", {"tie_word_embeddings": True, "num_key_value_heads": 1, "rms_norm_eps": 1e-5}),
    "linear": ("Llama", _rope("linear", factor=2.0)),
    "dynamic": ("Llama", _rope("dynamic", factor=2.0)),
    "yarn": ("Llama", _rope("yarn", factor=2.0, original_max_position_embeddings=ORIGINAL // 2)),
    "yarn, its own numbers": (
        "Llama",
        _rope("yarn", factor=4.0, mscale=0.7, mscale_all_dim=0.9, beta_fast=6.0, beta_slow=0.5, truncate=False),
    ),
    "llama3": ("Llama", _rope("llama3", original_max_position_embeddings=ORIGINAL // 2, **_LLAMA3)),
    "mistral": ("Mistral", {"sliding_window": 5}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2, windows": ("Qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "gemma2": ("Gemma2", {**_GEMMA, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0}),
    "gemma3": ("Gemma3", {**_GEMMA, "layer_types": ["sliding_attention", "sliding_attention", "full_attention"]}),
}  # fmt: skip


def make_theirs(name: str) -> Any:
    """transformers' model of a family in float32 on eager attention, every parameter random."""
    import transformers

    kind, options = FAMILIES[name]
    sizes = GPT2_SIZES if kind == "GPT2" else SIZES
    config = getattr(transformers, f"{kind}TextConfig" if kind == "Gemma3" else f"{kind}Config")
    head = "GPT2LMHeadModel" if kind == "GPT2" else f"{kind}ForCausalLM"
    torch.manual_seed(sorted(FAMILIES).index(name))
    model = getattr(transformers, head)._from_config(
        config(**{**sizes, **options}), attn_implementation="eager"
    )
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
            elif path.endswith(("wte.weight", "embed_tokens.weight")):
                parameter.mul_(0.1)  # a tied head would else repeat the last token
    return model.eval()


def make_both(name: str, folder: Path) -> tuple[Any, GPT]:
    """transformers' model of a family, and ours read from the folder that it saved itself to."""
    theirs = make_theirs(name)
    theirs.save_pretrained(folder)
    return theirs, GPT.from_pretrained(folder)


def family_of(model: GPT) -> Family:
    """The family that a model was read as."""
    return next(f for f in DECODERS if f.model_type == model.config.model_type)


def in_their_names(model: GPT, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of our parameters' names and shapes under transformers' names, a tied weight once."""
    return to_file(tensors, model.config, family_of(model))


def parameters_of(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Parameters by name, a tied one once."""
    return dict(model.named_parameters())


def tokens(*shape: int) -> Tensor:
    """Random ids of no special token."""
    return torch.randint(FIRST_ID, VOCAB, shape)
