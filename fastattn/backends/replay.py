"""Replays: the work of a backend in the first call of a kind, recorded and run again for later ones.

Tiles, grids, strides and variants of a call follow from the classes of its tensors and from its options, never from
values where a backend says so (READS_NO_VALUES). The first call is recorded: every operation of torch, by a dispatch
mode, every launch of Triton and every call of the extension, in order (`fastattn.backends.recording`). The later calls
run the same list on their own tensors: allocations with the sizes and strides found then, launches with the same grid
and numbers. Triton's launches go to the compiled kernel itself. Callers must ensure that the tensors of a later call
have the same classes as those of the first: presence, dtype, shape, strides, and 16-byte alignment of the address.
Memory that torch allocates is aligned.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

from torch import Tensor

from fastattn import torch_compat
from fastattn.backends.programs import EMPTY, GROUP, NOTHING, ONE, Program
from fastattn.backends.recording import Recorder
from fastattn.recorders import this_thread


def can_replay(backend: ModuleType) -> bool:
    """Whether calls of a backend's functions may be recorded."""
    return getattr(backend, "READS_NO_VALUES", False) and torch_compat.has_dispatch_mode()


class Replay:
    """A function of tensors (or None) whose work is recorded in the first call and run again in later ones.

    Where an operation cannot be recorded, every call runs the function itself.
    """

    __slots__ = ("_function", "program", "refusal")

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self.program: Program | None = None  # what later calls run
        self.refusal: str | None = None  # why nothing is recorded

    def __call__(self, *tensors: Tensor | None) -> Any:
        """The function's results for these tensors."""
        program = self.program
        if program is None:
            return self._record(tensors)
        values = [*program.constants, *tensors]
        for kind, function, operands, released in program.steps:
            if kind == NOTHING:
                function(*operands(values))
            elif kind == EMPTY:
                values.append(function())
            elif kind == GROUP:
                values.append(function(operands(values)))
            elif kind == ONE:
                values.append(function(*operands(values)))
            else:
                values.extend(function(*operands(values)))
            for place in released:
                values[place] = None
        return program.result(values)

    def _record(self, tensors: tuple[Tensor | None, ...]) -> Any:
        if self.refusal is not None or this_thread.recorder is not None:
            return self._function(*tensors)
        # a tensor given twice is two inputs, which may differ in a later call
        inputs = [
            t.detach() if t is not None and _is_in(t, tensors[:i]) else t for i, t in enumerate(tensors)
        ]
        recorder = Recorder(inputs)
        this_thread.recorder = recorder
        try:
            with torch_compat.dispatch_mode(recorder.operation):
                result = self._function(*inputs)
            program = recorder.program(result)
        finally:
            this_thread.recorder = None
        self.program, self.refusal = program, recorder.refusal
        return result


def _is_in(tensor: Tensor, others: Sequence[Tensor | None]) -> bool:
    return any(tensor is other for other in others)
