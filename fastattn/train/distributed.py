"""Data parallelism under torchrun: this process's rank, and the collectives that the trainer needs."""

from __future__ import annotations

import atexit
import contextlib
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from fastattn.train.sections import ConfigError

T = TypeVar("T")
LEAVING = timedelta(seconds=10)  # time that a process waits for its peers before it leaves their group


class Distributed:
    """This process among those that torchrun started, or alone.

    torchrun's RANK, WORLD_SIZE and LOCAL_RANK decide; the process group is made (nccl on CUDA, gloo on CPU) unless the
    caller already made one. It is left when the program ends.
    """

    def __init__(self, device: torch.device) -> None:
        self.active = dist.is_available() and (dist.is_initialized() or "RANK" in os.environ)
        self.rank, self.world_size = 0, 1
        self._owned = False
        if not self.active:
            return
        if not dist.is_initialized():
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
            self._owned = True
            atexit.register(self.close)
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()

    @property
    def is_main(self) -> bool:
        """Whether this process prints and writes the shared output."""
        return self.rank == 0

    def wrap(self, model: nn.Module, device: torch.device) -> nn.Module:
        """The model as DistributedDataParallel, or unchanged with one process."""
        if not self.active:
            return model
        devices = [device] if device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(model, device_ids=devices)

    def sum(self, values: Sequence[float], device: torch.device) -> list[float]:
        """Each value summed over all processes, in float64."""
        if not self.active:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=device)
        dist.all_reduce(total)
        return total.tolist()

    def on_first(self, work: Callable[[], T]) -> T:
        """What `work` returns or raises on the first process, on all; the others do not call it."""
        if not self.active:
            return work()
        outcome: tuple[Any, Exception | None] = (None, None)
        if self.is_main:
            try:
                outcome = (work(), None)
            except Exception as error:
                outcome = (None, error)
        value, failure = self.broadcast(outcome)
        if failure is not None:
            raise failure
        result: T = value
        return result

    def gather(self, value: T) -> list[T]:
        """The values of all processes, in the order of ranks, on the first; on others only their own value."""
        if not self.active:
            return [value]
        values: list[T] | None = [value] * self.world_size if self.is_main else None
        dist.gather_object(value, values)
        return values or [value]

    def broadcast(self, value: T) -> T:
        """The first process's value, on all."""
        if not self.active:
            return value
        values = [value]
        dist.broadcast_object_list(values)
        return values[0]

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.active:
            dist.barrier()

    def close(self) -> None:
        """Leave the process group if it was made here; one that the caller made is left alone.

        Under gloo all processes leave together: torch may abort one whose peer has exited already. A peer that does not
        come within LEAVING is not waited for.
        """
        if self._owned and dist.is_initialized():
            if dist.get_backend() == "gloo":
                with contextlib.suppress(RuntimeError):  # a peer has failed
                    dist.monitored_barrier(timeout=LEAVING)
            dist.destroy_process_group()
        self._owned = False


def gradient_sync(model: nn.Module, wanted: bool) -> AbstractContextManager[None]:
    """A context in which backward averages gradients over processes only if wanted; no effect on a plain module."""
    if wanted or not isinstance(model, nn.parallel.DistributedDataParallel):
        return contextlib.nullcontext()
    return model.no_sync()


def usable_device(name: str) -> torch.device:
    """The device called `name`; "auto" is this process's CUDA device where there is one, else the CPU.

    Raises:
        ConfigError: there is no such device here.
    """
    if name == "auto":
        name = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ConfigError(f"device: {name!r} is not available ({str(error).splitlines()[0]})") from None
    if device.type == "meta":
        raise ConfigError("device: got 'meta', needs a device that computes")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def usable_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The dtype of autocast; "auto" is bfloat16 on a CUDA device that has it, else float32.

    Raises:
        ConfigError: float16 anywhere but on CUDA, or bfloat16 on a CUDA device without it.
    """
    if precision == "auto":
        has_bfloat16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if has_bfloat16 else torch.float32
    if precision == "float16" and device.type != "cuda":
        raise ConfigError(f"precision: got float16 on {device.type}, needs CUDA; bfloat16 works there")
    if precision == "bfloat16" and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise ConfigError("precision: got bfloat16, which this CUDA device lacks; float16 works there")
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[precision]
