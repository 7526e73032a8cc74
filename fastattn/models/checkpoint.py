"""Model folders: config.json and model.safetensors in transformers' GPT-2 format, written whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from fastattn.models.config import GPTConfig

CONFIG, WEIGHTS = "config.json", "model.safetensors"

# Ours -> GPT-2's in a file; Conv1D keeps (in, out) where Linear has (out, in).
_RENAMED = {
    "attn.in_proj_weight": "attn.c_attn.weight",
    "attn.in_proj_bias": "attn.c_attn.bias",
    "attn.out_proj.weight": "attn.c_proj.weight",
    "attn.out_proj.bias": "attn.c_proj.bias",
}
_TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
_BUFFERS = (".attn.bias", ".attn.masked_bias")  # causal masks that old files carry

# GPT2Config options with one value that we compute, any other would change the result.
_REQUIRED_OPTIONS = {
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
}
# What a GPT may have that GPT-2 has not; with any of it the folder is not a GPT-2.
_OWN_OPTIONS = {
    "num_kv_heads": None,
    "positions": "learned",
    "rope_theta": 10000.0,
    "window": None,
    "qk_norm": False,
    "bias": True,
}
_SIZES = ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head")
_GPT2_TYPE, _OWN_TYPE = "gpt2", "fastattn-gpt"


def save_gpt(config: GPTConfig, state: dict[str, Tensor], directory: str | Path) -> None:
    """Write config.json and model.safetensors; an existing folder's files are replaced one by one, each atomically."""
    entries = config_to_json(config, _float_dtype(state))
    tensors = {
        name: tensor.detach().cpu().contiguous()
        for name, tensor in to_gpt2_names(state, tied=config.tie_word_embeddings).items()
    }

    def write(folder: Path) -> None:
        safetensors.torch.save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        (folder / CONFIG).write_text(json.dumps(entries, indent=2) + "\n", encoding="utf-8")

    write_folder(Path(directory), write)


def load_gpt(path_or_id: str | Path) -> tuple[GPTConfig, dict[str, Tensor]]:
    """The config and our state_dict of a folder, or of a repository on the Hugging Face hub."""
    folder = resolve_folder(path_or_id)
    try:
        config = config_from_json(read_json(folder / CONFIG))
    except ValueError as error:
        raise ValueError(_prefixed(error, folder / CONFIG)) from None
    return config, from_gpt2_names(read_weights(folder), tied=config.tie_word_embeddings)


def config_to_json(config: GPTConfig, dtype: str) -> dict[str, Any]:
    """config.json's entries: GPT-2's where the model is one, transformers can then load the folder."""
    entries = config.to_dict()
    own = {name: entries[name] for name, default in _OWN_OPTIONS.items() if entries[name] != default}
    is_gpt2 = not own
    for name in _OWN_OPTIONS:
        if is_gpt2:
            del entries[name]
    architecture = "GPT2LMHeadModel" if is_gpt2 else "GPT"
    return {
        "model_type": _GPT2_TYPE if is_gpt2 else _OWN_TYPE,
        "architectures": [architecture],
        "dtype": dtype,
        **entries,
    }


def config_from_json(entries: dict[str, Any]) -> GPTConfig:
    """A GPTConfig from config.json, ours or GPT-2's; raises what it cannot honour."""
    kind = entries.get("model_type")
    if kind not in (_GPT2_TYPE, _OWN_TYPE):
        raise ValueError(f"model_type: got {kind!r}, needs {_GPT2_TYPE!r} or {_OWN_TYPE!r}")
    for name, value in _REQUIRED_OPTIONS.items():
        if entries.get(name, value) != value:
            raise ValueError(f"{name}: got {entries[name]!r}, only {value!r} is supported")
    missing = [name for name in _SIZES if name not in entries]
    if kind == _OWN_TYPE and missing:
        raise ValueError(f"{', '.join(missing)}: missing, needs the size that the model was saved with")
    if kind == _GPT2_TYPE:  # what the file leaves out has GPT2Config's default, not ours
        dropout = dict.fromkeys(("embd_pdrop", "resid_pdrop", "attn_pdrop"), 0.1)
        entries = {**dropout, "bos_token_id": 50256, "eos_token_id": 50256, **entries}
    known = {field.name for field in fields(GPTConfig)}
    return GPTConfig(**{name: value for name, value in entries.items() if name in known})


def to_gpt2_names(state: dict[str, Tensor], *, tied: bool) -> dict[str, Tensor]:
    """Our state_dict under GPT-2's names, Conv1D's transposed."""
    out = {}
    for name, tensor in state.items():
        if name == "lm_head.weight":
            if not tied:
                out[name] = tensor
            continue
        for ours, theirs in _RENAMED.items():
            name = name.removesuffix(ours) + theirs if name.endswith("." + ours) else name
        out["transformer." + name] = tensor.t() if name.endswith(_TRANSPOSED) else tensor
    return out


