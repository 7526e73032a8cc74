"""Tensors that lie one behind the other in a mapped file as one tensor, without a copy."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor


def adjoined(pieces: Sequence[Tensor]) -> Tensor | None:
    """The rows of all pieces as one view of their memory, which it keeps; None where they do not adjoin.

    safetensors gives each tensor a storage of its own, although a file's tensors lie side by side.
    """
    first = pieces[0]
    for piece in pieces:
        plain = piece.dim() and piece.numel() and piece.is_contiguous() and piece.device.type == "cpu"
        if not plain or piece.dtype != first.dtype or piece.shape[1:] != first.shape[1:]:
            return None
    if any(b.data_ptr() != a.data_ptr() + a.nbytes for a, b in pairwise(pieces)):
        return None
    rows = sum(piece.shape[0] for piece in pieces)
    return torch.frombuffer(_memory(pieces), dtype=first.dtype).view(rows, *first.shape[1:])


def _memory(pieces: Sequence[Tensor]) -> ctypes.Array[ctypes.c_char]:
    """The memory of adjoining pieces, which live as long as this object."""
    # a subclass, as instances of plain array types take no attributes
    kind: Any = type("Memory", (ctypes.c_char * sum(piece.nbytes for piece in pieces),), {})
    memory: ctypes.Array[ctypes.c_char] = kind.from_address(pieces[0].data_ptr())
    memory.owners = tuple(pieces)  # type: ignore[attr-defined]
    return memory
