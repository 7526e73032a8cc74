"""The families Llama, Mistral, Qwen and Gemma: their tensor names and the defaults of their config.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastattn.models.checkpoint.dialects import Dialect
from fastattn.models.checkpoint.names import Family, Part
from fastattn.models.config import GPTConfig

_SHARED_FIELDS: dict[str, Any] = {
    "positions": "rotary",
    "norm": "rmsnorm",
    "gated_mlp": True,
    "bias": False,
    "train_pad_embedding": False,
}


def _heads(config: GPTConfig) -> tuple[int, int, int]:
    """Rows of the projections of queries, keys and values."""
    keys = config.kv_heads * config.head_dim
    return config.n_head * config.head_dim, keys, keys


def _block(ours: str, *theirs: str) -> Part:
    sizes = _heads if len(theirs) == 3 else None
    return Part(f"h.{{i}}.{ours}", tuple(f"model.layers.{{i}}.{name}" for name in theirs), sizes=sizes)


def _parts(norms: Mapping[str, str]) -> tuple[Part, ...]:
    packed = {
        "attn.in_proj_": ("self_attn.q_proj.", "self_attn.k_proj.", "self_attn.v_proj."),
        "attn.out_proj.": ("self_attn.o_proj.",),
        "mlp.c_fc.": ("mlp.gate_proj.", "mlp.up_proj."),
        "mlp.c_proj.": ("mlp.down_proj.",),
    }
    return (
        Part("wte.weight", ("model.embed_tokens.weight",)),
        *(_block(f"{ours}.weight", f"{theirs}.weight") for ours, theirs in norms.items()),
        *(
            _block(ours + kind, *(name + kind for name in theirs))
            for ours, theirs in packed.items()
            for kind in ("weight", "bias")
        ),
        _block("attn.q_norm.weight", "self_attn.q_norm.weight"),
        _block("attn.k_norm.weight", "self_attn.k_norm.weight"),
        Part("ln_f.weight", ("model.norm.weight",)),
        Part("lm_head.weight", ("lm_head.weight",)),
    )


_PRE_NORMS = {"ln_1": "input_layernorm", "ln_2": "post_attention_layernorm"}
_SANDWICH = {
    "ln_1": "input_layernorm",
    "ln_1_out": "post_attention_layernorm",
    "ln_2": "pre_feedforward_layernorm",
    "ln_2_out": "post_feedforward_layernorm",
}


def _family(model_type: str, name: str, dialect: Dialect) -> Family:
    return Family(
        model_type=model_type,
        architectures=(f"{name}ForCausalLM", f"{name}Model"),
        parts=_parts(_SANDWICH if dialect.fields.get("sandwich_norms") else _PRE_NORMS),
        prefix="model.",
        other_prefix="transformer.",  # of question answering
        dropped=(
            "layers.*.self_attn.rotary_emb.inv_freq",  # a buffer that old files carry
            "score.*",  # heads of transformers' other classes
            "classifier.*",
            "qa_outputs.*",
        ),
        read_config=dialect.read,
        write_config=lambda config: dialect.write(config, model_type),
    )


_LLAMA_DEFAULTS: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "attention_dropout": 0.0,
    "tie_word_embeddings": False,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_QWEN_DEFAULTS = {
    **_LLAMA_DEFAULTS,
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "bos_token_id": None,
    "eos_token_id": None,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
_GEMMA_DEFAULTS = {
    **{key: value for key, value in _LLAMA_DEFAULTS.items() if key != "hidden_act"},
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
    "attention_bias": False,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
}
_ACT = {"hidden_act": "activation_function"}
_BIAS = {"attention_bias": "attention_bias"}
_GEMMA_KEYS = {
    "hidden_activation": "activation_function",
    **_BIAS,
    "query_pre_attn_scalar": "query_pre_attn_scalar",
    "final_logit_softcapping": "final_logit_softcapping",
}
_GEMMA_FIELDS = {
    **_SHARED_FIELDS,
    "norm_unit_offset": True,
    "sandwich_norms": True,
    "scale_embedding": True,
}
_LLAMA = Dialect(
    keys={**_ACT, **_BIAS, "mlp_bias": "mlp_bias"},
    fields=_SHARED_FIELDS,
    defaults={**_LLAMA_DEFAULTS, "attention_bias": False, "mlp_bias": False},
)
_MISTRAL = Dialect(
    keys=_ACT,
    fields=_SHARED_FIELDS,
    defaults={
        **_LLAMA_DEFAULTS,
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 4096 * 32,
        "sliding_window": 4096,
    },
    windows="all",
)
_QWEN2 = Dialect(
    keys=_ACT,
    fields={**_SHARED_FIELDS, "attention_bias": True, "attention_out_bias": False},
    defaults=_QWEN_DEFAULTS,
    windows="switched",
)
_QWEN3 = Dialect(
    keys={**_ACT, **_BIAS},
    fields={**_SHARED_FIELDS, "qk_norm": True},
    defaults={**_QWEN_DEFAULTS, "head_dim": 128, "attention_bias": False},
    windows="switched",
)
_GEMMA2 = Dialect(
    keys={**_GEMMA_KEYS, "attn_logit_softcapping": "attn_logit_softcapping"},
    fields=_GEMMA_FIELDS,
    defaults={
        **_GEMMA_DEFAULTS,
        "vocab_size": 256000,
        "max_position_embeddings": 8192,
        "final_logit_softcapping": 30.0,
        "attn_logit_softcapping": 50.0,
    },
    windows="layer_types",
    full_every=2,
    fixed={
        "use_bidirectional_attention": False,
        "sliding_window_pattern": 2,  # transformers' model reads layer_types only
    },
    ignored=("hidden_act",),
)
_GEMMA3 = Dialect(
    keys=_GEMMA_KEYS,
    fields={**_GEMMA_FIELDS, "qk_norm": True},
    defaults={
        **_GEMMA_DEFAULTS,
        "vocab_size": 262208,
        "max_position_embeddings": 131072,
        "final_logit_softcapping": None,
    },
    theta=1000000.0,
    local_theta=10000.0,
    windows="layer_types",
    full_every=6,
    fixed={
        "use_bidirectional_attention": False,
        "attn_logit_softcapping": None,  # transformers' model does not apply it
    },
    ignored=("hidden_act",),
)

LLAMA_LINE: tuple[Family, ...] = (
    _family("llama", "Llama", _LLAMA),
    _family("mistral", "Mistral", _MISTRAL),
    _family("qwen2", "Qwen2", _QWEN2),
    _family("qwen3", "Qwen3", _QWEN3),
    _family("gemma2", "Gemma2", _GEMMA2),
    _family("gemma3_text", "Gemma3", _GEMMA3),
)
