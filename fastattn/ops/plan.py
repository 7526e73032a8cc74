"""Plans: the outcome of the checks and choices of a call, kept for the next call of the same kind.

A key holds all that a plan depends on: the state of torch and of the environment, of every tensor its dispatch keys,
dtype, shape, strides and whether it requires grad, and the other arguments. Values of tensors are in no key, so a plan
checks those again. A call that has no key takes the full path; so do the first two of every kind, the second of which
makes the plan.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import Parameter

from fastattn import backends, torch_compat
from fastattn.backends import switches
from fastattn.backends.replay import Replay
from fastattn.ops import plain
from fastattn.spec import float32_precision
from fastattn.strides import ALIGNMENT

MOST = 1024  # plans that are kept; a table that has grown so large is emptied
MOST_GUARDS = 4  # that are tried before a key is made
MOST_BACKWARDS = 8  # kinds of backward passes of one plan that are replayed

Key = tuple[Any, ...]
Plan = Callable[..., Any]
Guarded = tuple[Callable[..., bool], Plan]

_plans: dict[Key, Plan] = {}
# by the parts of a key that are cheap to make: guards, which check whether tensors match a plan, each with its plan
_guarded: dict[Key, tuple[Guarded, ...]] = {}
# by op, options and types of tensors alone: (grad mode, guard, plan) of the last such call, on a CPU
_last: dict[Key, tuple[bool, Callable[..., bool], Plan]] = {}
_seen: set[int] = set()  # hashes of keys of earlier calls: a key gets its plan when it occurs again
_lock = threading.Lock()
_NONE = type(None)
_PLAIN = frozenset({Tensor, Parameter, _NONE})


def look_up(op: str, tensors: tuple[Any, ...], options: tuple[Any, ...]) -> tuple[Key | None, Plan | None]:
    """(the key of a call, its plan if there is one). There is no key where the call must take the full path, as a mode
    or transform is active, autocast may cast its tensors or an option is unhashable, and where a guard found the plan.

    options: everything else that the call depends on, the name of a backend last. Numbers come with their types, since
    True equals 1.
    """
    if not torch_compat.nothing_records() or plain.chosen:
        return None, None
    environment = switches.environment()
    kinds = tuple(map(type, tensors))
    given: Sequence[Tensor] | None = None if _NONE in kinds else tensors
    brief = (op, options, kinds)
    if environment is switches.UNSET:
        try:
            last = _last.get(brief)
        except TypeError:  # an option without a hash
            return None, None
        if last is not None and last[0] is torch.is_grad_enabled():
            given = _given(tensors) if given is None else given
            if last[1](*given):
                return None, last[2]
    if not _PLAIN.issuperset(kinds):
        return None, None
    first, second = tensors[0], tensors[1]
    if first is None:  # which the full path refuses
        return None, None
    outside: tuple[Any, ...] = ()  # what no tensor's shape, strides, dtype and dispatch keys tell
    if first.is_cuda or environment is not switches.UNSET or options[-1] not in _ON_ANY_ADDRESS:
        try:
            alignment = [None if tensor is None else tensor.data_ptr() % ALIGNMENT for tensor in tensors]
        except RuntimeError:  # a transform has wrapped one
            return None, None
        outside = (environment, first.device, float32_precision(first.dtype), *alignment)
    second_shape = None if second is None else second.shape
    glance = (op, options, kinds, outside, first.shape, second_shape, torch.is_grad_enabled())
    try:
        guarded = _guarded.get(glance)
    except TypeError:  # an option without a hash
        return None, None
    if guarded is not None:
        given = _given(tensors) if given is None else given
        for guard, found in guarded:
            if guard(*given):
                if not outside and len(_last) < MOST:
                    _last[brief] = (torch.is_grad_enabled(), guard, found)
                return None, found
    state = torch_compat.state_of_call(tensors)
    if state is None:
        return None, None
    key = (op, options, outside, *state)
    planned = _plans.get(key)
    if planned is not None:
        _guard(glance, tensors, planned)
    return key, planned


def _given(tensors: tuple[Any, ...]) -> Sequence[Tensor]:
    return [tensor for tensor in tensors if tensor is not None]


def _guard(glance: Key, tensors: tuple[Any, ...], planned: Plan) -> None:
    """Let the next call with these tensors find its plan by a guard, the first of a few."""
    guard = _guard_of(_given(tensors))
    if guard is None:
        return
    with _lock:
        if len(_guarded) >= MOST:
            _guarded.clear()
        _guarded[glance] = ((guard, planned), *_guarded.get(glance, ())[: MOST_GUARDS - 1])


def _guard_of(given: Sequence[Tensor]) -> Callable[..., bool] | None:
    """A guard of these tensors; None without torch's guards, and for a tensor given twice, which no guard passes."""
    if len(set(map(id, given))) < len(given):
        return None
    guard = torch_compat.tensor_guard(given)
    return guard if guard is not None and guard(*given) else None


# Names by which a call on a CPU reaches the torch backend, which ignores addresses and precision settings.
_ON_ANY_ADDRESS = ("auto", backends.torch_backend.NAME)


def sides(window: Any) -> Any:
    """A window as a key holds it, with the types of its sides."""
    return (*window, *map(type, window)) if type(window) is tuple or type(window) is list else window


