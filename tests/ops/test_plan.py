"""Plans change no bit and no refusal, and none made in one state of torch or the environment runs in another."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import fastattn
from fastattn import backends, torch_compat
from fastattn.backends import switches
from fastattn.integrations.export import plain_torch
from fastattn.ops import plan

Call = Callable[..., Any]
OFF = "plan"
DTYPES = (torch.float32, torch.bfloat16, torch.float64)


@pytest.fixture
def hits(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each look for a plan found one."""
    seen: list[bool] = []
    look_up = plan.look_up

    def noting(*args: Any) -> Any:
        key, found = look_up(*args)
        seen.append(found is not None)
        return key, found

    monkeypatch.setattr(plan, "look_up", noting)
    return seen


def normal(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, dtype=torch.float32).to(dtype)


def heads(
    dtype: torch.dtype, seqlen_q: int = 12, seqlen_k: int = 12, kv: int = 2, dim: int = 8
) -> list[Tensor]:
    return [
        normal(2, 4, seqlen_q, dim, dtype=dtype),
        *(normal(2, kv, seqlen_k, dim, dtype=dtype) for _ in range(2)),
    ]


def in_order(tensors: list[Tensor]) -> list[Tensor]:
    """The same numbers as views of (B, S, H, D) memory."""
    return [t.transpose(1, 2).contiguous().transpose(1, 2) for t in tensors]


IDS = torch.tensor([[0] * 5 + [1] * 6 + [-1], [0] * 12])
MASK = torch.ones(12, 12, dtype=torch.bool).tril().index_fill(1, torch.tensor([3]), False)
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True},
    "top left": {"causal": "top_left"},
    "window": {"causal": True, "window": (3, 0)},
    "two-sided window": {"window": (3, 2)},
    "scale": {"scale": 0.3},
    "negative scale": {"scale": -0.3},
    "softcap": {"softcap": 5.0},
    "lse": {"return_lse": True, "causal": True},
    "mask": {"mask": MASK},
    "mask of a batch": {"mask": MASK.expand(2, 1, 12, 12)},
    "bias": {"bias": torch.randn(4, 12, 12)},
    "segments": {"segment_ids": IDS},
    "a pair of segments": {"segment_ids": (IDS, IDS.int())},
    "lengths": {"key_lengths": torch.tensor([7, 12])},
    "int32 lengths": {"key_lengths": torch.tensor([7, 0], dtype=torch.int32)},
    "slopes": {"alibi_slopes": torch.tensor([0.5, 0.25, 0.1, 0.05]), "causal": True},
    "slopes of a batch": {"alibi_slopes": torch.rand(2, 4).double()},
    "sinks": {"sinks": torch.randn(4)},
    "dropout": {"dropout_p": 0.25, "dropout_seed": 7},
    "dropout by a tensor": {"dropout_p": 0.25, "dropout_seed": torch.tensor(7)},
    "a drawn seed": {"dropout_p": 0.5},
    "a named backend": {"backend": "torch"},
}  # fmt: skip
EDGES = torch.tensor([0, 5, 5, 24], dtype=torch.int32)
PACKED = (
    "plain",
    "causal",
    "top left",
    "window",
    "scale",
    "softcap",
    "lse",
    "sinks",
    "dropout",
    "a drawn seed",
)


def packed(tensors: list[Tensor], **options: Any) -> Any:
    query, key, value = (t.transpose(1, 2).flatten(0, 1) for t in tensors)
    return fastattn.attention_varlen(query, key, value, EDGES, EDGES, **options)


def cached(tensors: list[Tensor], **options: Any) -> Any:
    query, keys, values = tensors
    caches = [torch.cat((t, torch.zeros_like(t)), 2).detach() for t in (keys, values)]
    new = {"key": keys[:, :, :2].detach(), "value": values[:, :, :2].detach()}
    lengths = torch.tensor([4, options.pop("second", 4)], dtype=torch.int32)
    with torch.no_grad():
        result = fastattn.attention_kv_cache(query[:, :, :2], *caches, lengths, **new, **options)
    return (*(result if isinstance(result, tuple) else (result,)), *caches)


