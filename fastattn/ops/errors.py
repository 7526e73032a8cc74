"""Argument errors of drop-in functions: they are also instances of the class that the original raises."""

from __future__ import annotations

from collections.abc import Mapping


class ArgumentError(ValueError, RuntimeError):
    """Arguments that do not fit, where torch and flash-attn raise RuntimeError."""


class ArgumentTypeError(TypeError, RuntimeError):
    """An argument of the wrong type, dtype or kind, where torch and flash-attn raise RuntimeError."""


class ArgumentConversionError(ArgumentError, TypeError):
    """A value that cannot become what a parameter needs, where Python or pybind11 raises TypeError."""


def standing_in(error: ValueError | TypeError, names: Mapping[str, str] = {}) -> Exception:
    """`error` of a fastattn function as the error of one that calls it: a RuntimeError, too.

    names: what the calling function calls its arguments, by the names that the message begins with.
    """
    subjects, colon, rest = str(error).partition(":")
    words = subjects.split(", ")
    if colon and any(word in names for word in words):
        message = ", ".join(names.get(word, word) for word in words) + colon + rest
    elif isinstance(error, RuntimeError):
        return error
    else:
        message = str(error)
    if isinstance(error, ArgumentConversionError):
        return ArgumentConversionError(message)
    return ArgumentError(message) if isinstance(error, ValueError) else ArgumentTypeError(message)
