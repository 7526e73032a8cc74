"""A replay is of one class of call: whatever a spec, a stride or an address tells apart is planned apart.

Launches are noted, not made: what a call through a plan launches, on which memory, is what it launches without.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from functools import partial
from typing import Any

import pytest
import torch
from replay_calls import Noted, noted
from torch import Tensor

import fastattn
from fastattn.ops import arguments, plan
from fastattn.spec import AttentionCall, AttentionSpec, GradsNeeded, SoftmaxSpec

Tensors = dict[str, Tensor]
Call = Callable[..., Any]
pytestmark = pytest.mark.filterwarnings("ignore:FASTATTN_BACKEND:RuntimeWarning")


@pytest.fixture
def triton() -> Iterator[Noted]:
    with noted() as found:
        yield found


def graded(call: Call, tensors: Tensors, upstream: Callable[[Tensor], Tensor] = torch.ones_like) -> Tensors:
    """A call, and its backward where something requires grad; the gradients that arrived, by name."""
    results = call(tensors)
    results = results if isinstance(results, tuple) else (results,)
    given = {f"upstream {n}": upstream(r) for n, r in enumerate(results) if r.requires_grad}
    leaves = [t for t in tensors.values() if t.requires_grad]
    if given:
        of = [r for r in results if r.requires_grad]
        torch.autograd.grad(of, leaves, list(given.values()), allow_unused=True)
    return given


def launched(found: Noted, call: Call, tensors: Tensors, **options: Any) -> Any:
    """What a call launches, or the error it raises."""
    try:
        given = graded(call, tensors, **options)
    except (ValueError, TypeError, RuntimeError) as error:
        found.take({})
        return type(error), str(error)
    return found.take({**tensors, **given})


def without_plan(found: Noted, call: Call, tensors: Tensors, **options: Any) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTATTN_DISABLE", "plan")
        return launched(found, call, tensors, **options)


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


def heads(dtype: torch.dtype = torch.float16, kv: int = 2, seqlen: int = 12, **dims: int) -> Tensors:
    dim, value_dim = dims.get("dim", 16), dims.get("value_dim", dims.get("dim", 16))
    return {
        "query": torch.zeros(2, 4, seqlen, dim, dtype=dtype),
        "key": torch.zeros(2, kv, 12, dim, dtype=dtype),
        "value": torch.zeros(2, kv, 12, value_dim, dtype=dtype),
    }


def attend(tensors: Tensors, precision: str | None = None, **options: Any) -> Any:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision or before)
    ids = (tensors["query_ids"], tensors["key_ids"]) if "key_ids" in tensors else None
    rest = {name: t for name, t in tensors.items() if not name.endswith("_ids")}
    try:
        return fastattn.attention(**rest, segment_ids=ids, return_lse=True, **options)
    finally:
        torch.set_float32_matmul_precision(before)


def requiring(tensors: Tensors, *names: str) -> Tensors:
    return {name: t.requires_grad_(name in names) for name, t in tensors.items()}


IDS = {"query_ids": torch.zeros(2, 12, dtype=torch.int32), "key_ids": torch.ones(2, 12, dtype=torch.int32)}
BIAS, SLOPES = torch.zeros(2, 4, 12, 12, dtype=torch.float16), torch.ones(2, 4)
EXACT = heads(torch.float32)


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
    exact, fast = (partial(attend, precision=precision) for precision in ("highest", "high"))
    assert without_plan(triton, exact, EXACT) != without_plan(triton, fast, EXACT)
    check_apart(triton, (exact, EXACT), (fast, EXACT))


@pytest.mark.parametrize(
    "options", [{"scale": 0.3}, {"causal": "top_left"}, {"window": (4, 1)}, {"softcap": 2.0}]
)
def test_calls_that_differ_in_a_number(triton: Noted, options: dict[str, Any]) -> None:
    first = {name: {"scale": 0.2, "causal": True, "window": (3, 1), "softcap": 3.0}[name] for name in options}
    check_apart(triton, (partial(attend, **first), heads()), (partial(attend, **options), heads()))


def _wider(tensor: Tensor, every: int, first: int = 0) -> Tensor:
    """The same shape with its last stride `every`, from the `first` element of other memory on."""
    memory = torch.zeros(tensor.numel() * every + first, dtype=tensor.dtype)
    strides = [stride * every for stride in torch.empty(tensor.shape, device="meta").stride()]
    return memory.as_strided(tensor.shape, strides, first).copy_(tensor)


# Memory of any tensor, by what differs from a contiguous one at a multiple of 16 bytes.
CLASSES: dict[str, Callable[[Tensor], Tensor]] = {
    "one element on": lambda t: _wider(t, 1, 1),
    "columns apart": lambda t: _wider(t, 2),
    "dims in another order": lambda t: t.transpose(0, -2).contiguous().transpose(0, -2) if t.dim() > 1 else t,
    "columns outermost": lambda t: t.movedim(-1, 0).contiguous().movedim(0, -1),
    "rows of a longer row": lambda t: torch.cat((t, t[..., :3]), -1)[..., : t.shape[-1]],
    "repeated": lambda t: t[:1].expand_as(t),
}  # fmt: skip


def everything() -> Tensors:
    """A call with every tensor that attention takes."""
    return {
        **heads(), "mask": torch.ones(2, 4, 12, 12, dtype=torch.bool), "bias": BIAS.clone(), **IDS,
        "key_lengths": torch.tensor([3, 4], dtype=torch.int32), "alibi_slopes": SLOPES.clone(),
        "sinks": torch.zeros(4), "dropout_seed": torch.tensor([3]),
    }  # fmt: skip


def packed(tensors: Tensors) -> Any:
    return fastattn.attention_varlen(**tensors, causal=True, return_lse=True)


def packed_tensors() -> Tensors:
    offsets = torch.tensor([0, 5, 12, 24], dtype=torch.int32)
    shapes = {"query": (24, 4, 16), "key": (24, 2, 16), "value": (24, 2, 16)}
    made = {name: torch.zeros(shape, dtype=torch.float16) for name, shape in shapes.items()}
    slopes = {"alibi_slopes": torch.ones(3, 4), "sinks": torch.zeros(4)}
    return {**made, "cu_seqlens_q": offsets, "cu_seqlens_k": offsets.clone(), **slopes}


def decode(tensors: Tensors) -> Any:
    return fastattn.attention_kv_cache(**tensors, return_lse=True, num_splits=2)


def cache_tensors() -> Tensors:
    shapes = {"query": (2, 4, 1, 16), "k_cache": (8, 2, 16, 16), "v_cache": (8, 2, 16, 16), "key": (2, 2, 1, 16),
              "value": (2, 2, 1, 16)}  # fmt: skip
    made = {name: torch.zeros(shape, dtype=torch.float16) for name, shape in shapes.items()}
    table = torch.arange(8, dtype=torch.int32).view(2, 4)
    rotary = {name: torch.ones(64, 8, dtype=torch.float16) for name in ("rotary_cos", "rotary_sin")}
    lengths = torch.tensor([17, 40], dtype=torch.int32)
    return {
        **made,
        "cache_lengths": lengths,
        "block_table": table,
        **rotary,
        "alibi_slopes": torch.ones(2, 4),
    }


def rows(tensors: Tensors) -> Any:
    return fastattn.softmax(**tensors, dim=1)


def loss(tensors: Tensors, reduction: str = "mean") -> Any:
    return fastattn.cross_entropy(**tensors, reduction=reduction, label_smoothing=0.1)


def loss_tensors() -> Tensors:
    return {
        "logits": torch.zeros(12, 32, dtype=torch.float16), "target": torch.zeros(12, dtype=torch.int64),
        "class_weight": torch.ones(32),
    }  # fmt: skip


OPS: dict[str, tuple[Call, Callable[[], Tensors], tuple[str, ...]]] = {
    "attention": (partial(attend, dropout_p=0.5), everything, GradsNeeded._fields),
    "varlen": (packed, packed_tensors, ("query", "key", "value", "alibi_slopes", "sinks")),
    "kv_cache": (decode, cache_tensors, ()),
    "softmax": (rows, lambda: {"x": torch.zeros(3, 32, 5), "mask": torch.ones(3, 32, 5, dtype=torch.bool)}, ("x",)),
    "cross_entropy": (loss, loss_tensors, ("logits",)),
    "cross_entropy, none": (partial(loss, reduction="none"), loss_tensors, ("logits",)),
}  # fmt: skip
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
        return _wider(t.detach(), 1, 1) if t.dim() and t.numel() else t

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


def test_specs_of_rows_have_no_more_fields_than_these() -> None:
    """What the layouts above tell apart: a new field needs a change of its own."""
    assert {field.name for field in fields(SoftmaxSpec)} == {
        "device", "arch", "dtype", "columns", "unit_columns", "wide_rows", "mask", "causal", "log", "backward",
        "aligned",
    }  # fmt: skip


ROW_CHANGES: dict[str, tuple[Tensors, dict[str, Any]]] = {
    "dtype": ({"x": torch.zeros(3, 32, dtype=torch.bfloat16)}, {}),
    "columns": ({"x": torch.zeros(3, 40)}, {}),
    "unit_columns": ({"x": torch.zeros(32, 3).mT}, {}),
    "mask": ({"x": torch.zeros(3, 32), "mask": torch.ones(3, 32, dtype=torch.bool)}, {}),
    "causal": ({"x": torch.zeros(3, 32)}, {"causal": True}),
    "log": ({"x": torch.zeros(3, 32)}, {"log": True}),
    "backward": ({"x": torch.zeros(3, 32, requires_grad=True)}, {}),
    "aligned": ({"x": torch.zeros(97)[1:].view(3, 32)}, {}),
    "number of rows": ({"x": torch.zeros(4, 32)}, {}),
    "scale": ({"x": torch.zeros(3, 32)}, {"scale": 2.0}),
}


@pytest.mark.parametrize("field", ROW_CHANGES)
def test_rows_that_differ_in_a_field_of_the_spec(triton: Noted, field: str) -> None:
    tensors, options = ROW_CHANGES[field]

    def soft(given: Tensors, **more: Any) -> Any:
        return fastattn.softmax(**given, **more)

    check_apart(triton, (soft, {"x": torch.zeros(3, 32)}), (partial(soft, **options), tensors))


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextlib.contextmanager
def variable(name: str, text: str) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(name, text)
        yield


@contextlib.contextmanager
def other_tiles() -> Iterator[None]:
    """Tiles that were measured meanwhile, as `fastattn bench tune` stores them before it forgets look-ups and plans."""
    from fastattn.kernels import tuned
    from fastattn.kernels.tiles import table_tiles
    from fastattn.tune.command import forget_lookups

    def measured(spec: AttentionSpec, packed: bool = False) -> dict[str, Any]:
        table = table_tiles(spec)
        return {name: replace(getattr(table, name), num_warps=2) for name in ("forward", "dkdv", "dq")}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuned, "winners_for", measured)
        forget_lookups()
        yield
    forget_lookups()


STATES: dict[str, Callable[[], Any]] = {
    "no grad": torch.no_grad,
    "inference": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "deterministic": deterministic,
    "another backend": lambda: variable("FASTATTN_BACKEND", "torch"),
    "a disabled part": lambda: variable("FASTATTN_DISABLE", "cuda.attention_fwd"),
    "a part disabled that is used": lambda: variable(
        "FASTATTN_DISABLE", "triton.attention_bwd,triton.softmax_bwd"
    ),
    "measured tiles": other_tiles,
}


# By op, the states in which something else is launched, or nothing.
CHANGING = {
    "attention": {"autocast", "a part disabled that is used", "measured tiles"},
    "varlen": {"autocast", "measured tiles"},
    "softmax": {"a part disabled that is used"},
    "cross_entropy": set(),
}
ALWAYS = {"no grad", "inference", "another backend"}


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")
@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("op", CHANGING)
def test_a_replay_of_one_state_is_not_that_of_another(triton: Noted, op: str, state: str) -> None:
    """In and after the state, whichever came first, what is launched is that of calls without plans."""
    call, make, leaves = OPS[op]
    tensors = requiring(make(), *leaves)

    def run(inside: bool) -> Any:
        with STATES[state]() if inside else contextlib.nullcontext():
            return launched(triton, call, tensors)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "wanted", lambda key: False)
        expected = {inside: run(inside) for inside in (False, True)}
    assert (expected[False] != expected[True]) == (state in CHANGING[op] | ALWAYS)
    for order in ((False, True), (True, False)):
        plan.clear()
        for inside in (*order, *order):
            for _ in range(3):
                assert run(inside) == expected[inside]
