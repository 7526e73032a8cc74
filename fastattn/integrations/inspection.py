"""Inspection of a module's class by its code: whether it computes attention, and what it passes on."""

from __future__ import annotations

import dis
import inspect
import re
from collections.abc import Callable, Iterator
from functools import cache
from types import CodeType, FunctionType
from typing import Any, TypeVar, cast

from torch import nn

_Function = TypeVar("_Function", bound=Callable[..., Any])


def remembered(function: _Function) -> _Function:
    """`functools.cache` with the function's own type, for arguments that are classes of modules."""
    return cast(_Function, cache(function))


_FUNCTIONS = {"scaled_dot_product_attention", "multi_head_attention_forward", "flex_attention"}
_NAME = re.compile("attention|attn", re.IGNORECASE)
_PRODUCTS = {"matmul", "bmm", "baddbmm", "einsum"}


@remembered
def names(cls: type) -> frozenset[str]:
    """The global, attribute and method names that the methods of a class use, without those of torch's own bases."""
    return frozenset(name for code in _codes(cls) for name in code.co_names)


def function_names(function: object) -> frozenset[str]:
    """The global, attribute and method names that one function uses."""
    code = getattr(inspect.unwrap(function), "__code__", None) if callable(function) else None
    return frozenset() if code is None else frozenset(name for c in _nested(code) for name in c.co_names)


@remembered
def passes(cls: type) -> frozenset[str]:
    """The string constants in a class's forward, which include the keywords that it passes."""
    found: set[str] = set()
    forward = _forward(cls)
    for code in () if forward is None else _nested(forward):
        for constant in code.co_consts:
            found |= {
                x for x in (constant if isinstance(constant, tuple) else (constant,)) if isinstance(x, str)
            }
    return frozenset(found)


@remembered
def calls_interface(cls: type) -> bool:
    """Whether a class's forward looks its attention function up in transformers' interface."""
    code = _forward(cls)
    return code is not None and not {"get_interface", "ALL_ATTENTION_FUNCTIONS"}.isdisjoint(code.co_names)


@remembered
def attends(cls: type) -> bool:
    """Whether a class computes attention in its own code.

    It calls a function that does, or takes a softmax of a product of what it calls attention; a product alone, as in
    linear attention, if the class is called that.
    """
    if _torchs_own(cls) or calls_interface(cls):
        return False
    used = names(cls)
    if used & _FUNCTIONS:
        return True
    named = _NAME.search(cls.__name__) is not None
    products = not _PRODUCTS.isdisjoint(used) or any(_multiplies(code) for code in _codes(cls))
    if products and "softmax" in used and not named:
        return any("softmax" in code.co_names and _names_attention(code.co_varnames) for code in _codes(cls))
    return named and (products or "softmax" in used or _calls_function_of_attention(cls))


def _names_attention(variables: tuple[str, ...]) -> bool:
    return any(_NAME.search(name) and "mask" not in name for name in variables)


@remembered
def weighs_by_mask(cls: type) -> bool:
    """Whether a class with a mask among its variables computes attention, or a softmax and matrix products."""
    if _torchs_own(cls) or calls_interface(cls) or not sees_masks(cls):
        return False
    return attends(cls) or ("softmax" in names(cls) and not _PRODUCTS.isdisjoint(names(cls)))


def _torchs_own(cls: type) -> bool:
    return cls.__module__.startswith("torch.nn.modules.") or cls.__module__.startswith("fastattn.")


@remembered
def sees_masks(cls: type) -> bool:
    """Whether any method of a class has a variable for a mask."""
    return any("mask" in name for code in _codes(cls) for name in code.co_varnames)


@remembered
def says(cls: type, name: str) -> bool:
    """Whether a class's code, its constructors included, contains a name, as an attribute or a keyword."""
    codes = [*_codes(cls), *(vars(base)["__init__"].__code__ for base in _with_constructor(cls))]
    return any(name in code.co_names or name in code.co_varnames for code in codes) or name in passes(cls)


def _with_constructor(cls: type) -> Iterator[type]:
    for base in cls.__mro__:
        own = isinstance(vars(base).get("__init__"), FunctionType)
        if own and base is not nn.Module and not base.__module__.startswith("torch."):
            yield base


@remembered
def tests_its_mask(cls: type) -> bool:
    """Whether a class's forward tests whether a mask is a torch.Tensor, which a StructuredMask is not."""
    code = _forward(cls)
    steps = [] if code is None else [step.argval for step in dis.get_instructions(code)]
    for i, name in enumerate(steps):
        if name == "isinstance":
            asked = steps[i + 1 : i + 6]
            if "Tensor" in asked and any("mask" in str(value) for value in asked):
                return True
    return False


def makes(cls: type) -> Iterator[type[nn.Module]]:
    """The classes of modules that the constructors of a class name, also in tables of classes."""
    for base in _with_constructor(cls):
        code, scope = vars(base)["__init__"].__code__, vars(base)["__init__"].__globals__
        for name in {name for c in _nested(code) for name in c.co_names}:
            found = scope.get(name)
            several = found.values() if isinstance(found, dict) else found
            for item in (
                several if isinstance(several, (tuple, list)) or isinstance(found, dict) else (found,)
            ):
                if isinstance(item, type) and issubclass(item, nn.Module):
                    yield item


def _forward(cls: type) -> CodeType | None:
    forward = getattr(cls, "forward", None)
    return None if forward is None else getattr(inspect.unwrap(forward), "__code__", None)


def methods(cls: type) -> Iterator[FunctionType]:
    """The functions that a class and its bases define, torch's own bases aside, the most derived first."""
    for base in cls.__mro__:
        if base is nn.Module or base is object or base.__module__.startswith("torch."):
            continue
        for name, value in vars(base).items():
            function = inspect.unwrap(value) if callable(value) else None
            if isinstance(function, FunctionType) and name not in ("__init__", "__repr__", "extra_repr"):
                yield function


def _nested(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _nested(constant)


def _codes(cls: type) -> Iterator[CodeType]:
    for method in methods(cls):
        yield from _nested(method.__code__)


def _multiplies(code: CodeType) -> bool:
    """Whether the code contains a matrix product, `@`."""
    return any(
        step.opname in ("BINARY_MATRIX_MULTIPLY", "INPLACE_MATRIX_MULTIPLY")
        or (step.opname == "BINARY_OP" and step.argrepr in ("@", "@="))
        for step in dis.get_instructions(code)
    )


def _calls_function_of_attention(cls: type) -> bool:
    return any(
        isinstance(method.__globals__.get(name), FunctionType) and ("attention" in name or "attn" in name)
        for method in methods(cls)
        for code in _nested(method.__code__)
        for name in code.co_names
    )
