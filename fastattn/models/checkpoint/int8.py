"""Folders whose layers' weights are 8-bit numbers with a scale for each output; only this package reads them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastattn.models.checkpoint.folder import Tensors
from fastattn.nn.int8 import in_numbered_layer
from fastattn.nn.rows import round_to_int8

METHOD = {"quant_method": "fastattn-int8"}  # config.json's quantization_config
_SCALE = "_scale"  # behind the name of a tensor


def round_layers(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A state with the matrices of numbered layers in int8, and their scales (outputs, 1) in float32 by name."""
    out, scales = dict(state), {}
    for name, weight in state.items():
        if weight.dim() == 2 and weight.is_floating_point() and in_numbered_layer(name):
            out[name], scales[name] = round_to_int8(weight)
    return out, scales


def with_scales(tensors: dict[str, Tensor], scales: dict[str, Tensor]) -> dict[str, Tensor]:
    """A file's tensors and, behind their names, their scales."""
    return {**tensors, **{name + _SCALE: scale for name, scale in scales.items()}}


def is_int8(entries: dict[str, Any]) -> bool:
    """Whether config.json says that a folder holds 8-bit weights."""
    return entries.get("quantization_config") == METHOD


def widened(tensors: Tensors) -> Tensors:
    """The tensors of such a folder as float32 numbers.

    Raises:
        ValueError: an 8-bit tensor has no scale that fits it, or a scale no tensor; all are listed.
    """
    entries: dict[str, tuple[tuple[int, ...], torch.dtype, Callable[[], Tensor]]] = {}
    wrong = []
    names = tensors.names()
    for name in names:
        if name.endswith(_SCALE):
            owner = name.removesuffix(_SCALE)
            if owner not in names or tensors.dtype(owner) != torch.int8:
                wrong.append(f"{name} belongs to no 8-bit tensor")
            continue
        shape, dtype = tensors.shape(name), tensors.dtype(name)
        entries[name] = (shape, dtype, partial(tensors.get, name))
        if dtype != torch.int8:
            continue
        scale = name + _SCALE
        fits = len(shape) == 2 and {(shape[0], 1), (1, shape[1])}
        if not fits or scale not in names or tensors.shape(scale) not in fits:
            wrong.append(f"{name} has no scale that fits it")
            continue
        entries[name] = (shape, torch.float32, partial(_product, tensors, name, scale))
    if wrong:
        raise ValueError(f"pretrained model: the weights of {tensors.origin} do not fit: {'; '.join(wrong)}")
    return Tensors(tensors.origin, entries)


def _product(tensors: Tensors, name: str, scale: str) -> Tensor:
    return tensors.get(name).float().mul_(tensors.get(scale))
