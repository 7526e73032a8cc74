"""Replace the attention inside an existing model, and restore it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import cast

import torch
from torch import nn
from torch.nn.utils import parametrize

from fastattn.integrations import inspection, swap_peers
from fastattn.nn.attention import MultiHeadAttention
from fastattn.ops import arguments
from fastattn.spec import FLOAT_DTYPES, MAX_HEAD_DIM


@dataclass(frozen=True)
class SwapReport:
    """The result of `swap_attention`: names of modules as in `named_modules`, "" being the model itself.

    Attributes:
        swapped: modules that run on fastattn since this call.
        already: modules that ran on it before.
        left: (name, reason) of modules that compute attention and were left alone.
        backend: that of the call.
        dense: (name, reason) of swapped modules that get their masks as dense tensors.
    """

    swapped: tuple[str, ...]
    already: tuple[str, ...]
    left: tuple[tuple[str, str], ...]
    backend: str
    dense: tuple[tuple[str, str], ...] = ()

    def to_dict(self) -> dict[str, object]:
        """The fields as plain types, for JSON; left and dense as dicts from name to reason."""
        return {
            "swapped": list(self.swapped),
            "already": list(self.already),
            "left": dict(self.left),
            "backend": self.backend,
            "dense": dict(self.dense),
        }

    def __str__(self) -> str:
        lines = [f"swapped {_count(self.swapped)} to fastattn (backend={self.backend!r})"]
        dense = dict(self.dense)
        for name in self.swapped:
            note = f", with dense masks: {dense[name]}" if name in dense else ""
            lines.append(f"  {name or '(the model itself)'}{note}")
        if self.already:
            lines.append(f"{_count(self.already)} ran on fastattn before")
        if self.left:
            lines.append(f"left {_count(self.left)} alone:")
            lines += [f"  {name or '(the model itself)'}: {why}" for name, why in self.left]
        return "\n".join(lines)


def swap_attention(model: nn.Module, *, backend: str = "auto") -> SwapReport:
    """Make every module in `model` that can use `fastattn.attention` use it, in place.

    `torch.nn.MultiheadAttention`: its class becomes `fastattn.MultiHeadAttention`; the module itself stays, and with it
    its parameters (so optimizers go on), hooks, mode, dtype and device, and every reference to it. transformers models:
    every config in them whose modules all can gets the attention implementation "fastattn"; where a module computes
    attention itself with the same masks, the others get the dense masks that they got before. timm's and
    openai-whisper's modules: their own switch sends them through torch's function, of which they get fastattn's.
    diffusers models: the attention backend "fastattn". What fastattn.attention cannot run is left: head dims over 256,
    a dropout of 1.0, weights of other dtypes than float16, bfloat16, float32 and float64.

    A swapped model can be copied, pickled and sent to another process, which needs fastattn installed and nothing
    called. Calling this again changes nothing but the backend of what was swapped before. `restore_attention` undoes
    it exactly.

    Args:
        model: any module; its whole tree is searched.
        backend: "auto", "cuda", "triton" or "torch", for the swapped modules.

    Returns:
        A `SwapReport`, printable, of what was swapped and of what computes attention but was left, with the reason and
        the line that would help, where there is one.

    Raises:
        TypeError: model is not a torch.nn.Module.
        ValueError: backend is not one of these names.
        ImportError: the model is of a transformers whose interface fastattn was not written for, and nothing was
            swapped. A diffusers that is not as expected is a reason in `SwapReport.left` instead.
    """
    arguments.check_backend(backend)
    candidates = list(_candidates(model))
    swapped, already, left, dense = [], [], [], []
    if (integration := _transformers(model)) is not None:
        swapped, already, left, dense = integration.swap_models(model, backend)
    if next(swap_peers.diffusers_models(model), None) is not None:
        by_backend = swap_peers.swap_diffusers(model, backend)
        swapped, already, left = swapped + by_backend[0], already + by_backend[1], left + by_backend[2]
    seen = {*swapped, *already, *(name for name, _ in left)}
    for name, module in candidates:
        if name in seen:
            continue
        if isinstance(module, MultiHeadAttention):
            if module.swapped:
                module.backend = backend
            already.append(name)
        elif swap_peers.is_swapped(module) or swap_peers.swappable(module):
            (already if swap_peers.is_swapped(module) else swapped).append(name)
            swap_peers.swap(module, backend)
        elif (reason := _why_not(module)) is not None:
            left.append((name, reason))
        else:
            module.__class__ = MultiHeadAttention
            cast(MultiHeadAttention, module).add_extras(backend=backend, swapped=True)
            swapped.append(name)
    return SwapReport(tuple(swapped), tuple(already), tuple(left), backend, tuple(dense))


def restore_attention(model: nn.Module) -> tuple[str, ...]:
    """Undo `swap_attention`, in place: every module it swapped runs what it ran before.

    Args:
        model: any module; its whole tree is searched.

    Returns:
        The names of the restored modules, as in `named_modules`; empty where nothing had been swapped.

    Raises:
        TypeError: model is not a torch.nn.Module.
        ValueError: something else changed a swapped module's class after the swap, as `torch.nn.utils.parametrize` and
            `fully_shard` do: undo that first. Nothing is restored then.
    """
    candidates = dict(_candidates(model))
    swapped = {n: m for n, m in candidates.items() if isinstance(m, MultiHeadAttention) and m.swapped}
    peers = {n: m for n, m in candidates.items() if swap_peers.is_swapped(m)}
    changed: dict[str, nn.Module] = {n: m for n, m in swapped.items() if type(m) is not MultiHeadAttention}
    changed |= {n: m for n, m in peers.items() if swap_peers.was_changed(m)}
    for name, module in changed.items():
        raise ValueError(
            f"model: {name or 'it'} became a {_class_name(module)} after the swap; undo that before restoring"
        )
    for attention in swapped.values():
        attention.remove_extras()
        attention.__class__ = nn.MultiheadAttention  # type: ignore[assignment]
    for peer in peers.values():
        swap_peers.restore(peer)
    hub = [] if (integration := _transformers(model)) is None else integration.restore_models(model)
    return (*hub, *swap_peers.restore_diffusers(model), *swapped, *peers)


def _transformers(model: nn.Module) -> ModuleType | None:
    """The part for transformers models, loaded only where there is one."""
    library = sys.modules.get("transformers.modeling_utils")
    if library is None or not any(isinstance(m, library.PreTrainedModel) for m in model.modules()):
        return None
    from fastattn.integrations import transformers_swap

    return transformers_swap


def _candidates(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules that compute attention, by class or name, outside transformers models; torch's class inside them too."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, needs a torch.nn.Module")
    integration = _transformers(model)
    inside = (
        set()
        if integration is None
        else {id(m) for _, top in integration.top_models(model) for m in top.modules()}
    )
    for name, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention) or (id(module) not in inside and _attends(module)):
            yield name, module


def _attends(module: nn.Module) -> bool:
    """Whether a module computes attention, judged by its code; a TorchScript module has none to inspect."""
    if isinstance(module, torch.jit.ScriptModule):
        return "attention" in _class_name(module).lower()
    return inspection.attends(type(module))


def _why_not(module: nn.Module) -> str | None:
    """Why a module that computes attention cannot be exchanged."""
    name = _class_name(module)
    if isinstance(module, torch.jit.ScriptModule):
        return f"{name} is compiled by TorchScript"
    if not isinstance(module, nn.MultiheadAttention):
        return f"{name} is not a torch.nn.MultiheadAttention{swap_peers.hint(module)}"
    if type(module) is not nn.MultiheadAttention:
        if isinstance(module, _sharded()):
            return "it is sharded by fully_shard, which gave it a class of its own; swap before sharding"
        if parametrize.is_parametrized(module):
            return "it is parametrized, which gave it a class of its own; swap before parametrizing"
        return f"{name} is a subclass of torch.nn.MultiheadAttention and may compute something else"
    if "forward" in vars(module):
        return "its forward was replaced on the instance, so exchanging its class would change nothing"
    if module.head_dim > MAX_HEAD_DIM:
        return f"its head dim is {module.head_dim}, fastattn runs 1 to {MAX_HEAD_DIM}"
    if module.dropout >= 1.0:
        return f"its dropout is {module.dropout}, fastattn needs less than 1"
    for parameter in module.parameters(recurse=False):
        if (parameter.is_floating_point() or parameter.is_complex()) and parameter.dtype not in FLOAT_DTYPES:
            names = ", ".join(str(dtype).removeprefix("torch.") for dtype in FLOAT_DTYPES)
            return f"its weights are {parameter.dtype}, fastattn runs {names}"
    return None


def _sharded() -> tuple[type, ...]:
    """The mixin class of `fully_shard`, or None if this torch has none."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return tuple(filter(None, (getattr(fsdp, "FSDPModule", None),)))


def _class_name(module: nn.Module) -> str:
    if isinstance(module, torch.jit.ScriptModule):
        return str(getattr(module, "original_name", type(module).__name__))
    return type(module).__name__


def _count(names: tuple[object, ...]) -> str:
    return f"{len(names)} module" + ("" if len(names) == 1 else "s")
