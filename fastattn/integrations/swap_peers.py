"""Modules of other libraries with a switch that selects torch's attention function or a named backend."""

from __future__ import annotations

import functools
import importlib
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch.nn.functional as F
from torch import nn

from fastattn.integrations import inspection
from fastattn.ops.sdpa import scaled_dot_product_attention
from fastattn.spec import MAX_HEAD_DIM

_SDPA = "scaled_dot_product_attention"
_TORCHS = F.scaled_dot_product_attention
_PROCESSORS = "_fastattn_processors"  # on a swapped diffusers model: (processor, its backend before) of each


def swappable(module: nn.Module) -> bool:
    """Whether a module's own switch is set to torch's function, which it finds in a global.

    timm's modules have a `fused_attn` each; openai-whisper's class has `use_sdpa`.
    """
    return _switch(module) is True and _calls_by_global(type(module)) and _why_not(module) is None


def is_swapped(module: nn.Module) -> bool:
    """Whether `swap` changed a module's class."""
    return isinstance(module, _Swapped)


def swap(module: nn.Module, backend: str) -> None:
    """Give a module a new class with the same code, whose scaled_dot_product_attention is fastattn's."""
    if isinstance(module, _Swapped):
        module.__class__ = _class(module._fastattn_base, backend)  # type: ignore[assignment]
        return
    module.__class__ = _class(type(module), backend)


def restore(module: nn.Module) -> None:
    """Undo `swap`."""
    if isinstance(module, _Swapped):
        module.__class__ = module._fastattn_base  # type: ignore[assignment]


def was_changed(module: nn.Module) -> bool:
    """Whether something gave a swapped module another class after the swap."""
    return isinstance(module, _Swapped) and type(module) is not _class(
        module._fastattn_base, module._fastattn_backend
    )


def hint(module: nn.Module) -> str:
    """Advice for a module that computes attention itself, as the end of a sentence; "" if there is none."""
    cls = type(module)
    if (why := _why_not(module)) is not None:
        return f", and {why}"
    processor = getattr(module, "processor", None)
    if processor is not None and hasattr(processor, "_attention_backend"):
        return "; call fastattn.integrations.diffusers.register() and set_attention_backend('fastattn') of its model"
    if processor is not None and _SDPA in inspection.function_names(type(processor).__call__):
        return "; run it inside `with fastattn.sdpa_override():`"
    if _switch(module) is False:
        name = "its fused_attn" if "fused_attn" in vars(module) else f"{cls.__name__}.use_sdpa"
        if _calls_by_global(cls):
            return f"; set {name} = True before the swap"
        return f"; set {name} = True and run it inside `with fastattn.sdpa_override():`"
    return "; run it inside `with fastattn.sdpa_override():`" if _SDPA in inspection.names(cls) else ""


def _switch(module: nn.Module) -> bool | None:
    switch = vars(module).get("fused_attn", getattr(type(module), "use_sdpa", None))
    return switch if isinstance(switch, bool) and _SDPA in inspection.names(type(module)) else None


def _why_not(module: nn.Module) -> str | None:
    dim, width, heads = (getattr(module, name, None) for name in ("head_dim", "inner_dim", "heads"))
    if dim is None and isinstance(width, int) and isinstance(heads, int) and heads > 0:
        dim = width // heads
    if isinstance(dim, int) and dim > MAX_HEAD_DIM:
        return f"its head dim {dim} is over {MAX_HEAD_DIM}"
    return None


def _calls_by_global(cls: type) -> bool:
    """Whether every method that calls torch's function finds it, or its module, in a global of its own."""
    methods = [m for m in inspection.methods(cls) if _SDPA in inspection.function_names(m)]
    return bool(methods) and all(_exchanged(method, _TORCHS) is not None for method in methods)


def _exchanged(method: types.FunctionType, function: Callable[..., Any]) -> dict[str, Any] | None:
    """A method's globals with another function in the place of torch's; None if it is reached in another way."""
    used = inspection.function_names(method)
    old = method.__globals__
    new: dict[str, Any] = {}
    if old.get(_SDPA) is _TORCHS:
        new[_SDPA] = function
    for name in used:
        if old.get(name) is F:
            new[name] = _functional(function)
    return {**old, **new} if new and "functional" not in used else None


