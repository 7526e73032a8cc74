"""The files of a model's folder, read: JSON, and tensors that are mapped into memory and checked before any is used."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

CONFIG, GENERATION = "config.json", "generation_config.json"
WEIGHTS, PICKLED = "model.safetensors", "pytorch_model.bin"
INDEX = f"{WEIGHTS}.index.json"
ADAPTER_CONFIG = "adapter_config.json"  # PEFT's names
ADAPTER_WEIGHTS, ADAPTER_PICKLED = "adapter_model.safetensors", "adapter_model.bin"

_DTYPES = {  # of a safetensors header
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


class Tensors:
    """The tensors of a folder by name; shapes and dtypes are known before a value is read.

    Args:
        origin: where they are from, for messages.
        entries: name -> (shape, dtype, a function that gives the tensor).
    """

    def __init__(
        self,
        origin: Path | str,
        entries: dict[str, tuple[tuple[int, ...], torch.dtype, Callable[[], Tensor]]],
    ) -> None:
        self.origin = origin
        self._entries = entries

    def names(self) -> list[str]:
        """The names in the file's order."""
        return list(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor."""
        return self._entries[name][0]

    def dtype(self, name: str) -> torch.dtype:
        """Of a tensor."""
        return self._entries[name][1]

    def get(self, name: str) -> Tensor:
        """A tensor on the CPU: of safetensors, a view of the file's pages that are copied when written to."""
        return self._entries[name][2]()

    @classmethod
    def of(cls, origin: Path | str, state: dict[str, Tensor]) -> Tensors:
        """Tensors that are in memory."""
        return cls(origin, {n: (tuple(t.shape), t.dtype, partial(_itself, t)) for n, t in state.items()})


def open_weights(folder: Path) -> Tensors:
    """The tensors of a folder: safetensors, whole or sharded, else a pickled state_dict read with weights_only.

    Raises:
        ValueError: there is no such file, or one is damaged, holds code or is not beside the index that names it.
    """
    for name in (WEIGHTS, PICKLED):
        if (folder / name).is_file():
            return open_tensors(folder / name, folder)
        index = folder / f"{name}.index.json"
        if index.is_file():
            return _open_shards(folder, index)
    raise ValueError(f"pretrained model: {folder} has neither {WEIGHTS} nor {PICKLED}")


def _open_shards(folder: Path, index: Path) -> Tensors:
    """The tensors of all shards, which are those that the index names."""
    where = _weight_map(read_json(index), index)
    entries: dict[str, Any] = {}
    for shard in sorted(set(where.values())):
        found = open_tensors(folder / shard, folder)._entries
        twice = sorted(entries.keys() & found.keys())
        if twice:
            raise ValueError(
                f"pretrained model: {folder} holds {', '.join(twice)} twice, in {shard} and before"
            )
        entries |= found
    lacking = sorted(where.keys() - entries.keys())
    beyond = sorted(entries.keys() - where.keys())
    if lacking or beyond:
        said = [f"its shards lack {', '.join(lacking)}"] if lacking else []
        said += [f"it does not name {', '.join(beyond)}"] if beyond else []
        raise ValueError(f"pretrained model: {index} does not fit its shards: {'; '.join(said)}")
    return Tensors(folder, entries)


def _weight_map(entries: dict[str, Any], index: Path) -> dict[str, str]:
    """Tensor -> file, all of them beside the index that says so."""
    where = entries.get("weight_map")
    if not isinstance(where, dict) or not all(isinstance(name, str) for name in where.values()):
        got = "none" if where is None else type(where).__name__
        raise ValueError(f"pretrained model: {index} needs a weight_map from tensors to files, got {got}")
    for shard in sorted(set(where.values())):
        if shard != Path(shard).name or not (index.parent / shard).is_file():
            raise ValueError(
                f"pretrained model: {index} names the file {shard!r}, which {index.parent} does not have"
            )
    return where


def open_tensors(path: Path, origin: Path | None = None) -> Tensors:
    """The tensors of one file, .safetensors or a pickled state_dict; ValueError names a file that is damaged."""
    try:
        if path.suffix == ".safetensors":
            return Tensors(origin or path, _safetensors_entries(path))
        state = _unpickled(path)
    except Exception as error:  # safetensors and torch raise what their parsers meet
        raise ValueError(
            f"pretrained model: {path} is damaged or no file of tensors "
            f"({type(error).__name__}: {' '.join(str(error).split())[:300]})"
        ) from None
    if not isinstance(state, dict) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in state.items()
    ):
        raise ValueError(f"pretrained model: {path} holds something else than tensors by name")
    return Tensors.of(origin or path, state)


def _safetensors_entries(path: Path) -> dict[str, Any]:
    file = safetensors.safe_open(path, framework="pt")
    entries = {}
    for name in file.keys():  # noqa: SIM118, it is no mapping
        part = file.get_slice(name)
        dtype = _DTYPES.get(part.get_dtype())
        if dtype is None:
            raise TypeError(f"{name} is of dtype {part.get_dtype()}")
        entries[name] = (tuple(part.get_shape()), dtype, lambda name=name: file.get_tensor(name))
    return entries


def _unpickled(path: Path) -> Any:
    """A pickled state_dict, in which weights_only lets no code run; mapped where the file is a zip archive."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError as error:
        if "mmap" not in str(error):  # only archives can be mapped, which torch wrote from 1.6 on
            raise
        return torch.load(path, map_location="cpu", weights_only=True)


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


def _itself(tensor: Tensor) -> Tensor:
    return tensor
