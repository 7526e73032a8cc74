"""Launches that are noted instead of made, and the tensors they were given, which the tests of replays compare."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from torch import Tensor


class Noted:
    """The launches of Triton, described so that two calls on other memory can be compared."""

    def __init__(self) -> None:
        self.launches: list[Any] = []

    def start(self, launch: Any) -> None:
        """Note a launch."""
        self.launches.append(launch)

    def take(self, inputs: dict[str, Tensor]) -> list[Any]:
        """The launches since the last look: kernels, grids, arguments, options."""
        told = described([launch.args for launch in self.launches], inputs)
        found = [
            (launch.kernel.fn.__name__, launch.grid, args, launch.options)
            for launch, args in zip(self.launches, told)
        ]
        self.launches.clear()
        return found


def described(launches: Sequence[Sequence[Any]], inputs: dict[str, Tensor]) -> list[tuple[Any, ...]]:
    """Arguments of launches: numbers, and of each tensor the input whose memory it is, or which of those that were
    made, its place there, dtype and alignment."""
    places = {tensor.untyped_storage().data_ptr(): name for name, tensor in reversed(inputs.items())}
    made: dict[int, int] = {}

    def told(value: Any) -> Any:
        if isinstance(value, Tensor):
            start = value.untyped_storage().data_ptr()
            if not value.numel():
                return "empty", value.dtype
            name: Any = places.get(start)
            if name is None:
                name = made.setdefault(start, len(made))
            return name, value.data_ptr() - start, value.dtype, value.data_ptr() % 16
        if isinstance(value, tuple):
            return type(value).__name__, tuple(map(told, value))
        if hasattr(value, "base"):
            return told(value.base), value.shape, value.strides, value.block_shape
        return type(value).__name__, repr(value)

    return [tuple(map(told, args)) for args in launches]


@contextlib.contextmanager
def noted() -> Iterator[Noted]:
    """Inside, calls go to Triton, and its launches are noted."""
    from fastattn.kernels.arguments import Launch

    found = Noted()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Launch, "start", lambda launch: found.start(launch))
        patch.setenv("FASTATTN_BACKEND", "triton")
        yield found
