"""`triton.jit` for the functions that are launched, with a type, and launches of what it has compiled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, Protocol

import torch
import triton


class Kernel(Protocol):
    """A compiled function that can be launched."""

    @property
    def arg_names(self) -> Sequence[str]:
        """Its parameters, constants included."""
        ...

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., object]:
        """The function that launches it on a grid."""
        ...


def kernel(integers: Sequence[str]) -> Callable[[Callable[..., None]], Kernel]:
    """`triton.jit` of a kernel. One variant serves every value of the parameters named in `integers`.

    Names that the kernel does not have are ignored. Triton ignores those of tuples: an integer within a tuple is
    always specialised on, so every integer is a parameter of its own.
    """
    made: Callable[[Callable[..., None]], Kernel] = triton.jit(do_not_specialize=tuple(integers))
    return made


def launcher(compiled: Any, grid: tuple[int, ...]) -> Callable[..., object] | None:
    """A function of all parameters, constants included, that launches a compiled kernel on a grid of the current
    device; None where this Triton has another interface, or interprets kernels instead of compiling them.

    Triton's own launcher finds the compiled kernel anew in each launch, by the classes of all arguments: dtypes and
    16-byte alignment of pointers, widths of integers, constants. Those have to be as in the launch that compiled it.
    """
    if not hasattr(compiled, "packed_metadata") or not _interface_is_known():
        return None
    from triton import knobs

    x, y, z = grid = (*grid, 1, 1)[:3]
    driver = triton.runtime.driver.active
    device, stream_of = driver.get_current_device(), driver.get_current_stream
    runtime, run = knobs.runtime, compiled.run
    function, metadata = compiled.function, compiled.packed_metadata

    def launch(*args: object) -> None:
        enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
        if getattr(enter, "calls", enter) or getattr(leave, "calls", leave):  # a profiler observes launches
            compiled[grid](*args)
        else:
            run(x, y, z, stream_of(device), function, metadata, None, None, None, *args)

    if torch.cuda.device_count() <= 1:
        return launch

    def launch_there(*args: object) -> None:
        with torch.cuda.device(device):
            launch(*args)

    return launch_there


@cache
def _interface_is_known() -> bool:
    """Whether `compiled[grid]`, Triton's public launch of a compiled kernel, makes the same call of `run` as
    `launcher`, apart from the hooks."""
    passed: list[tuple[object, ...]] = []
    try:
        from triton import knobs
        from triton.compiler import CompiledKernel

        class Probe(CompiledKernel):
            module, function, packed_metadata = None, "function", "packed"
            run = staticmethod(lambda *args: passed.append(args))
            launch_metadata = staticmethod(lambda *args: "metadata")

            def __init__(self) -> None:
                pass

            def _init_handles(self) -> None:
                pass

        Probe()[(2, 3, 4)]("argument", stream=5)
        hooks = (knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook)
        return passed == [(2, 3, 4, 5, "function", "packed", "metadata", *hooks, "argument")]
    except (ImportError, AttributeError, TypeError):
        return False