def from_gpt2_names(tensors: dict[str, Tensor], *, tied: bool) -> dict[str, Tensor]:
    """GPT-2's tensors, with or without the prefix "transformer.", under our names."""
    state = {}
    for name, tensor in tensors.items():
        name = name.removeprefix("transformer.")
        if name.endswith(_BUFFERS) or (tied and name == "lm_head.weight"):
            continue
        tensor = tensor.t().contiguous() if name.endswith(_TRANSPOSED) else tensor
        for ours, theirs in _RENAMED.items():
            name = name.removesuffix(theirs) + ours if name.endswith("." + theirs) else name
        state[name] = tensor
    if tied and "wte.weight" in state:
        state["lm_head.weight"] = state["wte.weight"]
    return state


def resolve_folder(path_or_id: str | Path) -> Path:
    """The folder itself, or a hub repository's files in the local cache, downloaded where they are missing."""
    if not isinstance(path_or_id, (str, os.PathLike)):
        raise TypeError(
            f"pretrained model: got {type(path_or_id).__name__}, needs the path of a folder or a repository's name"
        )
    folder, name = Path(path_or_id), str(path_or_id)
    if name and folder.is_dir():
        return folder
    if isinstance(path_or_id, Path) or folder.is_file() or name.count("/") > 1 or not name:
        raise ValueError(f"pretrained model: got {name!r}, which is not a folder")
    try:
        from huggingface_hub import snapshot_download

        patterns = ["*.json", "*.safetensors", "*.txt"]
        found = Path(snapshot_download(name, allow_patterns=patterns))
        if not list(found.glob("*.safetensors")):
            found = Path(snapshot_download(name, allow_patterns=[*patterns, "pytorch_model*.bin"]))
    except (ImportError, OSError, ValueError) as error:
        raise ValueError(
            f"pretrained model: got {name!r}, which is not a folder "
            f"and could not be fetched from the Hugging Face hub: {error}"
        ) from error
    return found


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a folder: safetensors, whole or sharded, else a pickled state_dict read with weights_only.

    Raises:
        ValueError: there is no such file, or one is damaged; the message names it.
    """
    for name in (WEIGHTS, "pytorch_model.bin"):
        if (folder / name).is_file():
            return read_tensors(folder / name)
        index = folder / f"{name}.index.json"
        if index.is_file():
            shards = _shard_names(read_json(index), index)
            return {key: tensor for shard in shards for key, tensor in read_tensors(folder / shard).items()}
    raise ValueError(f"pretrained model: {folder} has neither {WEIGHTS} nor pytorch_model.bin")


def _shard_names(entries: dict[str, Any], index: Path) -> list[str]:
    """The files that an index of shards names, all of them beside it."""
    names = entries.get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        got = "none" if names is None else type(names).__name__
        raise ValueError(f"pretrained model: {index} needs a weight_map from tensors to files, got {got}")
    shards = sorted(set(names.values()))
    for shard in shards:
        if shard != Path(shard).name or not (index.parent / shard).is_file():
            raise ValueError(
                f"pretrained model: {index} names the file {shard!r}, which {index.parent} does not have"
            )
    return shards


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of one file, .safetensors or a pickled state_dict; ValueError names a file that is damaged."""
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # safetensors and torch raise what their parsers meet
        raise ValueError(
            f"pretrained model: {path} is damaged or no file of tensors "
            f"({type(error).__name__}: {' '.join(str(error).split())[:300]})"
        ) from None
    if not isinstance(state, dict) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in state.items()
    ):
        raise ValueError(f"pretrained model: {path} holds something else than tensors by name")
    return state


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that must hold an object."""
    if not path.is_file():
        raise ValueError(f"pretrained model: {path.parent} has no {path.name}")
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"pretrained model: {path} is not valid JSON: {error}") from None
    if not isinstance(entries, dict):
        raise ValueError(
            f"pretrained model: {path} must hold a JSON object, it holds a {type(entries).__name__}"
        )
    return entries


def _prefixed(error: ValueError, path: Path) -> str:
    """The message, which names the file in any case."""
    return str(error) if str(path.parent) in str(error) else f"pretrained model: {path}: {error}"


def write_folder(directory: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary folder next to `directory`, then move it, or its files, into place."""
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"directory: {directory} exists and is not a folder")
    directory.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    try:
        write(scratch)
        if not directory.exists():
            scratch.chmod(0o777 & ~_umask())
            scratch.rename(directory)
            return
        for file in sorted(scratch.iterdir()):
            os.replace(file, directory / file.name)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _float_dtype(state: dict[str, Tensor]) -> str:
    return str(state["wte.weight"].dtype).removeprefix("torch.")
