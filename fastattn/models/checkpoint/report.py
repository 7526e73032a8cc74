"""What loading a checkpoint left out of a file, and what it added to it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LoadReport:
    """What does not stand one to one between a file and a model that was loaded from it.

    dropped: tensors of the file that the family knows and this model does not use: other heads, old buffers.
    new: parameters that the file does not have; the caller named them and they were initialised.
    """

    dropped: tuple[str, ...] = ()
    new: tuple[str, ...] = ()
