"""Occupies half of a GPU's multiprocessors with a spinning kernel while other kernels run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

WARPS = 32  # 1024 threads: with their registers beside it, no block of a warpgroup kernel fits on the multiprocessor
MOST_LOOKS = 2**31 - 1  # of a block, before it ends by itself


@triton.jit
def hold_kernel(stop, ended, most):  # type: ignore[no-untyped-def]
    """Each block polls a flag until it is set, then increments `ended`."""
    looks = 0
    while looks < most:
        looks += 1
        if tl.load(stop, volatile=True) != 0:
            looks = most
    tl.atomic_add(ended, 1)


@dataclass
class Held:
    """The spinning blocks."""

    blocks: int
    ended: Tensor  # how many have ended

    def holding(self) -> bool:
        """Whether all blocks are still running."""
        side = torch.cuda.Stream(self.ended.device)
        with torch.cuda.stream(side):
            count = self.ended.clone()
        side.synchronize()
        return int(count) == 0


@contextlib.contextmanager
def half_of(device: torch.device) -> Iterator[Held]:
    """Inside, half of the multiprocessors run nothing else."""
    blocks = torch.cuda.get_device_properties(device).multi_processor_count // 2
    stop, ended = (torch.zeros(1, dtype=torch.int32, device=device) for _ in range(2))
    held = Held(blocks, ended)
    stop.fill_(0)
    held.holding()  # so that each kernel used while blocks are held is loaded before: loading may wait for them
    torch.cuda.synchronize(device)
    holder, other = torch.cuda.Stream(device), torch.cuda.Stream(device)
    with torch.cuda.stream(holder):
        hold_kernel[(blocks,)](stop, ended, MOST_LOOKS, num_warps=WARPS)
    try:
        yield held
    finally:
        with torch.cuda.stream(other):
            stop.fill_(1)
        holder.synchronize()
