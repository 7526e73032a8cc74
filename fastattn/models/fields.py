"""Checks of a config's fields: each takes a field's name and value and returns the value as a plain type."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from fastattn.constants import MAX_INT32
from fastattn.ops.arguments import is_integer, is_number

Check = Callable[[str, Any], Any]  # given a field's name and value; returns the value as a plain type


def size(name: str, number: Any) -> int:
    """A positive integer."""
    if not is_integer(number) or not 1 <= number <= MAX_INT32:
        raise ValueError(f"{name}: got {number!r}, needs a positive integer, at most {MAX_INT32}")
    return int(number)


def probability(name: str, number: Any) -> float:
    """A number with 0 <= p < 1."""
    if isinstance(number, bool) or not is_number(number) or not 0.0 <= number < 1.0:
        raise ValueError(f"{name}: got {number!r}, needs a number with 0 <= p < 1")
    return float(number)


def positive(name: str, number: Any) -> float:
    """A positive finite number."""
    if isinstance(number, bool) or not is_number(number) or not 0.0 < number < math.inf:
        raise ValueError(f"{name}: got {number!r}, needs a positive finite number")
    return float(number)


def flag(name: str, value: Any) -> bool:
    """True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"{name}: got {value!r}, needs True or False")
    return value


def token_id(name: str, number: Any) -> int:
    """The id of a token."""
    if not is_integer(number) or not 0 <= number <= MAX_INT32:
        raise ValueError(f"{name}: got {number!r}, needs a token id, an integer of 0 or more")
    return int(number)


def token_ids(name: str, value: Any) -> int | Sequence[int]:
    """One id or a list of them."""
    if isinstance(value, (list, tuple)):
        return type(value)(token_id(f"{name}[{index}]", number) for index, number in enumerate(value))
    return token_id(name, value)


def text(name: str, value: Any) -> str:
    """A string that is not empty."""
    if not isinstance(value, str) or not value:
        raise ValueError(f"{name}: got {value!r}, needs a name")
    return value


def one_of(choices: Sequence[str]) -> Check:
    """A check for one of some strings."""

    def check(name: str, value: Any) -> str:
        if not isinstance(value, str) or value not in choices:
            raise ValueError(f"{name}: got {value!r}, needs one of {', '.join(choices)}")
        return value

    return check


def or_none(check: Check) -> Check:
    """The check, or None."""
    return lambda name, value: None if value is None else check(name, value)
