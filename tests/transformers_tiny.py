"""Any model type of the installed transformers, made tiny from its config alone, with inputs that its forward takes."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from dataclasses import dataclass
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

BATCH, LENGTH, VOCAB = 2, 10, 128
LAYERS, HEADS, WIDTH = 2, 4, 32

# The class a type is tried with: what computes most of the model, first.
_MAPPINGS = (
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING",
    "MODEL_FOR_MASKED_LM_MAPPING",
    "MODEL_FOR_CAUSAL_LM_MAPPING",
    "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING",
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING",
    "MODEL_MAPPING",
    "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING",
    "MODEL_FOR_BACKBONE_MAPPING",
    "MODEL_FOR_PRETRAINING_MAPPING",
)
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


class CannotBuild(Exception):
    """Why a type cannot be made tiny from its config."""


@dataclass
class Tiny:
    """A model in eval mode, and what its forward takes."""

    model: Any
    arguments: dict[str, Tensor]
    tokens: str | None  # the argument whose positions the probes change
    mask: str | None  # the argument that hides padding


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


def model_classes(config: Any) -> list[Any]:
    """Classes that take a config, the one that does most first."""
    found: list[Any] = []
    for name in _MAPPINGS:
        mapping = getattr(modeling_auto, name, None)
        if mapping is None:
            continue
        try:
            cls = mapping[type(config)]
        except (KeyError, ValueError, AttributeError):
            continue
        found += cls if isinstance(cls, (list, tuple)) else [cls]
    if not found:
        found = [cls for cls in _models_beside(type(config)) if cls.config_class is type(config)]
    if not found:
        raise CannotBuild("no model class takes its config")
    return list(dict.fromkeys(found))


def _models_beside(cls: type) -> list[Any]:
    """The model classes in the modeling files beside a config's."""
    package = importlib.import_module(cls.__module__.rpartition(".")[0])
    found = []
    for info in pkgutil.iter_modules(package.__path__):
        if info.name.startswith("modeling_"):
            module = importlib.import_module(f"{package.__name__}.{info.name}")
            found += [
                c
                for c in vars(module).values()
                if inspect.isclass(c) and issubclass(c, hf.PreTrainedModel) and c.__module__ == module.__name__
                and "forward" in vars(c)
            ]  # fmt: skip
    return found


def build(model_type: str) -> Tiny:
    """A tiny model of a type and inputs that it runs on; CannotBuild says why there is none."""
    errors: list[str] = []
    for sections in (None, [1, 1, 2], [0, 1, 1]):
        if (
            sections is not None
            and "split" not in " ".join(errors)
            and "mrope_section" not in " ".join(errors)
        ):
            break
        torch.manual_seed(0)
        try:
            config = small_config(model_type, sections)
        except Exception as error:
            errors.append(f"config: {_short(error)}")
            continue
        for cls in model_classes(config):
            try:
                return _running(cls, config)
            except CannotBuild as error:
                errors.append(str(error))
    raise CannotBuild("; ".join(dict.fromkeys(errors)))


def _running(cls: Any, config: Any) -> Tiny:
    with torch.device("meta"):
        try:
            size = sum(p.numel() for p in cls(config).parameters())
        except Exception:
            size = 0
    if size > 30_000_000:
        raise CannotBuild(f"{cls.__name__} still has {size / 1e6:.0f} M parameters")
    try:
        model = cls(config).float().eval()
    except Exception as error:
        raise CannotBuild(f"{cls.__name__}: {_short(error)}") from error
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and parameter.numel():
                embeds = "embed" in name or "wte" in name
                parameter.normal_(0, 1.0 if embeds else max(1, parameter[0].numel()) ** -0.5)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    errors = []
    for arguments in _candidates(model, config):
        try:
            with torch.no_grad():
                out = model(**arguments)
        except Exception as error:
            errors.append(_short(error))
            continue
        if not floats(out):
            errors.append("its output has no floating tensor")
            continue
        if any(t.isnan().any() for t in floats(out).values()):
            errors.append("its output has NaN")
            continue
        tokens = next((n for n in ("decoder_input_ids", "input_ids") if n in arguments), None)
        mask = {"input_ids": "attention_mask", "decoder_input_ids": "decoder_attention_mask"}.get(
            tokens or ""
        )
        return Tiny(model, arguments, tokens, mask if mask in _parameters(model) else None)
    raise CannotBuild(f"{cls.__name__}.forward: " + " | ".join(dict.fromkeys(errors)))


