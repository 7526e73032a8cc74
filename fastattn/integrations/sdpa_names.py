"""Replaces and restores the module globals that hold torch's attention function."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any
from weakref import WeakSet, ref

from fastattn import torch_compat

Name = tuple["ref[ModuleType]", str]
_NotLoaded: Any = getattr(importlib.util, "_LazyModule", ())  # any attribute access loads it


class ImportedNames:
    """Names by which modules outside torch hold the function, as `from torch.nn.functional import ...` makes them.

    Every module is searched once, `__main__`, which interactive sessions change, each time. The caller holds a lock.
    """

    def __init__(self) -> None:
        self._seen: WeakSet[ModuleType] = WeakSet()
        self._newest: tuple[int, ref[ModuleType] | None] = (0, None)
        self._known: set[Name] = set()
        self._originals: dict[Name, Any] = {}  # by exchanged name, the value it held before
        self._exchanged: dict[int, Any] = {}  # by id, the values put there since the first exchange

    def exchange(self, function: Any, of_torchs: Any, original: Any) -> None:
        """Replace `original` by `function`, and torch's own function by `of_torchs`, in every name that holds it.

        The two differ where other code has replaced torch's function and calls the original by such a name: that call
        must not lead back to the replacement.
        """
        torchs = torch_compat.torch_sdpa()
        put = [(original, function)] if original is torchs else [(original, function), (torchs, of_torchs)]
        self._look_through_new_modules({id(torchs), id(original), *self._exchanged})
        for module, name in self._held_by(self._known):
            key, value = (ref(module), name), globals_of(module)[name]
            if self._is_ours(value):  # exchanged before, or imported meanwhile
                value = self._originals.setdefault(key, original)
            for held, new in put:
                if value is held:
                    self._originals[key] = value
                    globals_of(module)[name] = new
        self._exchanged |= {id(function): function, id(of_torchs): of_torchs}

    def give_back(self, original: Any) -> None:
        """Restore every name, unless another value has been assigned to it since."""
        self._look_through_new_modules(self._exchanged.keys())
        for module, name in self._held_by(self._known):
            if self._is_ours(globals_of(module)[name]):
                globals_of(module)[name] = self._originals.get((ref(module), name), original)
        self._originals.clear()
        self._exchanged.clear()

    def _is_ours(self, value: Any) -> bool:
        return self._exchanged.get(id(value)) is value and value is not None

    @staticmethod
    def _held_by(names: set[Name]) -> Iterator[tuple[ModuleType, str]]:
        for reference, name in list(names):
            module = reference()
            if module is None or name not in globals_of(module):
                names.discard((reference, name))
            else:
                yield module, name

    def _look_through_new_modules(self, ids: Any) -> None:
        for module in self._new_modules():
            for name, value in list(globals_of(module).items()):
                if id(value) in ids:
                    self._known.add((ref(module), name))

    def _new_modules(self) -> list[ModuleType]:
        """`__main__`, and the modules that were not there or not complete when this was last asked."""
        main = sys.modules.get("__main__")
        found = [main] if isinstance(main, ModuleType) else []
        modules = list(sys.modules.values())
        newest = next((m for m in reversed(modules) if isinstance(m, ModuleType)), None)
        count, last = self._newest
        if count == len(modules) and last is not None and last() is newest:
            return found
        complete = True
        for module in modules:
            if not isinstance(module, ModuleType) or module in self._seen or module is main:
                continue
            names = globals_of(module)
            if (
                str(names.get("__name__")).partition(".")[0] == "torch"
            ):  # torch's own callers look the function up
                self._seen.add(module)
                continue
            found.append(module)
            if isinstance(module, _NotLoaded) or getattr(names.get("__spec__"), "_initializing", False):
                complete = False
            else:
                self._seen.add(module)
        self._newest = (len(modules), ref(newest) if complete and newest is not None else None)
        return found


def globals_of(module: ModuleType) -> dict[str, Any]:
    """A module's dictionary, read without triggering lazy loading."""
    names: dict[str, Any] = object.__getattribute__(module, "__dict__")
    return names
