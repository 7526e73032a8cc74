"""Exchange the attention inside a model that exists, and put it back."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import cast

import torch
from torch import nn

from fastattn.nn.attention import MultiHeadAttention
from fastattn.ops import arguments


@dataclass(frozen=True)
class SwapReport:
    """What `swap_attention` did: names of modules as in `named_modules`, "" being the model itself."""

    swapped: tuple[str, ...]
    already: tuple[str, ...]  # ran on fastattn before the call
    left: tuple[tuple[str, str], ...]  # (name, why it was left alone)
    backend: str

    def to_dict(self) -> dict[str, object]:
        """The same as plain types, for JSON."""
        return {
            "swapped": list(self.swapped),
            "already": list(self.already),
            "left": dict(self.left),
            "backend": self.backend,
        }

    def __str__(self) -> str:
        lines = [f"swapped {_count(self.swapped)} to fastattn (backend={self.backend!r})"]
        lines += [f"  {name or '(the model itself)'}" for name in self.swapped]
        if self.already:
            lines.append(f"{_count(self.already)} ran on fastattn before")
        if self.left:
            lines.append(f"left {_count(self.left)} alone:")
            lines += [f"  {name or '(the model itself)'}: {why}" for name, why in self.left]
        return "\n".join(lines)


def swap_attention(model: nn.Module, *, backend: str = "auto") -> SwapReport:
    """Run every `torch.nn.MultiheadAttention` and transformers model in `model` on `fastattn.attention`, in place.

    A module's class becomes `fastattn.MultiHeadAttention`; the module itself stays, and with it its parameters (so
    optimizers go on), hooks, mode, dtype and device, and every reference to it. A transformers model gets the
    attention implementation "fastattn". Calling it again changes nothing but the backend of what was swapped before.
    `restore_attention` undoes it exactly.

    Args:
        model: any module; its whole tree is searched.
        backend: "auto" or the name of a fastattn backend for the swapped modules.

    Returns:
        A report, printable, of what was swapped and of what looks like attention but was left, with the reason.
    """
    arguments.check_backend(backend)
    candidates = list(_candidates(model))
    swapped, already, left = [], [], []
    if (door := _transformers(model)) is not None:
        swapped, already, left = door.swap_models(model, backend)
    for name, module in candidates:
        if isinstance(module, MultiHeadAttention):
            if module.swapped:
                module.backend = backend
            already.append(name)
        elif (reason := _why_not(module)) is not None:
            left.append((name, reason))
        else:
            module.__class__ = MultiHeadAttention
            cast(MultiHeadAttention, module).add_extras(backend=backend, swapped=True)
            swapped.append(name)
    return SwapReport(tuple(swapped), tuple(already), tuple(left), backend)


def restore_attention(model: nn.Module) -> tuple[str, ...]:
    """Undo `swap_attention`: every module it swapped runs what it ran before. Returns their names.

    Raises ValueError, before changing any, where something else changed a swapped module's class after the swap, as
    `torch.nn.utils.parametrize` and `fully_shard` do: undo that first.
    """
    swapped = {
        name: module
        for name, module in _candidates(model)
        if isinstance(module, MultiHeadAttention) and module.swapped
    }
    for name, module in swapped.items():
        if type(module) is not MultiHeadAttention:
            raise ValueError(
                f"model: {name or 'it'} became a {_class_name(module)} after the swap; undo that before restoring"
            )
    for module in swapped.values():
        module.remove_extras()
        module.__class__ = nn.MultiheadAttention  # type: ignore[assignment]
    hub = [] if (door := _transformers(model)) is None else door.restore_models(model)
    return (*hub, *swapped)


def _transformers(model: nn.Module) -> ModuleType | None:
    """The part for transformers models, loaded only where there is one."""
    library = sys.modules.get("transformers.modeling_utils")
    if library is None or not any(isinstance(m, library.PreTrainedModel) for m in model.modules()):
        return None
    from fastattn.integrations import transformers

    return transformers


def _candidates(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Whatever computes attention, by class or by name, outside transformers models; torch's class inside them, too."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, needs a torch.nn.Module")
    door = _transformers(model)
    inside = set() if door is None else {id(m) for _, top in door.top_models(model) for m in top.modules()}
    for name, module in model.named_modules():
        named = "attention" in _class_name(module).lower() and id(module) not in inside
        if isinstance(module, nn.MultiheadAttention) or named:
            yield name, module


def _why_not(module: nn.Module) -> str | None:
    name = _class_name(module)
    if isinstance(module, torch.jit.ScriptModule):
        return f"{name} is compiled by TorchScript"
    if not isinstance(module, nn.MultiheadAttention):
        return f"{name} is not a torch.nn.MultiheadAttention"
    if type(module) is not nn.MultiheadAttention:
        return f"{name} is a subclass of torch.nn.MultiheadAttention and may compute something else"
    if "forward" in vars(module):
        return "its forward was replaced on the instance, so exchanging its class would change nothing"
    return None


def _class_name(module: nn.Module) -> str:
    if isinstance(module, torch.jit.ScriptModule):
        return str(getattr(module, "original_name", type(module).__name__))
    return type(module).__name__


def _count(names: tuple[object, ...]) -> str:
    return f"{len(names)} module" + ("" if len(names) == 1 else "s")