def attended(tensors: list[Tensor], **options: Any) -> Any:
    return fastattn.attention(*tensors, **options)


def rows(tensors: list[Tensor], **options: Any) -> Any:
    return fastattn.softmax(tensors[0], **options)


ROWS: dict[str, dict[str, Any]] = {
    "plain": {}, "log": {"log": True}, "scale": {"scale": 2.0}, "causal": {"causal": True}, "dim": {"dim": 1},
    "mask": {"mask": torch.arange(8) < 5},
}  # fmt: skip
CACHED: dict[str, dict[str, Any]] = {
    "plain": {}, "lengths": {"second": 9}, "window": {"window": (3, 0)}, "splits": {"num_splits": 2},
    "slopes": {"alibi_slopes": torch.rand(4)}, "sinks": {"sinks": torch.randn(4)}, "lse": {"return_lse": True},
    "rotary": {"rotary_cos": torch.rand(32, 4), "rotary_sin": torch.rand(32, 4), "rotary_interleaved": True},
}  # fmt: skip
TARGET = torch.arange(24) % 8


def loss(tensors: list[Tensor], **options: Any) -> Any:
    return fastattn.cross_entropy(tensors[0].flatten(0, 1).flatten(0, 1)[:24], TARGET, **options)


def linear_loss(tensors: list[Tensor], **options: Any) -> Any:
    hidden, weight = (t.flatten(0, 1).flatten(0, 1) for t in tensors[:2])
    return fastattn.linear_cross_entropy(hidden[:24], weight[:16], TARGET, **options)


LOSSES: dict[str, dict[str, Any]] = {
    "mean": {}, "none": {"reduction": "none"}, "sum": {"reduction": "sum"}, "ignored": {"ignore_index": 3},
    "smoothed": {"label_smoothing": 0.1}, "z": {"z_loss": 0.01},
}  # fmt: skip
WEIGHTED = {"class_weight": torch.linspace(0.5, 2, 8)}
CASES: dict[str, tuple[Call, dict[str, Any]]] = {
    **{f"attention, {name}": (attended, options) for name, options in OPTIONS.items()},
    **{f"varlen, {name}": (packed, OPTIONS[name]) for name in PACKED},
    "varlen, bounds": (packed, {"max_seqlen_q": 19, "max_seqlen_k": 24}),
    "varlen, slopes": (packed, {"alibi_slopes": torch.rand(3, 4)}),
    **{f"kv_cache, {name}": (cached, options) for name, options in CACHED.items()},
    **{f"softmax, {name}": (rows, options) for name, options in ROWS.items()},
    **{f"cross_entropy, {name}": (loss, options) for name, options in LOSSES.items()},
    "cross_entropy, weighted": (loss, WEIGHTED),
    **{f"linear_cross_entropy, {name}": (linear_loss, options) for name, options in LOSSES.items()},
    "linear_cross_entropy, softcap": (linear_loss, {"softcap": 5.0}),
}
SHAPES: dict[str, dict[str, int]] = {
    "few keys": {},
    "many keys": {"seqlen_q": 40, "seqlen_k": 40, "kv": 4, "dim": 16},
}


