"""Published models as rows: the fields of a config, the number of parameters, and where the sizes come from."""

from __future__ import annotations

from typing import Any, NamedTuple


class Preset(NamedTuple):
    """The sizes of a published model."""

    fields: dict[str, Any]  # of the config
    parameters: int  # a tied weight counted once
    source: str


_FULL, _SLIDING = "full_attention", "sliding_attention"
_GPT2 = {"model_type": "gpt2", "bos_token_id": 50256, "eos_token_id": 50256}
_LLAMA: dict[str, Any] = {  # what every model of the line has
    "model_type": "llama",
    "positions": "rotary",
    "norm": "rmsnorm",
    "gated_mlp": True,
    "train_pad_embedding": False,
    "activation_function": "silu",
    "bias": False,
    "layer_norm_epsilon": 1e-5,
    "tie_word_embeddings": False,
}
_LLAMA_2 = {**_LLAMA, "vocab_size": 32000, "n_positions": 4096, "bos_token_id": 1, "eos_token_id": 2}
_LLAMA_3 = {
    **_LLAMA,
    "vocab_size": 128256,
    "rope_theta": 500000.0,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
}
_SMOLLM = {
    **_LLAMA,
    "vocab_size": 49152,
    "n_positions": 2048,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
_SMOLLM_135M = {"n_embd": 576, "n_layer": 30, "n_head": 9, "num_kv_heads": 3, "n_inner": 1536}
_SMOLLM_360M = {"n_embd": 960, "n_layer": 32, "n_head": 15, "num_kv_heads": 5, "n_inner": 2560}
_SMOLLM2 = {**_SMOLLM, "n_positions": 8192, "rope_theta": 100000.0}
_MISTRAL = {**_LLAMA, "model_type": "mistral", "vocab_size": 32000, "bos_token_id": 1, "eos_token_id": 2}
_QWEN = {
    **_LLAMA,
    "vocab_size": 151936,
    "rope_theta": 1000000.0,
    "layer_norm_epsilon": 1e-6,
    "tie_word_embeddings": True,
    "bos_token_id": 151643,
    "eos_token_id": 151643,
}
_QWEN2 = {**_QWEN, "model_type": "qwen2", "attention_bias": True, "attention_out_bias": False}
_QWEN3 = {**_QWEN, "model_type": "qwen3", "qk_norm": True}
_GEMMA = {
    **_LLAMA,
    "activation_function": "gelu_pytorch_tanh",
    "head_dim": 256,
    "query_pre_attn_scalar": 256.0,
    "norm_unit_offset": True,
    "sandwich_norms": True,
    "scale_embedding": True,
    "layer_norm_epsilon": 1e-6,
    "tie_word_embeddings": True,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
_GEMMA_2 = {
    **_GEMMA,
    "model_type": "gemma2",
    "vocab_size": 256000,
    "n_positions": 8192,
    "window": 4096,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
}
_GEMMA_3 = {
    **_GEMMA,
    "model_type": "gemma3_text",
    "vocab_size": 262144,
    "n_positions": 32768,
    "window": 512,
    "rope_theta": 1000000.0,
    "rope_local_base_freq": 10000.0,
    "qk_norm": True,
}


def _every_nth_full(layers: int, n: int) -> list[str]:
    """Kinds of layers: sliding ones, and every n-th full."""
    return [_SLIDING if (layer + 1) % n else _FULL for layer in range(layers)]


_RADFORD = "Radford et al. 2019, Language Models are Unsupervised Multitask Learners"
_OWN = "none: small sizes to try things with"

DECODERS: dict[str, Preset] = {
    "nano": Preset(
        {"vocab_size": 4096, "n_positions": 256, "n_embd": 128, "n_layer": 4, "n_head": 4}, 1_350_400, _OWN
    ),
    "micro": Preset(
        {"vocab_size": 8192, "n_positions": 512, "n_embd": 256, "n_layer": 6, "n_head": 4}, 6_967_296, _OWN
    ),
    "gpt2": Preset({**_GPT2, "n_embd": 768, "n_layer": 12, "n_head": 12}, 124_439_808, _RADFORD),
    "gpt2-medium": Preset({**_GPT2, "n_embd": 1024, "n_layer": 24, "n_head": 16}, 354_823_168, _RADFORD),
    "gpt2-large": Preset({**_GPT2, "n_embd": 1280, "n_layer": 36, "n_head": 20}, 774_030_080, _RADFORD),
    "gpt2-xl": Preset({**_GPT2, "n_embd": 1600, "n_layer": 48, "n_head": 25}, 1_557_611_200, _RADFORD),
    "llama-2-7b": Preset(
        {**_LLAMA_2, "n_embd": 4096, "n_layer": 32, "n_head": 32, "n_inner": 11008},
        6_738_415_616,
        "Touvron et al. 2023, Llama 2: Open Foundation and Fine-Tuned Chat Models",
    ),
    "llama-3-8b": Preset(
        {
            **_LLAMA_3,
            "n_positions": 8192,
            "n_embd": 4096,
            "n_layer": 32,
            "n_head": 32,
            "num_kv_heads": 8,
            "n_inner": 14336,
        },
        8_030_261_248,
        "Grattafiori et al. 2024, The Llama 3 Herd of Models",
    ),
    "llama-3.2-1b": Preset(
        {
            **_LLAMA_3,
            "n_positions": 131072,
            "n_embd": 2048,
            "n_layer": 16,
            "n_head": 32,
            "num_kv_heads": 8,
            "n_inner": 8192,
            "tie_word_embeddings": True,
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 32.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
        },
        1_235_814_400,
        "Grattafiori et al. 2024, The Llama 3 Herd of Models; config.json of meta-llama/Llama-3.2-1B",
    ),
    "mistral-7b": Preset(
        {
            **_MISTRAL,
            "n_positions": 32768,
            "n_embd": 4096,
            "n_layer": 32,
            "n_head": 32,
            "num_kv_heads": 8,
            "n_inner": 14336,
            "window": 4096,
        },
        7_241_732_096,
        "Jiang et al. 2023, Mistral 7B (v0.1)",
    ),
    "qwen2-0.5b": Preset(
        {
            **_QWEN2,
            "n_positions": 131072,
            "n_embd": 896,
            "n_layer": 24,
            "n_head": 14,
            "num_kv_heads": 2,
            "n_inner": 4864,
        },
        494_032_768,
        "Yang et al. 2024, Qwen2 Technical Report",
    ),
    "qwen3-0.6b": Preset(
        {
            **_QWEN3,
            "n_positions": 40960,
            "n_embd": 1024,
            "n_layer": 28,
            "n_head": 16,
            "num_kv_heads": 8,
            "head_dim": 128,
            "n_inner": 3072,
        },
        596_049_920,
        "Yang et al. 2025, Qwen3 Technical Report",
    ),
    "smollm-135m": Preset(
        {**_SMOLLM, **_SMOLLM_135M}, 134_515_008, "config.json of HuggingFaceTB/SmolLM-135M"
    ),
    "smollm-360m": Preset(
        {**_SMOLLM, **_SMOLLM_360M}, 361_821_120, "config.json of HuggingFaceTB/SmolLM-360M"
    ),
    "smollm2-135m": Preset(
        {**_SMOLLM2, **_SMOLLM_135M}, 134_515_008, "Ben Allal et al. 2025, SmolLM2: When Smol Goes Big"
    ),
    "smollm2-360m": Preset(
        {**_SMOLLM2, **_SMOLLM_360M}, 361_821_120, "Ben Allal et al. 2025, SmolLM2: When Smol Goes Big"
    ),
    "gemma-2-2b": Preset(
        {
            **_GEMMA_2,
            "n_embd": 2304,
            "n_layer": 26,
            "n_head": 8,
            "num_kv_heads": 4,
            "n_inner": 9216,
            "layer_types": _every_nth_full(26, 2),
        },
        2_614_341_888,
        "Gemma Team 2024, Gemma 2: Improving Open Language Models at a Practical Size",
    ),
    "gemma-3-270m": Preset(
        {
            **_GEMMA_3,
            "n_embd": 640,
            "n_layer": 18,
            "n_head": 4,
            "num_kv_heads": 1,
            "n_inner": 2048,
            "layer_types": _every_nth_full(18, 6),
        },
        268_098_176,
        "Gemma Team 2025, Gemma 3 Technical Report; config.json of google/gemma-3-270m",
    ),
    "gemma-3-1b": Preset(
        {
            **_GEMMA_3,
            "n_embd": 1152,
            "n_layer": 26,
            "n_head": 4,
            "num_kv_heads": 1,
            "n_inner": 6912,
            "layer_types": _every_nth_full(26, 6),
        },
        999_885_952,
        "Gemma Team 2025, Gemma 3 Technical Report",
    ),
}


def alternating_layers(num_layers: int, every: int) -> tuple[str, ...]:
    """Layer types where every `every`-th layer, from the first on, is full and the others are local."""
    return tuple(_SLIDING if i % every else _FULL for i in range(num_layers))


# What makes a family, besides sizes: the fields in which it differs from BERT.
FAMILY_FIELDS: dict[str, dict[str, Any]] = {
    "bert": {},
    "roberta": {
        "vocab_size": 50265, "layer_norm_eps": 1e-5, "max_position_embeddings": 514, "type_vocab_size": 1,
        "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "position_offset": 2,
        "classifier_input_dropout": True, "lm_activation": "gelu",
    },
    "distilbert": {
        "num_hidden_layers": 6, "type_vocab_size": 0, "pooler": False, "classifier_activation": "relu",
        "classifier_dropout": 0.2, "token_dropout": 0.1, "qa_dropout": 0.1,
    },
    "electra": {
        "embedding_size": 128, "hidden_size": 256, "num_attention_heads": 4, "intermediate_size": 1024,
        "pooler": False, "classifier_activation": "gelu", "classifier_input_dropout": True, "lm_activation": "gelu",
    },
    "modernbert": {
        "vocab_size": 50368, "num_hidden_layers": 22, "intermediate_size": 1152, "max_position_embeddings": 8192,
        "type_vocab_size": 0, "layer_norm_eps": 1e-5, "pad_token_id": 50283, "bos_token_id": 50281,
        "eos_token_id": 50282, "cls_token_id": 50281, "sep_token_id": 50282, "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0, "mlp_dropout": 0.0, "embedding_dropout": 0.0,
        "attention_output_dropout": 0.0, "positions": "rotary", "pre_norm": True, "gated_mlp": True,
        "attention_bias": False, "mlp_bias": False, "norm_bias": False, "pooler": False,
        "classifier_activation": "gelu", "classifier_norm": True, "classifier_bias": False,
        "classifier_dropout": 0.0, "qa_dropout": None, "token_dense": True, "qa_dense": True, "lm_activation": "gelu",
        "lm_bias": False,
    },
}  # fmt: skip

_MINILM = {"hidden_size": 384, "num_attention_heads": 12, "intermediate_size": 1536}
_LARGE = {
    "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096,
}  # fmt: skip


def _encoder(model_type: str, parameters: int, source: str, **sizes: Any) -> Preset:
    return Preset({"model_type": model_type, **FAMILY_FIELDS[model_type], **sizes}, parameters, source)


_BERT = "Devlin et al. 2018, BERT: Pre-training of Deep Bidirectional Transformers"
_ROBERTA = "Liu et al. 2019, RoBERTa: A Robustly Optimized BERT Pretraining Approach"
_ELECTRA = "Clark et al. 2020, ELECTRA: Pre-training Text Encoders as Discriminators"
_MODERNBERT = "Warner et al. 2024, Smarter, Better, Faster, Longer (ModernBERT)"
ENCODERS: dict[str, Preset] = {
    "bert-base-uncased": _encoder("bert", 109_482_240, _BERT),
    "bert-base-cased": _encoder("bert", 108_310_272, _BERT, vocab_size=28996),
    "bert-large-uncased": _encoder("bert", 335_141_888, _BERT, **_LARGE),
    "minilm-l6": _encoder(
        "bert", 22_713_216, "config.json of sentence-transformers/all-MiniLM-L6-v2", **_MINILM, num_hidden_layers=6
    ),
    "minilm-l12": _encoder(
        "bert", 33_360_000, "Wang et al. 2020, MiniLM: Deep Self-Attention Distillation", **_MINILM
    ),
    "roberta-base": _encoder("roberta", 124_645_632, _ROBERTA),
    "roberta-large": _encoder("roberta", 355_359_744, _ROBERTA, **_LARGE),
    "distilbert-base-uncased": _encoder(
        "distilbert", 66_362_880, "Sanh et al. 2019, DistilBERT, a distilled version of BERT"
    ),
    "electra-small": _encoder("electra", 13_483_008, _ELECTRA),
    "electra-base": _encoder(
        "electra", 108_891_648, _ELECTRA, embedding_size=768, hidden_size=768, num_attention_heads=12,
        intermediate_size=3072,
    ),
    "modernbert-base": _encoder("modernbert", 149_014_272, _MODERNBERT, layer_types=alternating_layers(22, 3)),
    "modernbert-large": _encoder(
        "modernbert", 394_781_696, _MODERNBERT, layer_types=alternating_layers(28, 3), hidden_size=1024,
        num_hidden_layers=28, num_attention_heads=16, intermediate_size=2624,
    ),
}  # fmt: skip
