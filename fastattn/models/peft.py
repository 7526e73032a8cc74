"""Adapter folders in PEFT's format, read onto our models and written from them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import safetensors.torch
import torch
from torch import Tensor, nn

from fastattn.models.checkpoint.families import family_for
from fastattn.models.checkpoint.folder import ADAPTER_CONFIG as ADAPTER_CONFIG
from fastattn.models.checkpoint.folder import ADAPTER_PICKLED, open_tensors, read_json
from fastattn.models.checkpoint.folder import ADAPTER_WEIGHTS as ADAPTER_WEIGHTS
from fastattn.models.checkpoint.hub import resolve_folder
from fastattn.models.checkpoint.names import Family
from fastattn.models.checkpoint.pretrained import Pretrained
from fastattn.models.checkpoint.swap import naming, write_folder
from fastattn.models.lora import Block, adapters_of, add_adapters, blocks_of
from fastattn.models.lora_layers import check_not_quantized

Model = TypeVar("Model", bound=nn.Module)

_FRONT = "base_model.model."
_TENSOR = re.compile(r"(.*)\.lora_([AB])(?:\.default)?\.weight")
# Options that we compute at these values only.
_FIXED: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "use_dora": (False,),
    "lora_bias": (False,),
    "modules_to_save": (None, []),
    "layer_replication": (None,),
    "trainable_token_indices": (None, [], {}),
    "target_parameters": (None, []),
    "use_qalora": (False,),
    "alora_invocation_tokens": (None,),
    "arrow_config": (None,),
    "megatron_config": (None,),
    "loftq_config": (None, {}),
    # others change the base model's weights when the adapter is made
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),
}
_HONOURED = ("r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern")
_IGNORED = (  # where adapters are, which follows from the tensors' names, and how they were made
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "fan_in_fan_out",
    "task_type",
    "base_model_name_or_path",
    "revision",
    "auto_mapping",
    "inference_mode",
    "peft_version",
    "megatron_core",
    "eva_config",
    "corda_config",
    "qalora_group_size",
    "runtime_config",
    "ensure_weight_tying",
)
# PEFT adds whole heads to the adapters of other tasks, which ours do not hold: those are written without a task.
_TASKS = (
    ("LMHeadModel", "CAUSAL_LM"),
    ("ForCausalLM", "CAUSAL_LM"),
    ("EncoderDecoderModel", "SEQ_2_SEQ_LM"),
    ("Model", "FEATURE_EXTRACTION"),
)


def load_adapter(model: Model, path_or_id: str | Path) -> Model:
    """Attach the adapters of a PEFT folder or hub repository; returns the model, with everything else frozen.

    r, lora_alpha, use_rslora, lora_dropout and the patterns of ranks and alphas are honoured.

    Args:
        model: one of ours, of the family that the adapters were trained for; changed in place.
        path_or_id: a folder, or a repository's name on the Hugging Face hub.

    Raises:
        ValueError: an option that would change the result and is not computed here (use_dora, modules_to_save, biases,
            ...), by name; tensors that are missing, left over, of another shape or not finite, all listed; or a model
            that is quantized.
    """
    check_not_quantized(model)
    folder = resolve_folder(path_or_id)
    config = read_json(folder / ADAPTER_CONFIG)
    try:
        r, alpha, dropout, rslora = _read_options(config)
    except ValueError as error:
        raise ValueError(f"adapter: {folder / ADAPTER_CONFIG}: {error}") from None
    path = folder / (ADAPTER_WEIGHTS if (folder / ADAPTER_WEIGHTS).is_file() else ADAPTER_PICKLED)
    if not path.is_file():
        raise ValueError(f"adapter: {folder} has neither {ADAPTER_WEIGHTS} nor {ADAPTER_PICKLED}")
    file = open_tensors(path)
    family = _family_of(model)
    by_name = {_plain(block.name, family): block for block in blocks_of(model)}
    pairs: dict[Block, dict[str, Tensor]] = {}
    names: dict[Block, str] = {}
    wrong = []
    for name in file.names():
        match = _TENSOR.fullmatch(name)
        layer = match[1].removeprefix(_FRONT) if match else ""
        block = by_name.get(_plain(layer, family))
        if match is None or block is None:
            wrong.append(f"{name} belongs to no linear layer of {type(model).__name__}")
            continue
        names[block] = layer
        pairs.setdefault(block, {})[match[2]] = file.get(name)
    ranks = {}
    for block, pair in pairs.items():
        rank = _by_pattern(config.get("rank_pattern"), names[block], r)
        ranks[block] = (rank, _by_pattern(config.get("alpha_pattern"), names[block], alpha))
        needed = {
            "A": (rank, model.get_parameter(block.ours).shape[1]),
            "B": (block.stop - block.start, rank),
        }
        for letter, shape in needed.items():
            got = pair.get(letter)
            if got is None:
                wrong.append(f"{names[block]}.lora_{letter}.weight is missing")
            elif tuple(got.shape) != shape or not got.is_floating_point():
                wrong.append(
                    f"{names[block]}.lora_{letter}.weight is {got.dtype} {tuple(got.shape)}, needs {shape}"
                )
            elif not bool(torch.isfinite(got).all()):
                wrong.append(f"{names[block]}.lora_{letter}.weight is not finite")
    if not pairs and not wrong:
        wrong.append("it holds no adapter")
    if wrong:
        raise ValueError(f"adapter: {path} does not fit: {'; '.join(wrong)}")
    for block, adapter in add_adapters(model, ranks, dropout=dropout, rslora=rslora).items():
        with torch.no_grad():
            adapter.lora_A.copy_(pairs[block]["A"])
            adapter.lora_B.copy_(pairs[block]["B"])
    return model


def save_adapter(model: nn.Module, directory: str | Path) -> None:
    """Write a model's adapters as a PEFT folder, which peft loads over transformers' model of the same weights.

    adapter_config.json and adapter_model.safetensors appear together; other files in `directory` stay.

    Raises:
        ValueError: the model has no adapters, or they differ in dropout or scaling in a way that the format cannot say.
    """
    adapters = list(adapters_of(model))
    if not adapters:
        raise ValueError("model: has no adapters")
    if len({(a.dropout.p, a.rslora) for a in adapters}) > 1:
        raise ValueError("model: its adapters differ in dropout or rslora, an adapter folder has one of each")
    first = adapters[0]
    architecture = _architecture_of(model)
    named = {adapter.block.name: adapter for adapter in adapters}
    config = {
        "peft_type": "LORA",
        "task_type": next((task for ending, task in _TASKS if architecture.endswith(ending)), None),
        "base_model_name_or_path": str(getattr(model, "loaded_from", None) or "") or None,
        "r": first.r,
        "lora_alpha": first.alpha,
        "lora_dropout": first.dropout.p,
        "use_rslora": first.rslora,
        "rank_pattern": {n: a.r for n, a in named.items() if a.r != first.r},
        "alpha_pattern": {n: a.alpha for n, a in named.items() if a.alpha != first.alpha},
        "target_modules": _targets(set(named), {block.name for block in blocks_of(model)}),
        "fan_in_fan_out": any(adapter.block.transposed for adapter in adapters),
        "bias": "none",
        "use_dora": False,
        "modules_to_save": None,
        "init_lora_weights": True,
        "inference_mode": True,
    }
    tensors = {}
    for name, adapter in named.items():
        tensors[f"{_FRONT}{name}.lora_A.weight"] = adapter.lora_A.detach().cpu().contiguous()
        tensors[f"{_FRONT}{name}.lora_B.weight"] = adapter.lora_B.detach().cpu().contiguous()

    def write(folder: Path) -> None:
        with naming(folder / ADAPTER_WEIGHTS):
            safetensors.torch.save_file(tensors, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
        (folder / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    write_folder(Path(directory), write, superseded=lambda name: name == ADAPTER_PICKLED)


def _read_options(config: dict[str, Any]) -> tuple[int, float, float, bool]:
    """r, alpha, dropout, rslora; ValueError names an option that is not supported.

    An unknown option that is null, false or empty is not set: newer versions of PEFT write more of those.
    """
    wrong = []
    for key, value in config.items():
        if key in _FIXED:
            if not any(value == known and type(value) is type(known) for known in _FIXED[key]):
                wrong.append(f"{key}: got {value!r}, only {_FIXED[key][0]!r} is supported")
        elif not _is_unset(value) and key not in (*_HONOURED, *_IGNORED):
            wrong.append(f"{key}: got {value!r}, which is no option of LoRA that is known here")
    if "peft_type" not in config:
        wrong.append("peft_type: missing, needs 'LORA'")
    r, alpha = config.get("r", 8), config.get("lora_alpha", 8)
    dropout, rslora = config.get("lora_dropout", 0.0), config.get("use_rslora", False)
    if type(r) is not int or r < 1:
        wrong.append(f"r: got {r!r}, needs a positive integer")
    if type(alpha) not in (int, float) or not alpha > 0:
        wrong.append(f"lora_alpha: got {alpha!r}, needs a positive number")
    if type(dropout) not in (int, float) or not 0 <= dropout < 1:
        wrong.append(f"lora_dropout: got {dropout!r}, needs a number with 0 <= p < 1")
    if type(rslora) is not bool:
        wrong.append(f"use_rslora: got {rslora!r}, needs true or false")
    for key in ("rank_pattern", "alpha_pattern"):
        if not isinstance(config.get(key) or {}, dict):
            wrong.append(f"{key}: got {config[key]!r}, needs an object")
    if wrong:
        raise ValueError("; ".join(wrong))
    return r, alpha, dropout, rslora


def _is_unset(value: Any) -> bool:
    return value is None or value is False or value in ([], {})


def _by_pattern(patterns: Mapping[str, Any] | None, layer: str, default: Any) -> Any:
    """The value of the first pattern that ends a layer's name, as PEFT matches them."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", layer):
            return value
    return default


def _targets(chosen: set[str], every: set[str]) -> list[str]:
    """target_modules that match the chosen layers and no others: last names where those suffice, else whole ones."""
    targets = []
    for leaf in sorted({name.rpartition(".")[2] for name in chosen}):
        ending = {name for name in every | chosen if name.rpartition(".")[2] == leaf}
        targets += [leaf] if ending <= chosen else sorted(ending & chosen)
    return targets


def _family_of(model: nn.Module) -> Family | None:
    return family_for(model.config, model.families) if isinstance(model, Pretrained) else None


def _architecture_of(model: nn.Module) -> str:
    family = _family_of(model)
    if family is None:
        return type(model).__name__
    assert isinstance(model, Pretrained)
    return model.architectures.get(family.model_type, family.architectures[0])


def _plain(name: str, family: Family | None) -> str:
    return name if family is None else family.plain(name)
