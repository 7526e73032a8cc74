"""Options of tasks: frozen dataclasses whose fields are checked by name when one is made."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from fastattn.models.fields import Check


class CheckedOptions:
    """A base of frozen dataclasses: `CHECKS` has a check for every field, which also converts it to its plain type."""

    CHECKS: Mapping[str, Check]

    def __post_init__(self) -> None:
        assert dataclasses.is_dataclass(self)
        for field in dataclasses.fields(self):
            value = self.CHECKS[field.name](field.name, getattr(self, field.name))
            object.__setattr__(self, field.name, value)


def share(name: str, number: Any) -> float:
    """A number with 0 < p < 1."""
    if isinstance(number, bool) or not isinstance(number, (int, float)) or not 0.0 < number < 1.0:
        raise ValueError(f"{name}: got {number!r}, needs a number with 0 < p < 1")
    return float(number)


def part(name: str, number: Any) -> float:
    """A number with 0 <= p <= 1."""
    if isinstance(number, bool) or not isinstance(number, (int, float)) or not 0.0 <= number <= 1.0:
        raise ValueError(f"{name}: got {number!r}, needs a number with 0 <= p <= 1")
    return float(number)
