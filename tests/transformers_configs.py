"""Configs of any model type of the installed transformers with every size reduced."""

from __future__ import annotations

from typing import Any

from transformers.models.auto.configuration_auto import CONFIG_MAPPING

BATCH, LENGTH, VOCAB = 2, 10, 128
LAYERS, HEADS, WIDTH = 2, 4, 32
_SIZES: dict[str, Any] = {
    **dict.fromkeys(
        ("hidden_size", "d_model", "n_embd", "dim", "emb_dim", "word_embed_proj_dim", "embedding_size", "hidden_dim",
         "projection_dim", "encoder_hidden_size", "decoder_hidden_size", "out_hidden_size", "text_hidden_size",
         "projector_hidden_size", "classifier_proj_size", "feat_extract_dim", "shared_expert_intermediate_size",
         "moe_intermediate_size", "expert_intermediate_size", "audio_hidden_size", "vision_hidden_size",
         "embedding_dim", "output_dim", "image_embed_dim", "codebook_dim", "bottleneck_dim", "true_hidden_size",
         "d_embed", "adapter_out_dim", "hidden_size_per_layer_input"), WIDTH),
    **dict.fromkeys(
        ("intermediate_size", "encoder_ffn_dim", "decoder_ffn_dim", "d_ff", "ffn_dim", "mlp_dim", "n_inner",
         "ffn_hidden_size", "inner_dim", "decoder_intermediate_size", "encoder_intermediate_size", "d_inner",
         "shared_intermediate_size"), 64),
    **dict.fromkeys(
        ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers", "depth",
         "num_encoder_layers", "num_decoder_layers", "decoder_num_hidden_layers", "encoder_num_hidden_layers",
         "resampler_depth", "layers", "decoder_num_layers", "encoder_num_layers"), LAYERS),
    **dict.fromkeys(
        ("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads", "decoder_attention_heads",
         "attention_heads", "decoder_num_attention_heads", "encoder_num_attention_heads", "linear_num_heads",
         "linear_num_value_heads", "resampler_n_heads", "index_n_heads", "swa_num_attention_heads"), HEADS),
    "linear_num_key_heads": 2,
    **dict.fromkeys(
        ("head_dim", "d_kv", "qk_nope_head_dim", "v_head_dim", "qk_rope_head_dim", "linear_key_head_dim",
         "linear_value_head_dim", "linear_head_dim", "resampler_head_dim", "swa_head_dim", "global_head_dim",
         "index_head_dim", "attention_head_dim", "attention_head_size", "rotary_dim", "swa_v_head_dim", "dim_head",
         "kv_channels"), 8),
    "qk_head_dim": 16, "q_lora_rank": 16, "kv_lora_rank": 16, "o_lora_rank": 8, "o_groups": 2,
    **dict.fromkeys(("vocab_size", "codebook_size", "tgt_vocab_size", "src_vocab_size"), VOCAB),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "max_source_positions",
                     "max_target_positions", "n_ctx"), 64),
    "num_local_experts": 4, "num_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4,
    "num_experts_per_tok": 2, "moe_topk": 2, "moe_k": 2, "n_group": 1, "topk_group": 1, "n_shared_experts": 1,
    "first_k_dense_replace": 1, "num_nextn_predict_layers": 0,
    "sliding_window": 4, "local_attention": 4, "attention_window": 4, "window_size": 4, "attention_chunk_size": 4,
    "sliding_window_size": 4,
    "image_size": 16, "patch_size": 4, "num_mel_bins": 8, "num_labels": 3, "type_vocab_size": 2,
    "mamba_d_state": 8, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "state_size": 8, "chunk_size": 4,
    "mamba_num_heads": 8, "mamba_head_dim": 8, "ssm_state_size": 8, "n_groups": 1, "mamba_chunk_size": 4,
    "conv_dim": (16, 16), "conv_kernel": (4, 4), "conv_stride": (2, 2), "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "mask_time_prob": 0.0,
    "num_image_tokens": 4, "temporal_patch_size": 1, "num_frames": 2, "query_pre_attn_scalar": 8,
    "rotary_pct": 1.0, "index_topk": 4, "layerdrop": 0.0, "encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0,
    "vocab_size_per_layer_input": VOCAB, "num_kv_shared_layers": 0, "laurel_rank": 4, "max_window_layers": 1,
    "mlp_only_layers": [], "decoder_sparse_step": 1, "num_query_tokens": 4, "num_latents": 4, "d_latents": WIDTH,
    "block_size": 4, "num_random_blocks": 1, "scale_depth": 1.0, "attn_types": None,
}  # fmt: skip
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1, "cls_token_id": 1,
           "sep_token_id": 2, "mask_token_id": 3}  # fmt: skip
