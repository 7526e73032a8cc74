"""Recording the operations, launches and extension calls of a function of tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastattn.backends.programs import (
    EMPTY,
    NOTHING,
    ONE,
    SEVERAL,
    Event,
    Group,
    Number,
    Program,
    Seen,
    memory_like,
    numbers_in,
)

_ALLOCATIONS = {
    torch.ops.aten.empty, torch.ops.aten.empty_strided, torch.ops.aten.empty_like, torch.ops.aten.new_empty,
    torch.ops.aten.new_empty_strided,
}  # fmt: skip


class Recorder:
    """Records every step of a function of `inputs` as it runs."""

    def __init__(self, inputs: Sequence[Tensor | None]) -> None:
        self.seen = [None if t is None else Seen.of(t) for t in inputs]  # by number
        self.num_inputs = len(inputs)
        self._numbers = {
            id(t): n for n, t in enumerate(inputs) if t is not None
        }  # by id of a tensor, which may have been freed
        self.origins = list(range(len(inputs)))  # by number, the number of the tensor that owns the memory
        self.events: list[Event] = []
        self.refusal: str | None = None  # why there will be no program
        self._paused = False

    def operation(self, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """An operation of torch."""
        results = op(*args, **kwargs)
        if self._paused or self.refusal is not None:
            return results
        if _depends_on_values(op, args):
            self.refusal = f"{op} depends on values"
        elif op.overloadpacket in _ALLOCATIONS:
            self._note(Event(EMPTY, memory_like(Seen.of(results)), ()), results)
        else:
            operands, function = tuple(map(self._operand, args)), op
            named = {name: self._operand(value) for name, value in kwargs.items()}
            variable = [name for name, value in named.items() if isinstance(value, (Number, Group))]
            fixed = {name: value for name, value in kwargs.items() if name not in variable}
            if variable:
                function = _by_name(op, len(operands), variable, fixed)
                operands += tuple(named[name] for name in variable)
            elif fixed:
                function = partial(op, **fixed)
            self._note(Event(ONE, function, operands), results)
        return results

    def launch(self, launch: Any) -> None:
        """A launch of Triton."""
        compiled = self._unseen(launch.start)
        operands = tuple(map(self._operand, launch.args))
        self.events.append(Event(NOTHING, launch.starter(compiled), operands, launch=True))

    def call(self, function: Callable[..., Any], args: Sequence[Any]) -> Any:
        """A call of the extension."""
        results = self._unseen(function, *args)
        self._note(Event(ONE, function, tuple(map(self._operand, args))), results)
        return results

    def program(self, result: Any) -> Program | None:
        """The recorded steps, once the function has returned `result`: a tensor or a tuple of tensors and None."""
        parts = result if isinstance(result, tuple) else (result,)
        returned = [None if part is None else self._number_of(part) for part in parts]
        if any(number is None and part is not None for number, part in zip(returned, parts)):
            self.refusal = self.refusal or "a result comes from elsewhere"
        if self.refusal is not None:
            return None
        return Program(self, returned, type(result) if isinstance(result, tuple) else None)

    def _number_of(self, tensor: Tensor) -> int | None:
        """The number of a tensor; None for one that was not recorded."""
        number = self._numbers.get(id(tensor))
        seen = None if number is None else self.seen[number]
        return number if seen is not None and seen.tensor() is tensor else None

    def _unseen(self, function: Callable[..., Any], *args: Any) -> Any:
        self._paused = True
        try:
            return function(*args)
        finally:
            self._paused = False

    def _note(self, event: Event, results: Any) -> None:
        if results is None:
            event.kind = NOTHING
        elif isinstance(results, (tuple, list)):
            event.kind = SEVERAL
        given = list(numbers_in(event.operands))
        for result in results if event.kind == SEVERAL else () if event.kind == NOTHING else (results,):
            if result is not None and not isinstance(result, Tensor):
                self.refusal = f"{event.run} gives a {type(result).__name__}"
                return
            known = None if result is None else self._number_of(result)
            event.results.append(len(self.seen) if known is None else known)
            if known is None:
                seen = None if result is None else Seen.of(result)
                self.origins.append(self._origin(seen, given))
                self.seen.append(seen)
                if result is not None:
                    self._numbers[id(result)] = event.results[-1]
        event.view = bool(event.results) and not any(
            n in given or n < self.num_inputs or self.origins[n] == n for n in event.results
        )
        self.events.append(event)

    def _origin(self, result: Seen | None, given: Sequence[int]) -> int:
        """The number of the tensor that owns a new one's memory: itself, or an operand whose memory it shares."""
        own = len(self.seen)
        if result is None or not result.bytes:
            return own
        operands = ((self.origins[number], self.seen[number]) for number in given)
        shared = {origin for origin, seen in operands if seen is not None and seen.storage == result.storage}
        return shared.pop() if len(shared) == 1 else own

    def _operand(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            number = self._number_of(value)
            if number is None:
                self.refusal = "an operand comes from elsewhere"
                return None
            return Number(number)
        if isinstance(value, (tuple, list)):
            parts = tuple(map(self._operand, value))
            if any(isinstance(part, (Number, Group)) for part in parts):
                return Group(partial(tuple.__new__, type(value)) if isinstance(value, tuple) else list, parts)
            return value
        base = getattr(value, "base", None)
        if isinstance(base, Tensor):  # a descriptor for TMA
            return Group(
                partial(_described, type(value), {**vars(value), "base": None}), (self._operand(base),)
            )
        return value


def _depends_on_values(op: Any, args: Sequence[Any]) -> bool:
    """Whether an operation's result has a shape that depends on values, or is a number."""
    if torch.Tag.dynamic_output_shape in op.tags and op.overloadpacket is torch.ops.aten.index:
        return any(t is not None and t.dtype in (torch.bool, torch.uint8) for t in args[1])
    return torch.Tag.dynamic_output_shape in op.tags or torch.Tag.data_dependent_output in op.tags


def _by_name(
    op: Callable[..., Any], count: int, names: Sequence[str], fixed: dict[str, Any]
) -> Callable[..., Any]:
    """An operation that takes its first `count` operands by position and the others by name."""
    return lambda *operands: op(*operands[:count], **dict(zip(names, operands[count:])), **fixed)


def _described(kind: type, fields: dict[str, Any], parts: Sequence[Any]) -> Any:
    """A copy of a checked TMA descriptor with another tensor."""
    made: Any = object.__new__(kind)
    vars(made).update(fields, base=parts[0])
    return made
