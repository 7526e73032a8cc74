"""Integrations: fastattn's attention in models of other libraries."""

from importlib import import_module
from types import ModuleType

_ON_FIRST_USE = ("diffusers", "export", "flash_attn", "torch", "transformers")


def __getattr__(name: str) -> ModuleType:
    if name in _ON_FIRST_USE:
        return import_module(f"fastattn.integrations.{name}")
    raise AttributeError(f"module 'fastattn.integrations' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_ON_FIRST_USE})
