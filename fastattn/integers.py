"""Integer arithmetic that several layers share."""

from __future__ import annotations


def cdiv(a: int, b: int) -> int:
    """a / b rounded up; written out as -(-a // b) where each Python call of an eager step on a CPU counts."""
    return -(-a // b)