def with_grads(call: Call, tensors: list[Tensor], options: dict[str, Any]) -> list[Tensor]:
    """Results of a call, and their gradients to all that may have one."""
    options = dict(options)
    leaves = [t for t in tensors if t.requires_grad]
    for name in ("bias", "alibi_slopes", "sinks"):
        if leaves and call is not cached and name in options:
            options[name] = options[name].detach().clone().requires_grad_()
            leaves.append(options[name])
    torch.manual_seed(3)
    result = call(tensors, **options)
    results = list(result) if isinstance(result, tuple) else [result]
    if not results[0].requires_grad:
        return results
    sums = [
        (r.double() * torch.linspace(-1, 1, r.numel()).double().view(r.shape)).nan_to_num(0, 0, 0).sum()
        for r in results
    ]
    grads = torch.autograd.grad(sum(sums), leaves, allow_unused=True)
    return [*results, *(g for g in grads if g is not None)]


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected):
        assert (one.dtype, one.shape, one.stride()) == (other.dtype, other.shape, other.stride())
        assert one.requires_grad == other.requires_grad
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_bits_through_a_plan_are_those_without(
    name: str, dtype: torch.dtype, grad: bool, hits: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    call, options = CASES[name]
    torch.manual_seed(0)
    for made in (heads(dtype), in_order(heads(dtype))):
        tensors = [t.requires_grad_(grad and call is not cached) for t in made]
        plan.clear()  # packed, both are the same
        monkeypatch.setenv("FASTATTN_DISABLE", OFF)
        hits.clear()
        expected = with_grads(call, tensors, options)
        assert not any(hits)
        monkeypatch.delenv("FASTATTN_DISABLE")
        for number in range(4):
            hits.clear()
            assert_same(with_grads(call, tensors, options), expected)
            assert hits == [number >= 2]


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", ["plain", "causal", "top left", "lse", "negative scale"])
@pytest.mark.parametrize(
    "shape", [(40, 40, 4), (40, 40, 2), (1, 40, 4), (7, 40, 4), (40, 7, 4), (1, 1, 4), (0, 5, 2), (5, 0, 2)]
)
def test_bits_of_other_lengths(
    shape: tuple[int, int, int], name: str, grad: bool, hits: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = [t.requires_grad_(grad) for t in heads(torch.float32, *shape, dim=16)]
    monkeypatch.setenv("FASTATTN_DISABLE", OFF)
    expected = with_grads(attended, tensors, OPTIONS[name])
    monkeypatch.delenv("FASTATTN_DISABLE")
    for _ in range(3):
        assert_same(with_grads(attended, tensors, OPTIONS[name]), expected)
    assert hits[-1]


@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf])
def test_numbers_that_are_not_finite_are_as_without(number: float, monkeypatch: pytest.MonkeyPatch) -> None:
    for seqlen in (12, 40):
        for _ in range(3):
            fastattn.attention(*heads(torch.float32, seqlen, seqlen, 4, 16), causal=True)
        tensors = heads(torch.float32, seqlen, seqlen, 4, 16)
        for tensor, place in zip(tensors, (3, 5, 7)):
            tensor[0, 1, place, 2] = number
        tensors = [t.requires_grad_() for t in tensors]
        results = []
        for off in (True, False, False, False):
            monkeypatch.setenv("FASTATTN_DISABLE", OFF) if off else monkeypatch.delenv(
                "FASTATTN_DISABLE", False
            )
            results.append(with_grads(attended, tensors, {"causal": True}))
        for found in results[1:]:
            assert_same(found, results[0])


