"""How a private symbol of torch is looked up."""

from __future__ import annotations

import pkgutil
from typing import Any


def find(name: str) -> Any:
    """The object of a dotted name, None where this torch has none."""
    try:
        return pkgutil.resolve_name(name)
    except (ImportError, AttributeError):
        return None
