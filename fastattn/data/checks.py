"""The arguments of the data functions, refused by name before any work."""

from __future__ import annotations

import numbers
from typing import Any


def check_integer(name: str, value: Any, least: int, most: int = 2**63 - 1) -> int:
    """`value` as an int within [least, most]; TypeError if it is not an integer, ValueError if it is outside."""
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        raise TypeError(f"{name}: got {value!r}, need an integer")
    number = int(value)
    if not least <= number <= most:
        raise ValueError(
            f"{name}: got {number}, need at least {least}" + (f", at most {most}" if number > most else "")
        )
    return number


def check_flag(name: str, value: Any) -> None:
    """TypeError for anything but True and False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: got {value!r}, need True or False")


def check_texts(name: str, value: Any) -> None:
    """TypeError unless `texts` is an iterable of texts; a single str, which iterates over characters, is refused."""
    if isinstance(value, (str, bytes)) or not hasattr(value, "__iter__"):
        raise TypeError(f"{name}: got a {type(value).__name__}, need several texts, such as a list of str")


def check_text(name: str, value: Any) -> None:
    """TypeError for anything but a str."""
    if not isinstance(value, str):
        raise TypeError(f"{name}: got a {type(value).__name__}, need a str")
