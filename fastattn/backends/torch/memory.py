"""Memory that operations of a thread use again and again."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence

import torch
from torch import Tensor


class _OfThread(threading.local):
    def __init__(self) -> None:
        self.memory: dict[tuple[str, torch.dtype], Tensor] = {}


_of_thread = _OfThread()


def shared(name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """An uninitialised tensor of this thread, in the same memory each time: new pages would cost more than a product.

    Its values last until the name is asked for again; the memory stays with the thread. What is asked for is bounded by
    its callers, to 16 megabytes at most.
    """
    memory = _of_thread.memory
    size = math.prod(shape)
    flat = memory.get((name, dtype))
    if flat is None or flat.numel() < size:
        with torch.inference_mode(False):  # or it could be written in that mode only
            flat = memory[name, dtype] = torch.empty(size, dtype=dtype, device="cpu")
    return flat[:size].view(shape)
