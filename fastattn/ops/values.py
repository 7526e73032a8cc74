"""Whether the values, addresses and strides of a call's tensors can be read before it runs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from fastattn import backends, torch_compat


def readable(tensor: Tensor) -> bool:
    """Whether the values of a tensor can be read: not while code is traced or transformed."""
    return not (
        torch.compiler.is_compiling()
        or torch_compat.transforms_active((tensor,))
        or torch_compat.dispatch_mode_active()
    )


def may_be_refused(args: Iterable[Any], backend: str, more: bool = False) -> bool:
    """Whether a call needs its later passes checked first, so that it is refused before anything runs.

    A forward alone is checked when it runs, so this is for calls with a backward, or with `more` to do first, such as
    to draw a seed. In a trace, which has no specs, the fakes of the ops refuse what the backend cannot run.
    """
    return (
        not torch.compiler.is_compiling()  # first: a trace cannot record the others
        and (more or (torch.is_grad_enabled() and torch_compat.any_requires_grad(args)))
        and not backends.runs_every_pass(backend)
        and all(map(_has_memory, args))
    )


def can_be_read(args: Iterable[Any]) -> bool:
    """Whether the values of the tensors among the arguments can be read."""
    return all(readable(arg) and _has_memory(arg) for arg in args if isinstance(arg, Tensor))


def _has_memory(arg: Any) -> bool:
    """False for a tensor of a subclass, such as a fake one: its address and strides may mean nothing."""
    return type(arg) is Tensor or type(arg) is Parameter or not isinstance(arg, Tensor)


def values_are_known(tensor: Tensor) -> bool:
    """Whether a tensor has its plain values, although a transform or a trace may be active."""
    return not (torch_compat.is_wrapped(tensor) or torch.compiler.is_compiling())
