"""A model written as a folder: config.json, weights under the family's names, and what goes with them."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor, nn

from fastattn.models.checkpoint.card import is_generated, model_card
from fastattn.models.checkpoint.folder import CONFIG, GENERATION, INDEX, WEIGHTS
from fastattn.models.checkpoint.int8 import METHOD, round_layers, with_scales
from fastattn.models.checkpoint.names import Family, stored, to_file
from fastattn.models.checkpoint.swap import naming, write_folder
from fastattn.nn.int8 import check_kind

CARD = "README.md"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "chat_template.jinja",
    "chat_template.json",
)
SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
_UNITS = {
    "": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
}
_SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")


def save_model(
    model: nn.Module,
    config: Any,
    family: Family,
    folder: str | Path,
    *,
    architecture: str | None = None,
    with_prefix: bool = True,
    max_shard_size: int | str = "5GB",
    tokenizer: Any = None,
    tokenizer_from: Path | None = None,
    generation: Mapping[str, Any] | None = None,
    files: Mapping[str, bytes] | None = None,
    quantize: str | None = None,
) -> None:
    """Write a model's folder, all files together or none, see `write_folder`; other files of an old folder stay.

    Args:
        model: its parameters and persistent buffers all have rows in the family.
        config: what `family.write_config` and its `sizes` ask.
        folder: is made where it does not exist.
        architecture: the class name that config.json says; the family's first without it.
        with_prefix: False writes names without the family's prefix, as transformers' bare models (BertModel) have.
        max_shard_size: weights beyond it go into several files with an index; bytes, or a number with KB, MB, GB.
        tokenizer: what has save_pretrained(folder); replaces a tokenizer's files in an old folder.
        tokenizer_from: a folder to copy a tokenizer's files from where neither `tokenizer` nor an old folder has any.
        generation: generation_config.json; None for none.
        files: other files, by a path within the folder.
        quantize: "int8" rounds the matrices of numbered layers, see int8.py.

    Raises:
        ValueError, TypeError: an argument; `folder` is as it was.
        OSError: what writing met, such as a full disk; `folder` is as it was.
    """
    limit = shard_bytes(max_shard_size)
    check_kind("quantize", quantize)
    if tokenizer is not None and not callable(getattr(tokenizer, "save_pretrained", None)):
        raise TypeError(
            f"tokenizer: got {type(tokenizer).__name__}, needs an object that has save_pretrained, or None"
        )
    folder = Path(folder)
    state = model.state_dict(keep_vars=True)
    state = {name: state[name].detach() for name in stored(model)}
    meta = [name for name, tensor in state.items() if tensor.is_meta]
    if meta:
        raise ValueError(f"model: {', '.join(meta)} have no values, they are on the meta device")
    dtype = next((t.dtype for t in state.values() if t.is_floating_point()), None)
    entries = {
        "model_type": family.model_type,
        "architectures": [architecture or family.architectures[0]],
        "dtype": str(dtype).removeprefix("torch."),
        **family.write_config(config),
    }
    scales: dict[str, Tensor] = {}
    if quantize is not None:
        entries["quantization_config"] = METHOD
        state, scales = round_layers(state)
    tensors = with_scales(to_file(state, config, family), to_file(scales, config, family))
    if not with_prefix:
        tensors = {name.removeprefix(family.prefix): tensor for name, tensor in tensors.items()}
    card = model_card(model, entries, loads_in_transformers=family.in_transformers and quantize is None)

    def write(scratch: Path) -> None:
        _write_weights(scratch, tensors, limit)
        _write_json(scratch / CONFIG, entries)
        if generation is not None:
            _write_json(scratch / GENERATION, generation)
        if not (folder / CARD).is_file() or is_generated((folder / CARD).read_text("utf-8", "replace")):
            (scratch / CARD).write_text(card, encoding="utf-8")
        if tokenizer is not None:
            tokenizer.save_pretrained(scratch)
        elif tokenizer_from is not None and not any((folder / name).exists() for name in TOKENIZER_FILES):
            for name in TOKENIZER_FILES:
                if (tokenizer_from / name).is_file():
                    shutil.copyfile(tokenizer_from / name, scratch / name)
        for name, content in (files or {}).items():
            (scratch / name).parent.mkdir(parents=True, exist_ok=True)
            (scratch / name).write_bytes(content)

    def superseded(name: str) -> bool:
        stale = name in (WEIGHTS, INDEX, GENERATION) or SHARD.fullmatch(name) is not None
        return stale or (tokenizer is not None and name in TOKENIZER_FILES)

    write_folder(folder, write, superseded=superseded)


def generation_entries(config: Any) -> dict[str, Any]:
    """generation_config.json of a model that was not loaded with one: the special tokens of its config."""
    ids = {name: getattr(config, name, None) for name in _SPECIAL_TOKENS}
    return {"_from_model_config": True, **{name: value for name, value in ids.items() if value is not None}}


def shard_bytes(size: int | str) -> int:
    """The bytes of "5GB", "500MB" or a number.

    Raises:
        TypeError, ValueError: it is neither, or not positive.
    """
    if isinstance(size, bool) or not isinstance(size, (int, str)):
        raise TypeError(
            f"max_shard_size: got {type(size).__name__}, needs a number of bytes or text such as '5GB'"
        )
    match = re.fullmatch(r"\s*(\d+)\s*([A-Za-z]*)\s*", str(size))
    unit = _UNITS.get(match[2].upper()) if match else None
    if match is None or unit is None or int(match[1]) == 0:
        raise ValueError(
            f"max_shard_size: got {size!r}, needs a positive number of bytes or text such as '5GB' or '500MB'"
        )
    return int(match[1]) * unit


def _write_weights(folder: Path, tensors: dict[str, Tensor], limit: int) -> None:
    """model.safetensors, or shards of at most `limit` bytes of tensors each and their index."""
    shards = list(_shards(tensors, limit))
    names = [WEIGHTS]
    if len(shards) > 1:
        names = [f"model-{n:05d}-of-{len(shards):05d}.safetensors" for n in range(1, len(shards) + 1)]
    for name, members in zip(names, shards, strict=True):
        # a shard's tensors are copied where they have to be, and those copies go before the next one's
        content = {n: tensors[n].cpu().contiguous() for n in members}
        with naming(folder / name):
            safetensors.torch.save_file(content, folder / name, metadata={"format": "pt"})
        del content
    if len(shards) > 1:
        total = sum(_size(tensor) for tensor in tensors.values())
        where = {n: name for name, members in zip(names, shards, strict=True) for n in members}
        _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": where})


def _shards(tensors: dict[str, Tensor], limit: int) -> Iterator[list[str]]:
    """Names in order, in groups of at most `limit` bytes; a larger tensor is a group of its own."""
    group: list[str] = []
    filled = 0
    for name, tensor in tensors.items():
        if group and filled + _size(tensor) > limit:
            yield group
            group, filled = [], 0
        group.append(name)
        filled += _size(tensor)
    yield group


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _write_json(path: Path, entries: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(entries, indent=2) + "\n", encoding="utf-8")
