"""The tensors that loading left out of a checkpoint, and the parameters that the checkpoint lacks."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LoadReport:
    """The differences between a file and the model that was loaded from it.

    Attributes:
        dropped: tensors of the file that the family knows and this model does not use: other heads, old buffers.
        new: parameters that the file does not have; the caller named them and they were initialised.
    """

    dropped: tuple[str, ...] = ()
    new: tuple[str, ...] = ()
