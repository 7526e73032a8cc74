"""Checks of the data functions' arguments, before any work; errors name the argument."""

from __future__ import annotations

import numbers
from typing import Any


def check_integer(name: str, value: Any, least: int, most: int = 2**63 - 1) -> int:
    """`value` as an int within [least, most]; TypeError if it is not an integer, ValueError if it is outside."""
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        raise TypeError(f"{name}: got {value!r}, needs an integer")
    number = int(value)
    if not least <= number <= most:
        raise ValueError(
            f"{name}: got {number}, needs at least {least}" + (f", at most {most}" if number > most else "")
        )
    return number


def check_flag(name: str, value: Any) -> None:
    """TypeError for anything but True and False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: got {value!r}, needs True or False")


def check_texts(name: str, value: Any) -> None:
    """TypeError unless `value` is an iterable of texts; a single str, which iterates over characters, is an error."""
    if isinstance(value, (str, bytes)) or not hasattr(value, "__iter__"):
        raise TypeError(f"{name}: got a {type(value).__name__}, needs several texts, such as a list of str")


def check_text(name: str, value: Any) -> None:
    """TypeError for anything but a str."""
    if not isinstance(value, str):
        raise TypeError(f"{name}: got a {type(value).__name__}, needs a str")
