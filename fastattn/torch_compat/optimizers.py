"""torch's optimisers without the import of the compiler that their first call makes."""

from __future__ import annotations

import inspect
from typing import Any, TypeVar

import torch

Optimizer = TypeVar("Optimizer", bound=torch.optim.Optimizer)
# torch keeps the compiler out of these by decorators, which import torch._dynamo when one is first called: about a
# second, of which a run that compiles nothing has no use.
_METHODS = ("add_param_group", "zero_grad", "state_dict", "load_state_dict")


def _without_compiler(cls: type[Optimizer]) -> type[Optimizer]:
    """A subclass whose methods are those of torch under the decorators; hooks and profiles of steps stay."""
    members: dict[str, Any] = {each: inspect.unwrap(getattr(cls, each)) for each in _METHODS}
    # one of the decorators switches gradients off
    members["step"] = torch.no_grad()(inspect.unwrap(cls.step))
    members |= {"__module__": __name__, "__qualname__": f"_{cls.__name__}", "__doc__": cls.__doc__}
    made: type[Optimizer] = type(cls.__name__, (cls,), members)
    return made


_AdamW = _without_compiler(torch.optim.AdamW)
_Muon = _without_compiler(torch.optim.Muon)


def adamw(parameters: Any, **options: Any) -> torch.optim.AdamW:
    """A torch.optim.AdamW that does not import the compiler.

    Fallback: where torch decorates a method in another way, the method is taken as it is and imports what it imports.
    """
    return _AdamW(parameters, **options)


def muon(parameters: Any, **options: Any) -> torch.optim.Muon:
    """A torch.optim.Muon that does not import the compiler.

    Fallback: as for `adamw`.
    """
    return _Muon(parameters, **options)