def _parameters(model: nn.Module) -> Any:
    return inspect.signature(model.forward).parameters


def _find(config: Any, *names: str) -> Any:
    """A value of the config or of a part of it."""
    for name in names:
        if getattr(config, name, None) is not None:
            return getattr(config, name)
    for key in config.sub_configs:
        if (sub := getattr(config, key, None)) is not None and (found := _find(sub, *names)) is not None:
            return found
    return None


def _candidates(model: Any, config: Any) -> Any:
    """Arguments to try, most likely first."""
    takes = _parameters(model)
    ids = torch.randint(VOCAB - 50, VOCAB, (BATCH, LENGTH))
    channels = _find(config, "num_channels", "in_channels", "in_chans") or 3
    channels = channels if isinstance(channels, int) else 3
    size = _find(config, "image_size", "img_size", "input_image_size") or 32
    height, width = (size, size) if isinstance(size, int) else tuple(size)[:2]
    images = {"pixel_values": torch.randn(BATCH, channels, height, width)}
    text = {"input_ids": ids}
    decoder = {"decoder_input_ids": torch.randint(VOCAB - 50, VOCAB, (BATCH, LENGTH))}
    mels = _find(config, "num_mel_bins", "feature_size", "input_dim") or 8
    features = [torch.randn(BATCH, mels, 128), torch.randn(BATCH, 32, mels), torch.randn(BATCH, mels, 24)]
    if (size_ := _find(config, "feature_projection_input_dim", "input_feat_per_channel")) is not None:
        features.append(torch.randn(BATCH, 32, size_))
    width_ = _find(config, "hidden_size", "d_model") or WIDTH
    parts = []
    if "input_ids" in takes and "decoder_input_ids" in takes:
        parts += [text | decoder]
    if "input_ids" in takes:
        parts += [text]
        if "pixel_values" in takes:
            parts += [text | images]
    if "pixel_values" in takes:
        parts += [images, {"pixel_values": torch.randn(BATCH, 2, channels, height, width)}]
    if "input_features" in takes:
        for feature in features:
            parts += [{"input_features": feature} | decoder, {"input_features": feature}]
    if "input_values" in takes:
        wave = torch.randn(BATCH, 400)
        for value in (wave, wave[:, None], torch.randn(BATCH, 1024, 128), torch.randn(BATCH, 32, mels)):
            parts += [{"input_values": value}]
            if "decoder_input_ids" in takes:
                parts += [{"input_values": value} | decoder]
    if "inputs_embeds" in takes:
        parts += [{"inputs_embeds": torch.randn(BATCH, LENGTH, width_)}]
    if "query_embeds" in takes:
        parts += [
            {
                "query_embeds": torch.randn(BATCH, 4, width_),
                "encoder_hidden_states": torch.randn(BATCH, 6, width_),
            }
        ]
    if "hidden_states" in takes:
        parts += [
            {"hidden_states": torch.randn(BATCH, LENGTH, width_)},
            {"hidden_states": torch.randn(4, channels * 16)},
        ]
    grid = next((n for n in ("grid_thw", "image_grid_thw") if n in takes), None)
    if grid is not None:
        patches = next(n for n in ("pixel_values", "hidden_states", "input_ids") if n in takes)
        for frames in (1, 2):
            flat = torch.randn(32, channels * frames * (_find(config, "patch_size") or 4) ** 2)
            thw = torch.tensor([[1, 4, 4], [1, 4, 4]])
            parts = [
                {patches: flat, grid: thw},
                {patches: flat, grid: thw, "merge_sizes": torch.tensor([1, 1])},
                *parts,
            ]
    if "pixel_position_ids" in takes:
        xy = torch.stack(torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij"), -1).flatten(0, 1)
        flat = torch.randn(BATCH, 16, channels * (_find(config, "patch_size") or 4) ** 2)
        parts.insert(0, {"pixel_values": flat, "pixel_position_ids": xy.expand(BATCH, 16, 2)})
    for name in ("input_features_mask", "audio_mel_mask"):
        if name in takes:
            features_ = "audio_mel" if name == "audio_mel_mask" else "input_features"
            for value in features:
                for length in (value.shape[1], value.shape[2]):
                    parts += [{features_: value, name: torch.ones(BATCH, length, dtype=torch.bool)}]
    if "flattened_patches" in takes:
        flat = torch.randn(BATCH, 16, 2 + 3 * (_find(config, "patch_size") or 4) ** 2)
        flat[..., :2] = torch.arange(16)[:, None]
        parts += [{"flattened_patches": flat} | (decoder if "decoder_input_ids" in takes else {})]
    if "states" in takes:
        shapes = {"states": _find(config, "state_dim") or 17, "actions": _find(config, "act_dim") or 4}
        steps = {
            name: torch.randn(BATCH, 5, size)
            for name, size in {**shapes, "rewards": 1, "returns_to_go": 1}.items()
        }
        parts += [steps | {"timesteps": torch.arange(5).expand(BATCH, 5)}]
    if "qformer_input_ids" in takes:
        for part in list(parts):
            if "pixel_values" in part and "input_ids" in part:
                parts += [part | {"qformer_input_ids": ids[:, :4]}]
    if "past_values_padding" in takes:
        whole = {
            n: torch.zeros(BATCH, size, dtype=torch.int64)
            for n, size in (("past_values_padding", 32), ("freq", 1))
        }
        parts += [{"past_values": torch.randn(BATCH, 32)} | whole]
    if "decoder_input_ids" in takes and "input_ids" not in takes and "pixel_values" in takes:
        parts += [images | decoder]
    if "bbox" in takes:
        boxes = torch.tensor([1, 2, 5, 7]).expand(BATCH, LENGTH, 4)
        parts = [p | {"bbox": boxes} for p in parts] + parts
    if "past_values" in takes:
        steps = (_find(config, "context_length") or 32) + max(_find(config, "lags_sequence") or [0])
        ahead = _find(config, "prediction_length") or 1
        series = {"past_values": torch.randn(BATCH, steps)}
        more = {
            "past_time_features": torch.randn(BATCH, steps, _find(config, "num_time_features") or 0),
            "past_observed_mask": torch.ones(BATCH, steps),
            "future_values": torch.randn(BATCH, ahead),
            "future_time_features": torch.randn(BATCH, ahead, _find(config, "num_time_features") or 0),
        }
        series |= {n: t for n, t in more.items() if n in takes}
        channels_ = _find(config, "num_input_channels") or 1
        parts += [
            series,
            {"past_values": torch.randn(BATCH, _find(config, "context_length") or 32, channels_)},
        ]
    if not parts:
        raise CannotBuild(
            f"{type(model).__name__}.forward takes none of the inputs made here: {', '.join(takes)}"
        )
    yield from parts


def floats(out: Any, prefix: str = "") -> dict[str, Tensor]:
    """Every floating tensor of an output, by name, except caches."""
    found: dict[str, Tensor] = {}
    if isinstance(out, Tensor):
        if out.is_floating_point():
            found[prefix or "out"] = out
    elif isinstance(out, dict):
        for key, value in out.items():
            if "past_key_values" not in str(key) and "cache" not in str(key) and "loss" not in str(key):
                found |= floats(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(out, (list, tuple)):
        for i, value in enumerate(out):
            found |= floats(value, f"{prefix}[{i}]")
    return found


def types() -> list[str]:
    return sorted(CONFIG_MAPPING.keys())


def _short(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
