"""Calls under torch.fx's symbolic tracing, which sees proxies: recorded whole, as torch's own functions are."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from torch import nn
from torch.fx.proxy import Proxy, TraceError


def any_proxy(one: Any, two: Any = None, three: Any = None) -> bool:
    """Whether a call with these operands is being traced symbolically."""
    return isinstance(one, Proxy) or isinstance(two, Proxy) or isinstance(three, Proxy)


def map_leaves(function: Callable[[Any], Any], value: Any) -> Any:
    """`value` with `function` applied to every leaf of its nested lists, tuples and dicts."""
    if isinstance(value, dict):
        return {key: map_leaves(function, inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        mapped = [map_leaves(function, inner) for inner in value]
        return mapped if isinstance(value, list) else tuple(mapped)
    return function(value)


def leaves(value: Any) -> list[Any]:
    """The leaves of `value`'s nested lists, tuples and dicts."""
    found: list[Any] = []
    map_leaves(found.append, value)
    return found


def record(function: Callable[..., Any], given: dict[str, Any]) -> Any:
    """The proxy of `function` called with these arguments, by their names."""
    kwargs = _chosen(function, given)
    return _tracer(kwargs).create_proxy("call_function", function, (), kwargs)


def record_module(module: nn.Module, given: dict[str, Any]) -> Any:
    """The proxy of `module` called with these arguments: a leaf, as modules of torch.nn are."""
    kwargs = _chosen(type(module).forward, given)
    tracer = _tracer(kwargs)
    if not (path := tracer.path_of_module(module)):
        raise TraceError(
            f"{type(module).__name__} is recorded as a whole, like torch.nn's modules: trace a module that contains it"
        )
    operands = tuple(kwargs.pop(name) for name in ("query", "key", "value"))
    return tracer.create_proxy("call_module", path, operands, kwargs)


def _tracer(given: dict[str, Any]) -> Any:
    return next(leaf.tracer for leaf in leaves(given) if isinstance(leaf, Proxy))


def _chosen(function: Callable[..., Any], given: dict[str, Any]) -> dict[str, Any]:
    """The arguments that are not their defaults, and keyword arguments that the function will refuse."""
    defaults = _defaults(function)
    known = {name: value for name, value in given.items() if name in defaults and name != "self"}
    return {name: v for name, v in known.items() if v is not defaults[name]} | given.get("unknown", {})


@lru_cache(maxsize=64)
def _defaults(function: Callable[..., Any]) -> dict[str, Any]:
    return {name: parameter.default for name, parameter in inspect.signature(function).parameters.items()}