@inspection.remembered
def _functional(function: Callable[..., Any]) -> types.ModuleType:
    """torch.nn.functional with another attention."""
    module = types.ModuleType(F.__name__, F.__doc__)
    vars(module).update({**vars(F), _SDPA: function})
    return module


class _Swapped:
    """Marks the classes made here."""

    _fastattn_base: type[nn.Module]
    _fastattn_backend: str

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Pickle a class made at run time by the arguments it was made from."""
        return _make, (self._fastattn_base, self._fastattn_backend), vars(self).copy()


def _make(base: type[nn.Module], backend: str) -> nn.Module:
    cls = _class(base, backend)
    return cls.__new__(cls)


@inspection.remembered
def _on(backend: str) -> Callable[..., Any]:
    return scaled_dot_product_attention if backend == "auto" else functools.partial(
        scaled_dot_product_attention, backend=backend
    )  # fmt: skip


@inspection.remembered
def _class(base: type[nn.Module], backend: str) -> type[nn.Module]:
    body: dict[str, Any] = {
        "_fastattn_base": base,
        "_fastattn_backend": backend,
        "__module__": base.__module__,
    }
    for method in inspection.methods(base):
        if method.__name__ in body or _SDPA not in inspection.function_names(method):
            continue
        copy = types.FunctionType(
            method.__code__, _exchanged(method, _on(backend)) or method.__globals__, method.__name__,
            method.__defaults__, method.__closure__,
        )  # fmt: skip
        copy.__kwdefaults__ = method.__kwdefaults__
        body[method.__name__] = copy
    return type(base.__name__, (_Swapped, base), body)


def swap_diffusers(model: nn.Module, backend: str) -> tuple[list[str], list[str], list[tuple[str, str]]]:
    """Set the attention backend "fastattn" of the diffusers models in a tree: (swapped, already, left)."""
    swapped: list[str] = []
    already: list[str] = []
    left: list[tuple[str, str]] = []
    name = "fastattn" if backend == "auto" else f"fastattn_{backend}"
    for prefix, top in diffusers_models(model):
        named = {
            ".".join(filter(None, (prefix, path))): module
            for path, module in top.named_modules()
            if hasattr(getattr(module, "processor", None), "_attention_backend")
        }
        before = {path: module.processor._attention_backend for path, module in named.items()}
        try:
            importlib.import_module("fastattn.integrations.diffusers").register()
            top.set_attention_backend(name)
        except Exception as error:  # its registry is private and may have changed
            left += [(path, f"diffusers' backend {name!r} cannot be set: {error}") for path in named]
            continue
        recorded = {id(processor): old for processor, old in vars(top).get(_PROCESSORS, [])}
        previous = []
        for path, module in named.items():
            processor, old = module.processor, before[path]
            if (why := _why_not(module)) is not None:
                processor._attention_backend = recorded.get(id(processor), old)
                left.append((path, f"{type(module).__name__} is left, as {why}"))
                continue
            ours = str(getattr(old, "value", old)).startswith("fastattn")
            if ours and id(processor) not in recorded:
                processor._attention_backend = old  # chosen by its user
            else:
                previous.append((processor, recorded[id(processor)] if ours else old))
            (already if ours else swapped).append(path)
        vars(top).pop(_PROCESSORS, None)
        if previous:
            vars(top)[_PROCESSORS] = previous
    return swapped, already, left


def restore_diffusers(model: nn.Module) -> list[str]:
    """Undo `swap_diffusers`."""
    restored: list[str] = []
    for prefix, top in diffusers_models(model):
        before = {id(processor): (processor, old) for processor, old in vars(top).pop(_PROCESSORS, [])}
        for path, module in top.named_modules():
            processor, old = before.get(id(getattr(module, "processor", None)), (None, None))
            now = getattr(processor, "_attention_backend", None)
            if processor is not None and str(getattr(now, "value", now)).startswith("fastattn"):
                processor._attention_backend = old
                restored.append(".".join(filter(None, (prefix, path))))
    return restored


def diffusers_models(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The outermost diffusers models, if diffusers is loaded."""
    library = sys.modules.get("diffusers.models.modeling_utils")
    mixin: Any = getattr(library, "ModelMixin", None)
    inside: tuple[str, ...] = ()
    for path, module in model.named_modules() if mixin is not None else ():
        if isinstance(module, mixin) and not path.startswith(inside or ("\0",)):
            inside = (*inside, f"{path}." if path else "")
            yield path, module
