"""Hooks of modules, versions and copies of tensors, a delay on a GPU, and the workers of a data loader."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .lookup import find

_GLOBAL_HOOKS = (
    find("torch.nn.modules.module._global_forward_hooks"),
    find("torch.nn.modules.module._global_forward_pre_hooks"),
    find("torch.nn.modules.module._global_backward_hooks"),
    find("torch.nn.modules.module._global_backward_pre_hooks"),
)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def hooks_of(module: torch.nn.Module) -> list[Any] | None:
    """The hooks that are called besides a module's forward.

    Fallback: None, where this torch keeps hooks elsewhere.
    """
    found = (*(getattr(module, name, None) for name in _HOOKS), *_GLOBAL_HOOKS)
    if any(hooks is None for hooks in found):
        return None
    return [hook for hooks in found for hook in hooks.values()]


def has_hooks(module: torch.nn.Module) -> bool:
    """Whether a call of a module does more than its forward.

    Fallback: True, where this torch keeps hooks elsewhere.
    """
    return hooks_of(module) != []


_HAS_VERSION = find("torch.Tensor._version") is not None


def version_of(tensor: Tensor) -> int | None:
    """The number of in-place changes of a tensor.

    Fallback: None, and nothing derived from its values is cached for the next call.
    """
    return tensor._version if _HAS_VERSION else None


_cuda_sleep = find("torch.cuda._sleep")


def cuda_sleep(cycles: int) -> None:
    """Queue a kernel that spins for so many clock cycles.

    Fallback: nothing is queued, and timings include the gaps between launches.
    """
    if _cuda_sleep is not None:
        _cuda_sleep(cycles)


_foreach_copy = find("torch._foreach_copy_")


def copy_of_several() -> Callable[[Sequence[Tensor], Sequence[Tensor]], Any]:
    """What copies tensors into as many others, (targets, sources), which share no memory.

    Fallback: `copy_` for each.
    """
    return _copy_each if _foreach_copy is None else _foreach_copy


def _copy_each(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    for target, source in zip(targets, sources):
        target.copy_(source)


_end_workers = find("torch.utils.data.dataloader._MultiProcessingDataLoaderIter._shutdown_workers")


def end_loader_workers(batches: Iterator[Any]) -> None:
    """End the worker processes of a `DataLoader`'s iterator, which may still be referenced, as by a traceback.

    One that is busy is waited for as long as torch does, and then killed.

    Fallback: they end with the last reference to the iterator.
    """
    if _end_workers is not None:
        _end_workers(batches)
        for worker in getattr(batches, "_workers", ()):
            if worker.is_alive():
                worker.kill()
                worker.join()
