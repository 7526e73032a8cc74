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
from transformers_configs import BATCH, LENGTH, VOCAB, WIDTH, small_config

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


class CannotBuild(Exception):
    """Why a type cannot be made tiny from its config."""


@dataclass
class Tiny:
    """A model in eval mode, and what its forward takes."""

    model: Any
    arguments: dict[str, Tensor]
    tokens: str | None  # the argument whose positions the probes change
    mask: str | None  # the argument that hides padding


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
