"""Checks of ids: dtype and shape, and values where reading them is cheap; of caches and flags."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastattn.nn.kv_cache import KVCache


def check_ids(name: str, ids: Tensor) -> None:
    """Ids of a dtype that embeddings take, of two dimensions."""
    if ids.dim() != 2 or ids.dtype not in (torch.int64, torch.int32):
        got = f"{ids.dtype} of shape {tuple(ids.shape)}"
        raise ValueError(f"{name}: got {got}, needs int64 or int32 of shape (batch, length)")


def check_range(name: str, ids: Tensor, size: int, limit: str) -> None:
    """Ids within [0, size), where asking costs no synchronisation."""
    if not ids.numel() or not readable(ids):
        return
    least, most = (int(n) for n in ids.aminmax())
    if least < 0 or most >= size:
        raise ValueError(f"{name}: got {least} to {most}, needs 0 to {size - 1} ({limit} - 1)")


def readable(tensor: Tensor) -> bool:
    """Whether code may depend on the values: not in a recorded program, nor where reading them would synchronise."""
    return tensor.is_cpu and not torch.compiler.is_compiling() and not torch.jit.is_tracing()  # type: ignore[attr-defined]


def check_flags(**flags: object) -> None:
    """Arguments by name, each True or False."""
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            raise TypeError(f"{name}: got {flag!r}, needs True or False")


def check_caches(caches: Any, layers: int, needs: tuple[int, int]) -> None:
    """A list of a `KVCache` for each layer, of `needs`, (batch, key heads)."""
    if not (isinstance(caches, (list, tuple)) and all(isinstance(layer, KVCache) for layer in caches)):
        raise TypeError(f"cache: got {type(caches).__name__}, needs a list of KVCache, as new_cache makes")
    shapes = [tuple(layer.keys.shape[:2]) for layer in caches]
    if len(caches) != layers or any(shape != needs for shape in shapes):
        raise ValueError(
            f"cache: got {len(caches)} layers of (batch, heads) {sorted(set(shapes))}, "
            f"needs {layers} of {needs}"
        )
