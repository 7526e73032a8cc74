"""Ops bypass torch's dispatcher only where nothing records the difference: modes, traces and hooks see every call."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import fastattn
from fastattn import torch_compat
from fastattn.integrations.export import plain_torch

OP = "fastattn.attention_fwd"
TARGET = torch.arange(40) % 7


def qkv(grad: bool = False) -> list[Tensor]:
    return [torch.randn(2, 4, 5, 8, requires_grad=grad) for _ in range(3)]


CALLS: dict[str, tuple[str, Callable[[Tensor, Tensor, Tensor], Any]]] = {
    "attention": ("attention_fwd", lambda q, k, v: fastattn.attention(q, k, v, causal=True)),
    "weights": ("attention_weights", lambda q, k, v: fastattn.attention(q, k, v, return_weights=True)),
    "varlen": (
        "varlen_fwd",
        lambda q, k, v: fastattn.attention_varlen(
            *(t.flatten(0, 1) for t in (q, k, v)), *(torch.tensor([0, 3, 8], dtype=torch.int32),) * 2
        ),
    ),
    "kv_cache": (
        "kv_cache_fwd",
        lambda q, k, v: fastattn.attention_kv_cache(q, k, v, torch.tensor([5, 3], dtype=torch.int32)),
    ),
    "softmax": ("softmax_fwd", lambda q, k, v: fastattn.softmax(q, causal=True)),
    "cross_entropy": (
        "cross_entropy_fwd",
        lambda q, k, v: fastattn.cross_entropy(q.flatten(0, 2), TARGET, reduction="none"),
    ),
    "cross_entropy, mean": (
        "cross_entropy_",  # _fwd, or _mean where a gradient is wanted
        lambda q, k, v: fastattn.cross_entropy(q.flatten(0, 2), TARGET),
    ),
    "linear_cross_entropy": (
        "linear_cross_entropy_",  # _fwd, or _sum where gradients are wanted
        lambda q, k, v: fastattn.linear_cross_entropy(q.flatten(0, 2), k.flatten(0, 2), TARGET),
    ),
    "linear_cross_entropy, losses": (
        "linear_cross_entropy_fwd",
        lambda q, k, v: fastattn.linear_cross_entropy(
            q.flatten(0, 2), k.flatten(0, 2), TARGET, bias=v.flatten()[:40], reduction="none"
        ),
    ),
}
NO_GRADIENT = {"kv_cache"}


class Sees(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


class SeesFunctions(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def direct(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """Whether each call of an op went past the dispatcher."""
    seen: list[bool] = []

    can_bypass = torch_compat.can_bypass_dispatcher

    def noting(args: Any) -> bool:
        seen.append(can_bypass(args))
        return seen[-1]

    monkeypatch.setattr("fastattn.torch_compat.can_bypass_dispatcher", noting)
    return seen


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_a_call_that_nothing_records_is_the_op_without_the_dispatcher(
    direct: list[bool], mode: Callable[[], Any], name: str
) -> None:
    _, call = CALLS[name]
    with mode():
        operands = qkv()
        result = call(*operands)
        assert direct
        assert all(direct)
        with Sees() as mode_that_sees:
            dispatched = call(*operands)
    assert any(CALLS[name][0] in op for op in mode_that_sees.seen)
    results, expected = ((r if isinstance(r, tuple) else (r,)) for r in (result, dispatched))
    for one, other in zip(results, expected):
        assert torch.equal(one, other)
        assert one.stride() == other.stride()
        assert one.requires_grad == other.requires_grad
        assert one.is_inference() == other.is_inference()


@pytest.mark.parametrize("name", [name for name in CALLS if name not in NO_GRADIENT])
def test_gradients_are_those_of_the_registered_op(direct: list[bool], name: str) -> None:
    _, call = CALLS[name]
    operands, grads = qkv(grad=True), []
    for watcher in (contextlib.nullcontext(), Sees()):
        with watcher:
            result = call(*operands)
            out = result[-1] if isinstance(result, tuple) else result
        first = torch.autograd.grad(out.cos().sum(), operands, create_graph=True, allow_unused=True)
        used = [g for g in first if g is not None]
        second = torch.autograd.grad(sum(g.square().sum() for g in used), operands, allow_unused=True)
        grads.append([out, *first, *second])
    assert len(grads[0]) == len(grads[1])
    assert direct.count(False)
    assert direct.count(True) > direct.count(False)
    for one, other in zip(*grads):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_every_registered_op_has_a_row() -> None:
    registered = {
        name.removeprefix("fastattn::")
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("fastattn::")
    }
    forwards = {name for name in registered if not name.endswith("_bwd")}
    assert all(any(name.startswith(op) for op, _ in CALLS.values()) for name in forwards)


def test_saved_tensor_hooks_see_inputs_and_results() -> None:
    q, k, v = qkv(grad=True)
    kept: list[list[tuple[int, ...]]] = []
    for watcher in (contextlib.nullcontext(), Sees()):
        packed: list[tuple[int, ...]] = []
        hooks = torch.autograd.graph.saved_tensors_hooks(
            lambda t, packed=packed: packed.append(tuple(t.shape)) or t, lambda t: t
        )
        with watcher, hooks:
            fastattn.attention(q, k, v).sum().backward()
        kept.append(packed)
    assert kept[0] == kept[1]
    assert len(kept[0]) >= 5  # q, k, v, out, lse


def test_a_freed_graph_says_so() -> None:
    q, k, v = qkv(grad=True)
    out = fastattn.attention(q, k, v).sum()
    out.backward()
    with pytest.raises(RuntimeError, match="second time"):
        out.backward()


def test_an_input_changed_after_the_call_is_noticed() -> None:
    q, k, v = qkv()
    q.requires_grad_()
    out = fastattn.attention(q, k, v)
    k.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("only", ["bias", "alibi_slopes", "sinks"])
def test_a_gradient_of_an_option_alone_is_recorded(only: str) -> None:
    shape = (5, 5) if only == "bias" else (4,)
    option = torch.randn(shape, requires_grad=True)
    out = fastattn.attention(*qkv(), **{only: option})
    (grad,) = torch.autograd.grad(out.square().sum(), option)
    assert grad.abs().sum() > 0


def test_the_flop_counter_counts() -> None:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        fastattn.attention(*qkv())
    assert counter.get_total_flops() == 2 * 2 * 4 * 5 * 5 * 16


def test_modes_and_the_profiler_see_the_op() -> None:
    operands = qkv()
    with SeesFunctions() as functions:
        fastattn.attention(*operands)
    assert any(OP in name for name in functions.seen)
    with torch.profiler.profile() as profile:
        fastattn.attention(*operands)
    assert any("fastattn::attention_fwd" in event.key for event in profile.key_averages())


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:DeprecationWarning")
def test_traces_contain_the_op() -> None:
    """Those of programs that leave the process only if asked to (tests/integrations/test_export.py)."""
    operands, graphs = qkv(), []

    def call(*operands: Tensor) -> Any:
        return fastattn.attention(*operands)

    def keeping(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph

    graphs.append(make_fx(call)(*operands))
    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(call, backend=keeping, fullgraph=True)(*operands)
    with plain_torch(False):
        graphs.append(torch.export.export(_Module(call), tuple(operands)).module())
        trace = torch.jit.trace(call, tuple(operands), check_trace=False)
    assert len(graphs) == 3
    assert all(OP in graph.code for graph in graphs)
    assert "fastattn::attention_fwd" in str(trace.graph)


class _Module(torch.nn.Module):
    def __init__(self, call: Callable[..., Any]) -> None:
        super().__init__()
        self.call = call

    def forward(self, *operands: Tensor) -> Any:
        return self.call(*operands)


def test_fake_and_meta_tensors_compute_nothing() -> None:
    with FakeTensorMode() as mode:
        inside = fastattn.attention(*qkv())
    assert isinstance(inside, FakeTensor)
    fakes = [mode.from_tensor(t) for t in qkv()]
    assert isinstance(fastattn.attention(*fakes), FakeTensor)  # outside of the mode they came from
    on_meta = [t.to("meta") for t in qkv()]
    assert not torch_compat.can_bypass_dispatcher(on_meta)
    assert fastattn.attention(*on_meta).is_meta


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_what_a_plain_tensor_is_on_each_device(device: str) -> None:
    """Fake tensors carry the keys of real ones on a device that need not be there, and two of their own."""
    for mode in (contextlib.nullcontext(), torch.inference_mode()):
        with mode, FakeTensorMode():
            keys = torch._C._dispatch_keys(torch.empty(2, device=device))
        for key in ("Python", "PythonTLSSnapshot"):
            keys = keys.remove(getattr(torch._C.DispatchKey, key))
        assert keys.raw_repr() in torch_compat.PLAIN_KEYS[1]


@pytest.mark.gpu
def test_a_gpus_tensors_are_plain() -> None:
    assert torch_compat.can_bypass_dispatcher([t.cuda() for t in qkv()])
    with torch.inference_mode():
        assert torch_compat.can_bypass_dispatcher([t.cuda() for t in qkv()])


class Logged(Tensor):
    """A subclass by __torch_function__ alone: the dispatcher does not know it."""

    seen: ClassVar[list[str]] = []

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.seen.append(str(func))
        return super().__torch_function__(func, types, args, kwargs or {})


def test_subclasses_are_asked() -> None:
    q, k, v = qkv()
    out = fastattn.attention(q.as_subclass(Logged), k, v)
    assert isinstance(out, Logged)
    assert any(OP in name for name in Logged.seen)
    assert type(fastattn.attention(torch.nn.Parameter(q), k, v)) is Tensor


def test_a_lazily_negated_tensor_is_what_it_means() -> None:
    q, k, v = qkv()
    negated = torch._neg_view(q)
    assert negated.is_neg()
    # Its memory holds the opposite, which a kernel would read.
    assert not torch_compat.can_bypass_dispatcher([negated, k, v])
    torch.testing.assert_close(fastattn.attention(negated, k, v), fastattn.attention(-q, k, v))


@pytest.mark.parametrize("grad", [False, True])
def test_autocast_ends_at_the_op_either_way(direct: list[bool], grad: bool) -> None:
    operands, outs = qkv(grad), []
    for watcher in (contextlib.nullcontext(), Sees()):
        with torch.autocast("cpu", torch.bfloat16), watcher:
            outs.append(fastattn.attention(*operands, softcap=2.0))
    assert direct == [True, False]
    assert outs[0].dtype == torch.bfloat16
    assert torch.equal(*outs)


def test_transforms_do_not_reach_the_op(direct: list[bool]) -> None:
    q, k, v = qkv()
    with pytest.warns(RuntimeWarning, match="materialises"):
        mapped = torch.vmap(lambda q: fastattn.attention(q, k, v))(torch.stack([q, q]))
    assert direct == []
    torch.testing.assert_close(mapped[1], fastattn.attention(q, k, v))
