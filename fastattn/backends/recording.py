"""Recordings of what a function of tensors does, as programs that `fastattn.backends.replay` runs."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

NOTHING, ONE, SEVERAL, EMPTY, GROUP = range(
    5
)  # what a step gives: beside a value or values, memory or a tuple
LARGE = 2**20  # bytes of a temporary that is released after its last use
_ALLOCATIONS = {
    torch.ops.aten.empty, torch.ops.aten.empty_strided, torch.ops.aten.empty_like, torch.ops.aten.new_empty,
    torch.ops.aten.new_empty_strided,
}  # fmt: skip

Getter = Callable[[list[Any]], Any]
Step = tuple[int, Callable[..., Any], Getter, tuple[int, ...]]  # kind, function, operands, places to release


class _Seen(NamedTuple):
    """A tensor that came up, which may be gone when the program is made."""

    tensor: weakref.ref[Tensor]
    dtype: torch.dtype
    device: torch.device
    shape: torch.Size
    strides: tuple[int, ...]
    address: int
    storage: int  # where its memory begins
    storage_bytes: int

    @classmethod
    def of(cls, tensor: Tensor) -> _Seen:
        storage = tensor.untyped_storage()
        return cls(
            weakref.ref(tensor), tensor.dtype, tensor.device, tensor.shape, tensor.stride(), tensor.data_ptr(),
            storage.data_ptr(), storage.nbytes(),
        )  # fmt: skip

    @property
    def bytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize


@dataclass(frozen=True)
class _Number:
    """A tensor among the operands of an event, by its number; inputs come first."""

    number: int


@dataclass(frozen=True)
class _Group:
    """A tuple, list or descriptor among the operands, that is made of tensors in each call."""

    make: Callable[[Any], Any]
    operands: tuple[Any, ...]


@dataclass
class _Event:
    """One thing that happened."""

    kind: int
    run: Callable[..., Any]
    operands: tuple[Any, ...]
    results: list[int] = field(default_factory=list)
    view: bool = False
    launch: bool = False  # of Triton, which sees nothing but addresses of tensors

    @property
    def matters(self) -> bool:
        """Whether it has to be done though nothing uses its results."""
        return not (self.view or self.kind == EMPTY)


class Recorder:
    """Sees all that a function of `inputs` does while it does it."""

    def __init__(self, inputs: Sequence[Tensor | None]) -> None:
        self.seen = [None if t is None else _Seen.of(t) for t in inputs]  # by number
        self.num_inputs = len(inputs)
        self._numbers = {
            id(t): n for n, t in enumerate(inputs) if t is not None
        }  # of tensors, some of them gone
        self.origins = list(range(len(inputs)))  # by number, that of the tensor whose memory it is
        self.events: list[_Event] = []
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
            self._note(_Event(EMPTY, _memory_like(_Seen.of(results)), ()), results)
        else:
            operands, function = tuple(map(self._operand, args)), op
            named = {name: self._operand(value) for name, value in kwargs.items()}
            variable = [name for name, value in named.items() if isinstance(value, (_Number, _Group))]
            fixed = {name: value for name, value in kwargs.items() if name not in variable}
            if variable:
                function = _by_name(op, len(operands), variable, fixed)
                operands += tuple(named[name] for name in variable)
            elif fixed:
                function = partial(op, **fixed)
            self._note(_Event(ONE, function, operands), results)
        return results

    def launch(self, launch: Any) -> None:
        """A launch of Triton."""
        compiled = self._unseen(launch.start)
        operands = tuple(map(self._operand, launch.args))
        self.events.append(_Event(NOTHING, launch.starter(compiled), operands, launch=True))

    def call(self, function: Callable[..., Any], args: Sequence[Any]) -> Any:
        """A call of the extension."""
        results = self._unseen(function, *args)
        self._note(_Event(ONE, function, tuple(map(self._operand, args))), results)
        return results

    def program(self, result: Any) -> Program | None:
        """What was done, once the function has returned `result`: a tensor or a tuple of tensors and None."""
        parts = result if isinstance(result, tuple) else (result,)
        returned = [None if part is None else self._number_of(part) for part in parts]
        if any(number is None and part is not None for number, part in zip(returned, parts)):
            self.refusal = self.refusal or "a result comes from elsewhere"
        if self.refusal is not None:
            return None
        return Program(self, returned, type(result) if isinstance(result, tuple) else None)

    def _number_of(self, tensor: Tensor) -> int | None:
        """None for a tensor that did not come up."""
        number = self._numbers.get(id(tensor))
        seen = None if number is None else self.seen[number]
        return number if seen is not None and seen.tensor() is tensor else None

    def _unseen(self, function: Callable[..., Any], *args: Any) -> Any:
        self._paused = True
        try:
            return function(*args)
        finally:
            self._paused = False

    def _note(self, event: _Event, results: Any) -> None:
        if results is None:
            event.kind = NOTHING
        elif isinstance(results, (tuple, list)):
            event.kind = SEVERAL
        given = list(_numbers_in(event.operands))
        for result in results if event.kind == SEVERAL else () if event.kind == NOTHING else (results,):
            if result is not None and not isinstance(result, Tensor):
                self.refusal = f"{event.run} gives a {type(result).__name__}"
                return
            known = None if result is None else self._number_of(result)
            event.results.append(len(self.seen) if known is None else known)
            if known is None:
                seen = None if result is None else _Seen.of(result)
                self.origins.append(self._origin(seen, given))
                self.seen.append(seen)
                if result is not None:
                    self._numbers[id(result)] = event.results[-1]
        event.view = bool(event.results) and not any(
            n in given or n < self.num_inputs or self.origins[n] == n for n in event.results
        )
        self.events.append(event)

    def _origin(self, result: _Seen | None, given: Sequence[int]) -> int:
        """The tensor whose memory a new one is: its own, or that of an operand."""
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
            return _Number(number)
        if isinstance(value, (tuple, list)):
            parts = tuple(map(self._operand, value))
            if any(isinstance(part, (_Number, _Group)) for part in parts):
                return _Group(
                    partial(tuple.__new__, type(value)) if isinstance(value, tuple) else list, parts
                )
            return value
        base = getattr(value, "base", None)
        if isinstance(base, Tensor):  # a descriptor for TMA
            return _Group(
                partial(_described, type(value), {**vars(value), "base": None}), (self._operand(base),)
            )
        return value


class Program:
    """What a recorder saw, as steps over a list of values: `constants`, inputs, and what the steps give.

    `result` gets the results from the values.
    """

    def __init__(self, recorder: Recorder, returned: Sequence[int | None], kind: type | None) -> None:
        self._seen, self._origins = recorder.seen, list(recorder.origins)
        self._num_inputs = recorder.num_inputs
        self._instead: dict[int, int] = {}  # of memory, the result as which it is allocated
        needed = {number for number in returned if number is not None}
        events = self._without_unused(self._with_memory_of_results(recorder.events, needed), needed)
        if not self._all_made(events):  # a view that is needed is one of memory that is not allocated as such
            self._instead.clear()
            events = self._without_unused(recorder.events, needed)
        self.constants: list[Any] = []
        self._constant_places: dict[Any, int] = {}
        for event in events:
            self._collect(event.operands)
        self._collect((None,))
        self._first_made = len(self.constants) + self._num_inputs
        self._length = self._first_made  # of the list so far
        self._places = {number: len(self.constants) + number for number in range(self._num_inputs)}
        self.steps: list[Step] = []
        self._make_steps(events, {self._origins[number] for number in needed})
        nothing = self._constant_places[_key(None)]
        places = [nothing if number is None else self._places[number] for number in returned]
        self.result: Getter = itemgetter(places[0]) if kind is None else _tuple_getter(kind, places)
        del self._seen, self._origins, self._instead, self._places, self._constant_places

    def _with_memory_of_results(self, events: Sequence[_Event], needed: set[int]) -> list[_Event]:
        """Memory of which only launches use anything but one result is allocated as that result."""
        used: dict[int, set[int]] = {}  # by memory, what is used otherwise than in launches
        numbers = list(needed)
        for event in events:
            if event.matters and not event.launch:
                numbers += [*_numbers_in(event.operands), *event.results]
        for number in numbers:
            used.setdefault(self._origins[number], set()).add(number)
        kept = []
        for event in events:
            if event.kind == EMPTY and len(views := used.get(event.results[0], set())) == 1:
                (view,), (number,) = views, event.results
                if view != number and self._is_all_of(view, number):
                    self._instead[number] = view
                    event = _Event(EMPTY, _memory_like(self._seen[view]), (), [view])
            elif event.view and self._instead.get(self._origins[event.results[0]]) in event.results:
                continue
            kept.append(event)
        return kept

    def _is_all_of(self, view: int, number: int) -> bool:
        one = self._seen[view]
        return one is not None and one.bytes == one.storage_bytes and self._are_one_place(view, number)

    def _are_one_place(self, view: int, number: int) -> bool:
        """Whether a launch would see no difference."""
        one, whole = self._seen[view], self._seen[number]
        if one is None or whole is None or not one.bytes:
            return False
        return one.dtype == whole.dtype and one.address == whole.address

    def _without_unused(self, events: Sequence[_Event], returned: set[int]) -> list[_Event]:
        """The events that have effects or of which a result is used."""
        needed, kept = set(returned), []
        for event in reversed(events):
            if not (event.matters or needed.intersection(event.results)):
                continue
            if event.launch:
                event = replace(event, operands=_replaced(event.operands, self._for_launch))
            needed.update(_numbers_in(event.operands))
            kept.append(event)
        return kept[::-1]

    def _all_made(self, events: Sequence[_Event]) -> bool:
        """Whether every tensor that is used is an input or a result."""
        made = {*range(self._num_inputs), *(number for event in events for number in event.results)}
        return all(made.issuperset(_numbers_in(event.operands)) for event in events)

    def _for_launch(self, number: int) -> int:
        """The tensor that a launch gets instead of a view of the same address and dtype."""
        origin = self._origins[number]
        return self._instead.get(origin, origin) if self._are_one_place(number, origin) else number

    def _collect(self, operands: Iterable[Any]) -> None:
        """Give every constant among operands a place."""
        for operand in operands:
            if isinstance(operand, _Group):
                self._collect(operand.operands)
            elif not isinstance(operand, _Number) and _key(operand) not in self._constant_places:
                self._constant_places[_key(operand)] = len(self.constants)
                self.constants.append(operand)

    def _make_steps(self, events: Sequence[_Event], kept: set[int]) -> None:
        last_use = {self._origins[n]: i for i, event in enumerate(events) for n in _all_numbers_of(event)}
        for i, event in enumerate(events):
            released: list[int] = []
            places = [self._place(operand, released) for operand in event.operands]
            for number in event.results:
                self._places.setdefault(number, self._length)
                self._length += 1
            done = {
                o for o in map(self._origins.__getitem__, _all_numbers_of(event)) if last_use[o] == i
            } - kept
            released += [
                place
                for number, place in self._places.items()
                if place >= self._first_made and self._origins[number] in done and self._is_large(number)
            ]
            self.steps.append((event.kind, event.run, _getter(places), tuple(released)))

    def _place(self, operand: Any, released: list[int]) -> int:
        """Where an operand lies. A tuple is made in a step of its own, and released if something large is in it."""
        if isinstance(operand, _Number):
            return self._places[operand.number]
        if not isinstance(operand, _Group):
            return self._constant_places[_key(operand)]
        places = [self._place(part, released) for part in operand.operands]
        self.steps.append((GROUP, operand.make, _getter(places), ()))
        if any(map(self._is_large, _numbers_in(operand.operands))):
            released.append(self._length)
        self._length += 1
        return self._length - 1

    def _is_large(self, number: int) -> bool:
        seen = self._seen[number]
        return seen is not None and seen.storage_bytes >= LARGE


def _depends_on_values(op: Any, args: Sequence[Any]) -> bool:
    """Whether what an operation gives has no shape known beforehand, or is a number."""
    if torch.Tag.dynamic_output_shape in op.tags and op.overloadpacket is torch.ops.aten.index:
        return any(t is not None and t.dtype in (torch.bool, torch.uint8) for t in args[1])
    return torch.Tag.dynamic_output_shape in op.tags or torch.Tag.data_dependent_output in op.tags


def _key(constant: Any) -> Any:
    """What tells constants apart: 1, 1.0 and True are equal, and so are 0.0 and -0.0."""
    told = (
        repr(constant) if isinstance(constant, (int, float, str, tuple, list, type(None))) else id(constant)
    )
    return type(constant), told


def _numbers_in(operands: Iterable[Any]) -> Iterator[int]:
    for operand in operands:
        if isinstance(operand, _Number):
            yield operand.number
        elif isinstance(operand, _Group):
            yield from _numbers_in(operand.operands)


def _all_numbers_of(event: _Event) -> list[int]:
    return [*_numbers_in(event.operands), *event.results]


def _replaced(operands: tuple[Any, ...], instead: Callable[[int], int]) -> tuple[Any, ...]:
    """The operands with other tensors."""
    made: list[Any] = []
    for operand in operands:
        if isinstance(operand, _Number):
            operand = _Number(instead(operand.number))
        elif isinstance(operand, _Group):
            operand = _Group(operand.make, _replaced(operand.operands, instead))
        made.append(operand)
    return tuple(made)


def _getter(places: Sequence[int]) -> Getter:
    """A tuple or list of the values at these places."""
    if len(places) > 1:
        return itemgetter(*places)
    return itemgetter(slice(places[0], places[0] + 1) if places else slice(0))


def _tuple_getter(kind: type, places: Sequence[int]) -> Getter:
    get = _getter(places)
    return lambda values: tuple.__new__(kind, get(values))


def _memory_like(made: _Seen | None) -> Callable[[], Tensor]:
    """What allocates memory like a tensor's."""
    assert made is not None
    return partial(torch.empty_strided, made.shape, made.strides, dtype=made.dtype, device=made.device)


def _by_name(
    op: Callable[..., Any], count: int, names: Sequence[str], fixed: dict[str, Any]
) -> Callable[..., Any]:
    """An operation that gets its first `count` operands by position and the others by name."""
    return lambda *operands: op(*operands[:count], **dict(zip(names, operands[count:])), **fixed)


def _described(kind: type, fields: dict[str, Any], parts: Sequence[Any]) -> Any:
    """A descriptor that differs from one that was checked in its tensor alone."""
    made = object.__new__(kind)
    vars(made).update(fields, base=parts[0])
    return made