def outlook(*arguments: Any) -> str:
    """ "planned" for a call with these arguments, or "not planned: " and the reason; what `look_up` does, in words."""
    given: list[Any] = []
    for argument in arguments:
        pair = type(argument) is tuple and any(isinstance(part, Tensor) for part in argument)
        given += argument if pair else [argument]
    reason = _why_not([each for each in given if isinstance(each, Tensor)], given)
    return "planned" if reason is None else f"not planned: {reason}"


def _why_not(tensors: list[Tensor], given: list[Any]) -> str | None:
    if switches.plans_are_off():
        return f"{switches.VARIABLE} switches {switches.PLAN} off"
    if plain.chosen or plain.wanted():
        return "plain_torch, an export or a trace is on"
    for kind in map(type, tensors):
        if kind not in _PLAIN:
            return f"an operand is of class {kind.__name__}"
    for each in given:
        try:
            hash(each)
        except TypeError:
            return f"an argument of class {type(each).__name__} has no hash"
    if (what := torch_compat.what_records()) is not None:
        return what
    if torch_compat.state_of_call(tensors) is None:
        return "an operand is not a plain tensor of its device"
    return None


def without_number(others: tuple[Any, ...]) -> tuple[Any, ...]:
    """Optional tensors without a last one, the seed, that is a number: every call checks that anew."""
    return others if not others or isinstance(others[-1], Tensor) else others[:-1]


def wanted(key: Key | None) -> bool:
    """Whether to make a plan after a call on the full path: the second one of a key, unless plans are switched off."""
    if key is None or switches.plans_are_off():
        return False
    with _lock:
        if (number := hash(key)) in _seen:
            return True
        if len(_seen) >= MOST:
            _seen.clear()
        _seen.add(number)
    return False


def keep(key: Key | None, plan: Plan) -> None:
    """Keep a plan for the next call of this key."""
    if key is None:
        return
    with _lock:
        if len(_plans) >= MOST:
            _plans.clear()
            _guarded.clear()
            _last.clear()
        _plans[key] = plan


def clear() -> None:
    """Forget all plans, as after tiles were measured."""
    with _lock:
        _plans.clear()
        _guarded.clear()
        _last.clear()
        _seen.clear()


def count() -> int:
    """How many plans are kept."""
    return len(_plans)


class Differentiable(Protocol):
    """A plan that autograd records."""

    def recorded(self, tensors: tuple[Any, ...]) -> tuple[Any, tuple[Tensor | None, ...]]:
        """(the results of a call, what its backward needs: the same tensors as the op's own registration keeps)."""

    def gradients(
        self, kept: tuple[Any, ...], upstream_grads: tuple[Tensor | None, ...]
    ) -> list[Tensor | None]:
        """A gradient or None for each of the tensors, where at least one upstream gradient is given."""


class Recorded(torch.autograd.Function):
    """A planned call for autograd, without what the dispatcher and its registration do for each call."""

    @staticmethod
    def forward(ctx: Any, planned: Differentiable, *tensors: Tensor | None) -> Any:
        results, kept = planned.recorded(tensors)
        ctx.planned, ctx.count = planned, len(tensors)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*kept)
        return results

    @staticmethod
    def backward(ctx: Any, *upstream_grads: Tensor | None) -> tuple[Tensor | None, ...]:
        for grad in upstream_grads:
            if grad is not None:
                break
        else:
            return (None,) * (1 + ctx.count)
        return (None, *ctx.planned.gradients(ctx.saved_tensors, upstream_grads))


class BackwardReplays:
    """The replays of a backward pass. They have keys of their own, since upstream gradients may have any strides and
    address, and saved tensors may have been moved since the forward."""

    __slots__ = ("_by_kind", "_function", "_guarded")

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self._by_kind: dict[Key, Replay] = {}
        self._guarded: tuple[tuple[Callable[..., bool], Key, Replay], ...] = ()

    def find(self, *tensors: Tensor | None) -> Callable[..., Any] | None:
        """The function that computes gradients of tensors of these classes; None where only the op can. Only where
        not `backward_needs_op`."""
        first = tensors[0]
        if first is None:
            return None
        try:
            addresses = [None if tensor is None else tensor.data_ptr() % ALIGNMENT for tensor in tensors]
        except RuntimeError:  # one has no memory of its own
            return None
        outside = (first.device, float32_precision(first.dtype), *addresses)
        given = _given(tensors)
        for guard, known, replay in self._guarded:
            if known == outside and guard(*given):
                return replay
        state = torch_compat.state_of_call(tensors)
        if state is None:
            return None
        found = self._by_kind.get((*outside, *state))
        if found is None:
            if len(self._by_kind) >= MOST_BACKWARDS:
                return self._function
            found = self._by_kind.setdefault((*outside, *state), Replay(self._function))
        if (made := _guard_of(given)) is not None:
            self._guarded = ((made, outside, found), *self._guarded[: MOST_GUARDS - 1])
        return found


def backward_needs_op(environment: Any) -> bool:
    """Whether a backward has to go through the op: a second derivative may follow, something besides autograd records,
    or the environment has changed since the forward."""
    return (
        torch.is_grad_enabled()
        or not torch_compat.only_autograd_records()
        or switches.environment() != environment
    )
