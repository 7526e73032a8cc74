"""`triton.jit` for the functions that are launched, with a type."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import triton


class Kernel(Protocol):
    """A compiled function that can be launched."""

    @property
    def arg_names(self) -> Sequence[str]:
        """Its parameters, constants included."""
        ...

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., object]:
        """What launches it on a grid."""
        ...


def kernel(integers: Sequence[str]) -> Callable[[Callable[..., None]], Kernel]:
    """`triton.jit` of a kernel. One variant serves every value of the parameters named in `integers`.

    Names that the kernel does not have are ignored. Triton ignores those of tuples: an integer within a tuple is
    always specialised on, so every integer is a parameter of its own.
    """
    made: Callable[[Callable[..., None]], Kernel] = triton.jit(do_not_specialize=tuple(integers))
    return made
