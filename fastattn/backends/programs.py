"""Programs of what was recorded of a function of tensors: the steps that `fastattn.backends.replay` runs."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from operator import itemgetter
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

# What a step produces: nothing, one value, several values, uninitialised memory, or a tuple made of values.
NOTHING, ONE, SEVERAL, EMPTY, GROUP = range(5)
LARGE = 2**20  # bytes of a temporary that is released after its last use
Getter = Callable[[list[Any]], Any]
Step = tuple[int, Callable[..., Any], Getter, tuple[int, ...]]  # kind, function, operands, places to release


class Seen(NamedTuple):
    """A recorded tensor. It is held weakly: it may be freed before the program is made."""

    tensor: weakref.ref[Tensor]
    dtype: torch.dtype
    device: torch.device
    shape: torch.Size
    strides: tuple[int, ...]
    address: int
    storage: int  # where its memory begins
    storage_bytes: int

    @classmethod
    def of(cls, tensor: Tensor) -> Seen:
        storage = tensor.untyped_storage()
        return cls(
            weakref.ref(tensor), tensor.dtype, tensor.device, tensor.shape, tensor.stride(), tensor.data_ptr(),
            storage.data_ptr(), storage.nbytes(),
        )  # fmt: skip

    @property
    def bytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize


@dataclass(frozen=True)
class Number:
    """A tensor among the operands of an event, by its number; inputs come first."""

    number: int


@dataclass(frozen=True)
class Group:
    """A tuple, list or descriptor among the operands, that is made of tensors in each call."""

    make: Callable[[Any], Any]
    operands: tuple[Any, ...]


@dataclass
class Event:
    """One recorded step: an operation, a launch, a call of the extension or an allocation."""

    kind: int
    run: Callable[..., Any]
    operands: tuple[Any, ...]
    results: list[int] = field(default_factory=list)
    view: bool = False
    launch: bool = False  # of Triton, which sees nothing but addresses of tensors

    @property
    def matters(self) -> bool:
        """Whether the step has an effect, so that it runs even if nothing uses its results."""
        return not (self.view or self.kind == EMPTY)


class Record(Protocol):
    """The recorded steps of a function."""

    seen: list[Seen | None]  # the recorded tensors by number, inputs first
    num_inputs: int
    origins: list[int]  # by number, the number of the tensor that owns the memory
    events: list[Event]


class Program:
    """A record as steps over a list of values: `constants`, inputs, and the results of the steps.

    `result` gets the results from the values.
    """

    def __init__(self, record: Record, returned: Sequence[int | None], kind: type | None) -> None:
        self._seen, self._origins, self._num_inputs = record.seen, list(record.origins), record.num_inputs
        self._instead: dict[int, int] = {}  # of memory, the result as which it is allocated
        needed = {number for number in returned if number is not None}
        events = self._without_unused(self._with_memory_of_results(record.events, needed), needed)
        if not self._all_made(events):  # a view that is needed is one of memory that is not allocated as such
            self._instead.clear()
            events = self._without_unused(record.events, needed)
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

    def _with_memory_of_results(self, events: Sequence[Event], needed: set[int]) -> list[Event]:
        """Memory that is read outside of launches as one result only is allocated with the shape of that result."""
        used: dict[int, set[int]] = {}  # by memory, the tensors in it that are used outside of launches
        numbers = list(needed)
        for event in events:
            if event.matters and not event.launch:
                numbers += [*numbers_in(event.operands), *event.results]
        for number in numbers:
            used.setdefault(self._origins[number], set()).add(number)
        kept = []
        for event in events:
            if event.kind == EMPTY and len(views := used.get(event.results[0], set())) == 1:
                (view,), (number,) = views, event.results
                if view != number and self._is_all_of(view, number):
                    self._instead[number] = view
                    event = Event(EMPTY, memory_like(self._seen[view]), (), [view])
            elif event.view and self._instead.get(self._origins[event.results[0]]) in event.results:
                continue
            kept.append(event)
        return kept

    def _is_all_of(self, view: int, number: int) -> bool:
        one = self._seen[view]
        return one is not None and one.bytes == one.storage_bytes and self._are_one_place(view, number)

    def _are_one_place(self, view: int, number: int) -> bool:
        """Whether a launch cannot tell them apart: both have the same dtype and address."""
        one, whole = self._seen[view], self._seen[number]
        if one is None or whole is None or not one.bytes:
            return False
        return one.dtype == whole.dtype and one.address == whole.address

    def _without_unused(self, events: Sequence[Event], returned: set[int]) -> list[Event]:
        """The events that have effects or of which a result is used."""
        needed, kept = set(returned), []
        for event in reversed(events):
            if not (event.matters or needed.intersection(event.results)):
                continue
            if event.launch:
                event = replace(event, operands=_replaced(event.operands, self._for_launch))
            needed.update(numbers_in(event.operands))
            kept.append(event)
        return kept[::-1]

    def _all_made(self, events: Sequence[Event]) -> bool:
        """Whether every tensor that is used is an input or a result."""
        made = {*range(self._num_inputs), *(number for event in events for number in event.results)}
        return all(made.issuperset(numbers_in(event.operands)) for event in events)

    def _for_launch(self, number: int) -> int:
        """The tensor that a launch gets instead of a view of the same address and dtype."""
        origin = self._origins[number]
        return self._instead.get(origin, origin) if self._are_one_place(number, origin) else number

    def _collect(self, operands: Iterable[Any]) -> None:
        """Assign a place in `constants` to every constant among the operands."""
        for operand in operands:
            if isinstance(operand, Group):
                self._collect(operand.operands)
            elif not isinstance(operand, Number) and _key(operand) not in self._constant_places:
                self._constant_places[_key(operand)] = len(self.constants)
                self.constants.append(operand)

    def _make_steps(self, events: Sequence[Event], kept: set[int]) -> None:
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
        """The place of an operand. A tuple is made in a step of its own, and released if it holds a large tensor."""
        if isinstance(operand, Number):
            return self._places[operand.number]
        if not isinstance(operand, Group):
            return self._constant_places[_key(operand)]
        places = [self._place(part, released) for part in operand.operands]
        self.steps.append((GROUP, operand.make, _getter(places), ()))
        if any(map(self._is_large, numbers_in(operand.operands))):
            released.append(self._length)
        self._length += 1
        return self._length - 1

    def _is_large(self, number: int) -> bool:
        seen = self._seen[number]
        return seen is not None and seen.storage_bytes >= LARGE


def _key(constant: Any) -> Any:
    """A key that tells constants apart: 1, 1.0 and True are equal, and so are 0.0 and -0.0."""
    told = (
        repr(constant) if isinstance(constant, (int, float, str, tuple, list, type(None))) else id(constant)
    )
    return type(constant), told


def numbers_in(operands: Iterable[Any]) -> Iterator[int]:
    for operand in operands:
        if isinstance(operand, Number):
            yield operand.number
        elif isinstance(operand, Group):
            yield from numbers_in(operand.operands)


def _all_numbers_of(event: Event) -> list[int]:
    return [*numbers_in(event.operands), *event.results]


def _replaced(operands: tuple[Any, ...], instead: Callable[[int], int]) -> tuple[Any, ...]:
    """The operands with other tensors."""
    made: list[Any] = []
    for operand in operands:
        if isinstance(operand, Number):
            operand = Number(instead(operand.number))
        elif isinstance(operand, Group):
            operand = Group(operand.make, _replaced(operand.operands, instead))
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


def memory_like(made: Seen | None) -> Callable[[], Tensor]:
    """A function that allocates memory like a tensor's."""
    assert made is not None
    return partial(torch.empty_strided, made.shape, made.strides, dtype=made.dtype, device=made.device)