_KEY_HEADS = ("num_key_value_heads", "num_kv_heads", "multi_query_group_num", "swa_num_key_value_heads",
              "num_global_key_value_heads")  # fmt: skip
_PER_LAYER = ("layer_types", "mlp_layer_types", "layers_block_type", "no_rope_layers", "layer_rope_theta",
              "indexer_types", "attention_types", "mlp_types")  # fmt: skip
# What no rule gives: per type, changes to what the rules say.
SPECIAL: dict[str, dict[str, Any]] = {
    "autoformer": {"prediction_length": 4, "context_length": 12, "lags_sequence": [1, 2], "feature_size": 5},
    "informer": {"prediction_length": 4, "context_length": 12, "lags_sequence": [1, 2]},
    "time_series_transformer": {"prediction_length": 4, "context_length": 12, "lags_sequence": [1, 2]},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "bigbird_pegasus": {"attention_type": "original_full"},
    "big_bird": {"attention_type": "original_full"},
    "reformer": {"axial_pos_embds": False},
    "gemma4_text": {"global_head_dim": 16},
    "gemma4_unified_text": {"global_head_dim": 16},
    "embedding_gemma2_text": {"global_head_dim": 16},
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
    },
    "bamba": {"attn_layer_indices": [1]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "falcon_h1": {"mamba_d_ssm": 64},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "speech_to_text": {"input_feat_per_channel": 8},
    "layoutlmv3": {"coordinate_size": 5, "shape_size": 6, "input_size": 16},
    "esm": {"vocab_size": VOCAB, "pad_token_id": 0, "mask_token_id": 3},
    "lilt": {"hidden_size": 24, "channel_shrink_ratio": 1},
    "cohere_compass_text": {"layer_types": ["full_attention", "sliding_attention"]},
    "granite_speech5_encoder": {"context_size": 16},
    "esmc": {"num_key_value_heads": HEADS},
    "glm5_next": {"num_key_value_heads": HEADS},
}


def small_config(model_type: str, sections: list[int] | None = None) -> Any:
    """A config with every size reduced that has a name known here."""
    cls = CONFIG_MAPPING[model_type]
    options = _reduced(cls()) | SPECIAL.get(model_type, {})
    if sections is not None:
        _set_sections(options, sections)
    config = cls(**options)
    _cut(config)
    return config


def _set_sections(options: dict[str, Any], sections: list[int]) -> None:
    """Rotary positions of several axes, whose default sections are those of a large head."""
    if isinstance(
        rope := options.get("rope_parameters") or {"rope_type": "default", "rope_theta": 10000.0}, dict
    ):
        options["rope_parameters"] = rope | {"mrope_section": sections}
    for value in options.values():
        if isinstance(value, dict) and "model_type" in value and "hidden_size" in value:
            _set_sections(value, sections)


def _reduced(config: Any) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for name, value in vars(config).items():
        if name.startswith("_"):
            continue
        if name in config.sub_configs:
            if value is not None:
                options[name] = {"model_type": value.model_type} | _reduced(value)
        elif name in _PER_LAYER and isinstance(value, (list, tuple)):
            options[name] = _two_kinds(list(value))
        elif name == "image_size" and isinstance(value, (list, tuple)):
            options[name] = type(value)([_SIZES[name]] * len(value))
        elif name == "head_dim" and value is None:
            options[name] = _SIZES[name]
        elif name in _KEY_HEADS:
            heads = getattr(config, "num_attention_heads", None) or getattr(config, "n_head", None)
            options[name] = HEADS if value in (None, heads) else 2
        elif (
            name in ("rope_parameters", "rope_scaling")
            and isinstance(value, dict)
            and "mrope_section" in value
        ):
            options[name] = value | {"mrope_section": [1, 1, 2]}
        elif (
            name in _SIZES
            and value is not None
            and type(value) in (type(_SIZES[name]), list, tuple, float, int)
        ):
            if isinstance(value, (list, tuple)) == isinstance(_SIZES[name], (list, tuple)):
                options[name] = _SIZES[name]
        elif name in _TOKENS and value is not None:
            options[name] = _TOKENS[name]
        elif name.endswith(("_token_id", "_token_index")) and isinstance(value, int):
            options[name] = 4 + sum(map(ord, name)) % (VOCAB - 60)  # below what inputs are drawn from
    return options


def _two_kinds(layers: list[Any]) -> list[Any]:
    """Two layers, of two kinds where there are two."""
    first = layers[0]
    other = next((kind for kind in layers if kind != first), first)
    return [first, other]


def _cut(config: Any) -> None:
    for name in _PER_LAYER:
        value = getattr(config, name, None)
        if isinstance(value, (list, tuple)) and len(value) > LAYERS:
            setattr(config, name, list(value)[:LAYERS])
    config._experts_implementation = "eager"