class Sees(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class SeesFunctions(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextlib.contextmanager
def precision() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextlib.contextmanager
def variable(name: str, text: str) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(name, text)
        yield


STATES: dict[str, Callable[[], Any]] = {
    "no grad": torch.no_grad,
    "inference": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "deterministic": deterministic,
    "precision": precision,
    "dispatch mode": Sees,
    "function mode": SeesFunctions,
    "profiler": torch.autograd.profiler.profile,
    "plain torch": plain_torch,
    "forward AD": forward_ad.dual_level,
    "forced backend": lambda: variable("FASTATTN_BACKEND", "torch"),
    "a disabled part": lambda: variable("FASTATTN_DISABLE", "cuda.attention_fwd"),
    "anomaly": torch.autograd.detect_anomaly,
}
BY_OP: dict[str, tuple[Call, dict[str, Any]]] = {
    "attention": (attended, {"causal": True}),
    "attention, sinks": (attended, OPTIONS["sinks"]),
    "varlen": (packed, {}),
    "kv_cache": (cached, {}),
    "softmax": (rows, {}),
    "cross_entropy": (loss, {}),
    "linear_cross_entropy": (linear_loss, {}),
}


@pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::UserWarning")
@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("op", BY_OP)
def test_a_plan_of_one_state_is_not_that_of_another(
    op: str, state: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In and after the state, whichever came first, results are those of calls without plans."""
    call, options = BY_OP[op]
    if (op, state) == ("kv_cache", "forward AD"):
        options = {}
    tensors = [t.requires_grad_(call is not cached) for t in heads(torch.float32)]

    def run(inside: bool) -> list[Tensor]:
        with STATES[state]() if inside else contextlib.nullcontext():
            return with_grads(call, tensors, options)

    monkeypatch.setattr(plan, "wanted", lambda key: False)
    expected = {inside: run(inside) for inside in (False, True)}
    monkeypatch.undo()
    for order in ((False, True), (True, False)):
        plan.clear()
        for inside in (*order, *order):
            for _ in range(3):
                assert_same(run(inside), expected[inside])
                assert [t.is_inference() for t in run(inside)] == [t.is_inference() for t in expected[inside]]


def test_a_backend_that_is_forced_or_switched_off_later_is_refused_though_a_plan_exists(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tensors = heads(torch.float64)
    for _ in range(3):
        fastattn.attention(*tensors)
    assert plan.count() == 1
    monkeypatch.setenv("FASTATTN_DISABLE", "torch")
    with pytest.raises(RuntimeError, match="no backend can run this call"):
        fastattn.attention(*tensors)
    monkeypatch.delenv("FASTATTN_DISABLE")
    monkeypatch.setenv("FASTATTN_BACKEND", "triton")
    with (
        pytest.warns(RuntimeWarning, match="FASTATTN_BACKEND=triton forces"),
        pytest.raises(RuntimeError, match="backend='triton' cannot run this call"),
    ):
        fastattn.attention(*tensors)
    monkeypatch.delenv("FASTATTN_BACKEND")
    fastattn.attention(*tensors)


def test_a_backward_refused_since_the_forward_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = [t.requires_grad_() for t in heads(torch.float32)]
    outs = [fastattn.attention(*tensors) for _ in range(3)]
    monkeypatch.setenv("FASTATTN_DISABLE", "torch.attention_bwd,triton,cuda")
    with pytest.raises(RuntimeError, match="no backend can run this call"):
        outs[-1].sum().backward()


class Subclass(Tensor):
    pass


def test_changed_tensors_get_plans_of_their_own(hits: list[bool]) -> None:
    """Strides, offsets, dtypes, subclasses, negative views and gradients are all told apart."""
    tensors = heads(torch.float32)
    for _ in range(3):
        fastattn.attention(*tensors, causal=True)
    assert hits == [False, False, True]
    wide = [torch.zeros(*t.shape[:3], 16) for t in tensors]
    for whole, t in zip(wide, tensors):
        whole[..., ::2] = t
    odd = [whole[..., ::2] for whole in wide]
    negated = torch.complex(torch.zeros_like(tensors[0]), -tensors[0]).conj().imag
    assert negated.is_neg()
    expected = fastattn.attention(*tensors, causal=True)
    for changed in (
        odd, in_order(tensors), [t.as_subclass(Subclass) for t in tensors], [negated, *tensors[1:]],
        [tensors[0].mT.contiguous().mT, *tensors[1:]], [torch.nn.Parameter(t) for t in tensors],
    ):  # fmt: skip
        hits.clear()
        out = fastattn.attention(*changed, causal=True)
        assert not any(hits)
        torch.testing.assert_close(out.detach().as_subclass(Tensor), expected)
        assert out.requires_grad == changed[0].requires_grad


BAD: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"causal": True}, {"causal": 1}),
    ({"causal": False}, {"causal": 0}),
    ({"scale": 1.0}, {"scale": True}),
    ({"scale": 1}, {"scale": True}),
    ({"softcap": 1.0}, {"softcap": True}),
    ({"window": (1, 0)}, {"window": (True, False)}),
    ({"window": (1, 0)}, {"window": (1.0, 0.0)}),
    ({}, {"dropout_p": False}),
    ({}, {"dropout_p": torch.zeros(2)}),
    ({}, {"dropout_seed": "seven"}),
    ({"dropout_seed": 7}, {"dropout_seed": 7.0}),
    ({"dropout_p": 0.5, "dropout_seed": 7}, {"dropout_p": 0.5, "dropout_seed": 2**64}),
    ({}, {"backend": "fastest"}),
    ({}, {"return_weights": "max"}),
    ({}, {"nonsense": 1}),
    ({"mask": MASK}, {"mask": MASK.float()}),
    ({"mask": MASK}, {"mask": MASK[:5]}),
    ({"bias": MASK.float()}, {"bias": MASK}),
    ({"key_lengths": torch.tensor([3, 4])}, {"key_lengths": torch.tensor([3, 13])}),
    ({"key_lengths": torch.tensor([3, 4])}, {"key_lengths": torch.tensor([3, 2**40])}),
    ({"segment_ids": IDS}, {"segment_ids": IDS + 2**40}),
    ({"segment_ids": IDS}, {"segment_ids": (IDS, IDS, IDS)}),
    ({"sinks": torch.zeros(4)}, {"sinks": torch.zeros(4, dtype=torch.int64)}),
    ({"alibi_slopes": torch.zeros(4)}, {"alibi_slopes": torch.zeros(3)}),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(BAD)))
def test_what_is_refused_stays_refused_beside_a_plan(number: int) -> None:
    good, bad = BAD[number]
    tensors = heads(torch.float32)
    refused = []
    for _ in range(2):
        with pytest.raises((TypeError, ValueError)) as error:
            fastattn.attention(*tensors, **bad)
        refused.append(str(error.value))
        for _ in range(3):
            fastattn.attention(*tensors, **good)
        assert plan.count() == 1
    assert refused[0] == refused[1]


def test_values_and_memory_are_looked_at_in_every_call() -> None:
    query, keys, values = heads(torch.float32)
    new = {"key": keys[:, :, :1].clone(), "value": values[:, :, :1].clone()}
    lengths = torch.tensor([3, 4], dtype=torch.int32)

    def decode(k_cache: Tensor, v_cache: Tensor, lengths: Tensor, **changes: Any) -> Any:
        return fastattn.attention_kv_cache(query, k_cache, v_cache, lengths, **{**new, **changes})

    for _ in range(3):
        decode(keys, values, lengths)
    assert plan.count() == 1
    before = keys.clone()
    for wrong in ([3, 12], [-1, 4]):
        with pytest.raises(ValueError, match="cache_lengths"):
            decode(keys, values, torch.tensor(wrong, dtype=torch.int32))
    with pytest.raises(ValueError, match="v_cache: got memory of k_cache"):
        decode(keys, keys, lengths)
    whole = torch.zeros(keys.numel() + 8)
    with pytest.raises(ValueError, match="v_cache: got memory of k_cache"):
        decode(whole[: keys.numel()].view(keys.shape), whole[8:].view(keys.shape), lengths)
    with pytest.raises(ValueError, match="key: got memory of v_cache"):
        decode(keys, values, lengths, key=values.flatten()[: new["key"].numel()].view(new["key"].shape))
    assert torch.equal(keys, before)
    with torch.enable_grad(), pytest.raises(RuntimeError, match="query: requires grad"):
        fastattn.attention_kv_cache(query.clone().requires_grad_(), keys, values, lengths, **new)
    tokens = [t.transpose(1, 2).flatten(0, 1) for t in (query, keys, values)]
    for _ in range(3):
        fastattn.attention_varlen(*tokens, EDGES, EDGES, 19, 19)
    for wrong, bound, name in (
        ([1, 5, 5, 24], 19, "cu_seqlens_q"),
        ([0, 5, 4, 24], 20, "cu_seqlens_q"),
        ([0, 5, 5, 25], 20, "cu_seqlens_q"),
        ([0, 2, 4, 24], 19, "max_seqlen_q"),
    ):
        with pytest.raises(ValueError, match=name):
            fastattn.attention_varlen(*tokens, torch.tensor(wrong, dtype=torch.int32), EDGES, bound, 19)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("op", [op for op in BY_OP if op != "kv_cache"])
def test_second_derivatives_and_transforms_are_those_without(
    op: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    call, options = BY_OP[op]
    tensors = [t.requires_grad_() for t in heads(torch.float64)]

    def second() -> list[Tensor]:
        first = torch.autograd.grad(
            call(tensors, **options).cos().sum(), tensors, create_graph=True, allow_unused=True
        )
        used = [g for g in first if g is not None]
        found = torch.autograd.grad(sum(g.square().sum() for g in used), tensors, allow_unused=True)
        batched = torch.autograd.grad(
            call(tensors, **options),
            tensors[0],
            torch.ones(3, *call(tensors, **options).shape).double(),
            is_grads_batched=True,
        )
        return [*used, *(g for g in found if g is not None), *batched]

    monkeypatch.setenv("FASTATTN_DISABLE", OFF)
    expected = second()
    monkeypatch.delenv("FASTATTN_DISABLE")
    for _ in range(3):
        assert_same(second(), expected)


def test_checkpoints_and_saved_tensor_hooks_see_the_same_tensors() -> None:
    """The first call of a kind and one through its plan save the same, whichever is the recomputation."""
    tensors = [t.requires_grad_() for t in heads(torch.float32)]
    grads = []
    for _ in range(4):
        out = checkpoint(lambda *t: fastattn.attention(*t, causal=True).sin(), *tensors, use_reentrant=False)
        grads.append(torch.autograd.grad(out.sum(), tensors))
    plan.clear()
    saved = []
    for _ in range(3):
        seen: list[tuple[int, ...]] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, seen=seen: seen.append(tuple(t.shape)) or t, lambda t: t
        ):
            fastattn.attention(*tensors, causal=True, sinks=torch.zeros(4))
        saved.append(seen)
    assert saved[0] == saved[1] == saved[2]
    for found in grads[1:]:
        assert all(torch.equal(one, other) for one, other in zip(found, grads[0]))


def test_a_tensor_changed_in_place_before_the_backward_is_told() -> None:
    tensors = [t.requires_grad_() for t in heads(torch.float32)]
    for _ in range(3):
        out = fastattn.attention(*(t * 1 for t in tensors[:2]), scaled := tensors[2] * 1)
    scaled.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_the_table_is_bounded_and_can_be_shared_by_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "MOST", 8)
    expected = {n: fastattn.attention(*(torch.ones(1, 1, n, 8) for _ in range(3))) for n in range(1, 30)}
    failures: list[BaseException] = []

    def work() -> None:
        try:
            for n in [*range(1, 30)] * 3:
                for _ in range(3):
                    out = fastattn.attention(*(torch.ones(1, 1, n, 8) for _ in range(3)))
                    assert torch.equal(out, expected[n])
                    assert plan.count() <= 8
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_shapes_that_never_come_again_leave_no_plan() -> None:
    for n in range(1, 20):
        fastattn.attention(*(torch.ones(1, 1, n, 8) for _ in range(3)))
    assert plan.count() == 0


@pytest.mark.parametrize("name", [n for n in CASES if n.startswith("attention")])
def test_explain_says_what_the_plan_does(name: str) -> None:
    options = dict(CASES[name][1])
    tensors = [t.requires_grad_() for t in heads(torch.float32)]
    for _ in range(3):
        fastattn.attention(*tensors, **options)
    (made,) = plan._plans.values()
    planned = made.__self__
    said = fastattn.explain(*tensors, **{k: v for k, v in options.items() if k != "return_lse"})
    assert (said.backend, said.backward) == (planned.chosen.NAME, planned.backward.NAME)
    assert planned.spec == said.spec


def functions_until(launch: Callable[[Any, Any], bool], call: Callable[[], Any]) -> list[str]:
    """Python functions that a call enters up to the launch, which frames or built-in functions tell, in order."""
    for _ in range(3):
        call()
    entered: list[str] = []
    launched = False

    def watch(frame: Any, event: str, arg: Any) -> None:
        nonlocal launched
        if launched or event not in ("call", "c_call"):
            return
        launched = launch(frame, arg) if event == "c_call" else launch(frame, None)
        if event == "call":
            entered.append(frame.f_code.co_name)

    sys.setprofile(watch)
    try:
        call()
    finally:
        sys.setprofile(None)
    assert launched
    return entered[1:]  # but the lambda


FEWEST = 14  # docs/architecture.md lists them


@pytest.mark.parametrize("grad", [False, True])
def test_few_python_functions_lie_between_the_call_and_the_launch(grad: bool) -> None:
    tensors = [t.requires_grad_(grad) for t in heads(torch.float32, kv=4)]
    flash = "_scaled_dot_product_flash_attention_for_cpu"
    entered = functions_until(
        lambda frame, arg: getattr(arg, "__name__", "") == flash,
        lambda: fastattn.attention(*tensors, causal=True),
    )
    assert entered[0] == "attention"
    assert len(entered) <= FEWEST, entered


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
@pytest.mark.parametrize("grad", [False, True])
def test_few_python_functions_lie_before_a_triton_launch(grad: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastattn.kernels.arguments import Launch

    def run(launch: Any) -> None:
        pass

    monkeypatch.setattr(Launch, "run", run)
    tensors = [t.requires_grad_(grad) for t in heads(torch.float32, kv=4)]
    entered = functions_until(
        lambda frame, arg: frame.f_code is run.__code__,
        lambda: fastattn.attention(*tensors, causal=True, backend="triton"),
    )
    own = [
        name for name in entered if name not in ("_replace", "_make", "<lambda>")
    ]  # a namedtuple's, and our stub
    assert len(own) <= FEWEST, entered


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
@pytest.mark.parametrize("name", ["plain", "causal", "lse", "window", "softcap", "mask", "sinks"])
def test_triton_launches_the_same_with_a_plan(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastattn.kernels.arguments import Launch

    launches: list[Any] = []
    monkeypatch.setattr(Launch, "run", lambda launch: launches.append(launch))

    def described(launch: Any) -> Any:
        flat = [x for arg in launch.args for x in (arg if isinstance(arg, tuple) else (arg,))]
        args = [(a.shape, a.stride(), a.dtype) if isinstance(a, Tensor) else a for a in flat]
        return launch.kernel, launch.grid, args, launch.options

    for tensors in (heads(torch.float16), in_order(heads(torch.bfloat16)), heads(torch.float32, 1, 12)):
        plan.clear()
        options = {**OPTIONS[name], "backend": "triton"}
        if tensors[0].shape[2] == 1:
            options.pop("mask", None)
        found = []
        for _ in range(4):
            launches.clear()
            fastattn.attention(*tensors, **options)
            found.append([described(launch) for launch in launches])
        assert plan.count() == 1
        assert found[0] == found[1] == found[2] == found[3]
        assert found[0]


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
def test_triton_plans_know_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one shape with one set of strides, aligned or one element later; and gradients may come from anywhere."""
    from fastattn.kernels.arguments import Launch
    from fastattn.kernels.variants import AttentionVariant

    launches: list[Any] = []
    monkeypatch.setattr(Launch, "run", lambda launch: launches.append(launch))

    def units() -> set[int]:
        found = {arg.unit for launch in launches for arg in launch.args if isinstance(arg, AttentionVariant)}
        launches.clear()
        return found

    def moved(t: Tensor) -> Tensor:
        return torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape)

    aligned = [t.requires_grad_() for t in heads(torch.float16)]
    later = [moved(t.detach()).requires_grad_() for t in aligned]
    for _ in range(4):
        for tensors, unit in ((aligned, 8), (later, 1), ([aligned[0], later[1], aligned[2]], 1)):
            out = fastattn.attention(*tensors, backend="triton")
            assert units() == {unit}
            for dout in (torch.ones_like(out), moved(torch.ones_like(out))):
                torch.autograd.grad(out, tensors, dout, retain_graph=True)
                assert units() == {unit if dout.data_ptr() % 16 == 0 else 1}
    assert plan.count() == 3


def test_the_environment_is_read_anew_in_every_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert switches.environment() is switches.UNSET
    assert backends.runs_every_pass("auto")
    for name in ("FASTATTN_BACKEND", "FASTATTN_DISABLE", "TRITON_INTERPRET"):
        monkeypatch.setenv(name, "torch")
        told = switches.environment()
        assert told != switches.UNSET
        assert backends.runs_every_pass("auto") == (name == "TRITON_INTERPRET")
        monkeypatch.setenv(name, "cuda")
        assert switches.environment() not in (told, switches.UNSET)
        monkeypatch.delenv(name)
        assert switches.environment() is switches.UNSET


def test_where_the_state_cannot_be_told_there_is_no_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_compat, "_CAN_TELL_STATE", False)
    tensors = heads(torch.float32)
    for _ in range(3):
        fastattn.attention(*tensors)
    assert plan.count() == 0
