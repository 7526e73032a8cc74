"""A replay serves one class of calls: calls that differ in spec, strides or alignment have plans of their own.

Launches are recorded instead of made: a call through a plan launches the same, on the same memory, as without one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields
from functools import partial
from typing import Any

import pytest
import torch
from replay_calls import (
    BIAS,
    CLASSES,
    IDS,
    OPS,
    SLOPES,
    Call,
    Noted,
    Tensors,
    attend,
    heads,
    launched,
    noted,
    requiring,
    rows,
    wider,
    without_plan,
)
from torch import Tensor

import fastattn
from fastattn.ops import arguments, plan
from fastattn.spec import AttentionCall, AttentionSpec, GradsNeeded, SoftmaxSpec

pytestmark = pytest.mark.filterwarnings("ignore:FASTATTN_BACKEND:RuntimeWarning")


@pytest.fixture
def triton() -> Iterator[Noted]:
    with noted() as found:
        yield found


def check_apart(found: Noted, one: tuple[Call, Tensors], other: tuple[Call, Tensors]) -> None:
    """Either after plans of both were made, in any order, launches what it launches alone."""
    expected = [without_plan(found, *each) for each in (one, other)]
    for order in ((0, 1), (1, 0)):
        plan.clear()
        for number, times in zip((*order, *order), (3, 3, 1, 1)):
            for _ in range(times):
                assert launched(found, *(one, other)[number]) == expected[number]
    refused = sum(isinstance(each[0], type) for each in expected)
    assert plan.count() == 2 - refused


def _far_apart() -> Tensors:
    """Keys of which the second batch entry begins 2**31 elements behind the first: the memory is never touched."""
    whole = torch.empty(2**31 + 2 * 12 * 16, dtype=torch.float16)
    tensors = heads()
    return {**tensors, "key": whole.as_strided((2, 2, 12, 16), (2**31, 12 * 16, 16, 1))}


# A change of the plain call by the fields of the spec that it is there for.
CHANGES: dict[str, tuple[Callable[[], Tensors], dict[str, Any]]] = {
    "dtype": (partial(heads, torch.bfloat16), {}),
    "head_dim": (partial(heads, dim=32, value_dim=16), {}),
    "value_dim": (partial(heads, value_dim=32), {}),
    "group_size": (partial(heads, kv=4), {}),
    "few_kv_heads": (lambda: {n: t.repeat(1, 8, 1, 1) for n, t in heads().items()}, {}),
    "causal": (heads, {"causal": True}),
    "window_left": (heads, {"window": (3, None)}),
    "window_right": (heads, {"window": (None, 3)}),
    "mask": (lambda: {**heads(), "mask": torch.ones(2, 4, 12, 12, dtype=torch.bool)}, {}),
    "bias": (lambda: {**heads(), "bias": BIAS.clone()}, {}),
    "segments": (lambda: {**heads(), **IDS}, {}),
    "key_lengths": (lambda: {**heads(), "key_lengths": torch.tensor([3, 4])}, {}),
    "alibi": (lambda: {**heads(), "alibi_slopes": SLOPES.clone()}, {}),
    "softcap": (heads, {"softcap": 3.0}),
    "sinks": (lambda: {**heads(), "sinks": torch.zeros(4)}, {}),
    "dropout": (heads, {"dropout_p": 0.5, "dropout_seed": 3}),
    "single_query": (partial(heads, seqlen=1), {}),
    "aligned": (lambda: {**heads(), "key": CLASSES["one element on"](heads()["key"])}, {}),
    "describable": (lambda: {**heads(), "key": heads()["key"][:1].expand(2, -1, -1, -1)}, {}),
    "int64_offsets": (_far_apart, {}),
    "backward": (lambda: requiring(heads(), "query", "key", "value"), {}),
    "bias_grad": (lambda: requiring({**heads(), "bias": BIAS.clone()}, "bias"), {}),
    "alibi_grad": (lambda: requiring({**heads(), "alibi_slopes": SLOPES.clone()}, "alibi_slopes"), {}),
}
ELSEWHERE = {"device", "arch", "float32_precision"}  # no such device here; a test of its own


def spec_of(tensors: Tensors, options: dict[str, Any]) -> AttentionSpec:
    ids = (tensors["query_ids"], tensors["key_ids"]) if "key_ids" in tensors else None
    given = dict.fromkeys(
        ("window", "mask", "bias", "key_lengths", "alibi_slopes", "softcap", "sinks", "scale")
    )
    rest = {name: t for name, t in tensors.items() if not name.endswith("_ids")}
    defaults = {"causal": False, "dropout_p": 0.0, "dropout_seed": None}
    call = AttentionCall(
        *arguments.call_arguments(**{**given, **defaults, **rest, **options}, segment_ids=ids)
    )
    needs = GradsNeeded(
        *(getattr(call, n) is not None and getattr(call, n).requires_grad for n in GradsNeeded._fields)
    )
    return AttentionSpec.of(call, needs if any(needs) else None)


def test_every_field_of_a_spec_has_a_change() -> None:
    assert set(CHANGES) | ELSEWHERE == {field.name for field in fields(AttentionSpec)}
    plain = spec_of(heads(), {})
    for name, (make, options) in CHANGES.items():
        changed = spec_of(make(), options)
        assert getattr(changed, name) != getattr(plain, name), name


@pytest.mark.parametrize("field", CHANGES)
def test_calls_that_differ_in_a_field_of_the_spec(triton: Noted, field: str) -> None:
    make, options = CHANGES[field]
    check_apart(triton, (attend, heads()), (partial(attend, **options), make()))


def test_calls_that_differ_in_the_precision_of_products(triton: Noted) -> None:
    tensors = heads(torch.float32)
    exact, fast = (partial(attend, precision=precision) for precision in ("highest", "high"))
    assert without_plan(triton, exact, tensors) != without_plan(triton, fast, tensors)
    check_apart(triton, (exact, tensors), (fast, tensors))


@pytest.mark.parametrize(
    "options", [{"scale": 0.3}, {"causal": "top_left"}, {"window": (4, 1)}, {"softcap": 2.0}]
)
def test_calls_that_differ_in_a_number(triton: Noted, options: dict[str, Any]) -> None:
    first = {name: {"scale": 0.2, "causal": True, "window": (3, 1), "softcap": 3.0}[name] for name in options}
    check_apart(triton, (partial(attend, **first), heads()), (partial(attend, **options), heads()))


LAID_OUT = [(op, name) for op, (_, make, _) in OPS.items() for name in make()]


@pytest.mark.parametrize(("op", "name"), LAID_OUT)
def test_calls_that_differ_in_the_layout_of_a_tensor(triton: Noted, op: str, name: str) -> None:
    call, make, leaves = OPS[op]
    plain = requiring(make(), *leaves)
    for change in CLASSES.values():
        tensors = make()
        tensors = requiring({**tensors, name: change(tensors[name])}, *leaves)
        same = tensors[name].stride() == plain[name].stride()
        if not (same and (tensors[name].data_ptr() - plain[name].data_ptr()) % 16 == 0):
            check_apart(triton, (call, plain), (call, tensors))


@pytest.mark.parametrize("op", [op for op, (_, _, leaves) in OPS.items() if leaves])
def test_gradients_that_arrive_in_any_layout(triton: Noted, op: str) -> None:
    """One forward plan serves all; replays of the backward are told apart, and are few."""
    call, make, leaves = OPS[op]
    tensors = requiring(make(), *leaves)
    changes: list[Callable[[Tensor], Tensor]] = [torch.ones_like]
    changes += [
        lambda t, c=c: c(torch.ones_like(t)) if t.dim() else torch.ones_like(t) for c in CLASSES.values()
    ]
    expected = [without_plan(triton, call, tensors, upstream=change) for change in changes]
    assert launched(triton, call, tensors) == expected[0]
    for _ in range(2):
        for change, launches in zip(changes, expected):
            assert launched(triton, call, tensors, upstream=change) == launches
    assert plan.count() == 1


@pytest.mark.parametrize("op", [op for op, (_, _, leaves) in OPS.items() if leaves])
def test_saved_tensors_that_come_back_elsewhere(triton: Noted, op: str) -> None:
    """Hooks may keep them on another device, and give back copies at any address."""
    call, make, leaves = OPS[op]
    tensors = requiring(make(), *leaves)

    def moved(t: Tensor) -> Tensor:
        return wider(t.detach(), 1, 1) if t.dim() and t.numel() else t

    def shape_of(found: Any) -> Any:  # whose memory it is changes
        return [(name, grid, options) for name, grid, _, options in found]

    def hooked(given: Tensors) -> Any:
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, moved):
            return call(given)

    def units(found: Any) -> list[Any]:
        return [arg for _, _, args, _ in found for arg in args if str(arg[0]).endswith(("Variant", "int"))]

    expected = [without_plan(triton, each, tensors) for each in (call, hooked)]
    for _ in range(3):
        for each, launches in zip((call, hooked), expected):
            now = launched(triton, each, tensors)
            assert shape_of(now) == shape_of(launches)
            assert units(now) == units(launches)


def test_kinds_of_backward_passes_are_bounded(triton: Noted, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "MOST_BACKWARDS", 2)
    x = requiring({"x": torch.zeros(3, 32, 5)}, "x")
    for change in (*CLASSES.values(), *CLASSES.values()):
        call = partial(launched, triton, rows, x, upstream=lambda t, c=change: c(torch.ones_like(t)))
        expected = without_plan(triton, rows, x, upstream=lambda t, c=change: c(torch.ones_like(t)))
        for _ in range(3):
            assert call() == expected
    (made,) = plan._plans.values()
    assert len(made.backward_replays._by_kind) == 2


def test_negated_gradients_are_resolved(triton: Noted) -> None:
    """A view that torch negates when it is read has memory of other values."""
    x = requiring({"x": torch.zeros(3, 32, 5)}, "x")

    def negated(out: Tensor) -> Tensor:
        return torch.complex(torch.zeros_like(out), torch.ones_like(out)).conj().imag

    assert negated(torch.ones(2)).is_neg()
    for _ in range(4):
        assert launched(triton, rows, x, upstream=negated) == without_plan(triton, rows, x, upstream=negated)


@pytest.mark.parametrize("same", [("query", "key"), ("key", "value"), ("query", "key", "value")])
def test_a_tensor_given_twice_is_two_in_the_next_call(triton: Noted, same: tuple[str, ...]) -> None:
    apart = heads(kv=4)
    together = {**apart, **dict.fromkeys(same, apart[same[0]])}
    check_shared = [without_plan(triton, attend, each) for each in (together, apart)]
    for _ in range(3):
        assert launched(triton, attend, together) == check_shared[0]
    for _ in range(3):
        assert launched(triton, attend, apart) == check_shared[1]


ROW_CHANGES: dict[str, tuple[Callable[[], Tensors], dict[str, Any]]] = {
    "dtype": (lambda: {"x": torch.zeros(3, 32, dtype=torch.bfloat16)}, {}),
    "columns": (lambda: {"x": torch.zeros(3, 40)}, {}),
    "unit_columns": (lambda: {"x": torch.zeros(32, 3).mT}, {}),
    "int64_offsets": (
        lambda: {"x": torch.empty(2**31 + 32, dtype=torch.bfloat16).as_strided((3, 32), (2**30, 1))},
        {},
    ),
    "mask": (lambda: {"x": torch.zeros(3, 32), "mask": torch.ones(3, 32, dtype=torch.bool)}, {}),
    "causal": (lambda: {"x": torch.zeros(3, 32)}, {"causal": True}),
    "log": (lambda: {"x": torch.zeros(3, 32)}, {"log": True}),
    "backward": (lambda: {"x": torch.zeros(3, 32, requires_grad=True)}, {}),
    "aligned": (lambda: {"x": torch.zeros(97)[1:].view(3, 32)}, {}),
    "number of rows": (lambda: {"x": torch.zeros(4, 32)}, {}),
    "scale": (lambda: {"x": torch.zeros(3, 32)}, {"scale": 2.0}),
}


def test_every_field_of_a_spec_of_rows_has_a_change() -> None:
    plain = SoftmaxSpec.of(torch.zeros(3, 32))
    names = {field.name for field in fields(SoftmaxSpec)}
    assert names - {"device", "arch"} == names & set(ROW_CHANGES)
    for name in names & set(ROW_CHANGES) - {"mask", "causal", "log", "backward"}:
        assert getattr(SoftmaxSpec.of(ROW_CHANGES[name][0]()["x"]), name) != getattr(plain, name), name


@pytest.mark.parametrize("field", ROW_CHANGES)
def test_rows_that_differ_in_a_field_of_the_spec(triton: Noted, field: str) -> None:
    make, options = ROW_CHANGES[field]

    def soft(given: Tensors, **more: Any) -> Any:
        return fastattn.softmax(**given, **more)

    check_apart(triton, (soft, {"x": torch.zeros(3, 32)}), (partial(soft, **options), make()))
