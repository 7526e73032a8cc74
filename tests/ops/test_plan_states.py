"""No plan made in one state of torch or the environment runs in another."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch_states
from plan_cases import BY_OP, assert_same, cached, heads, with_grads
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import fastattn
from fastattn import backends
from fastattn.backends import switches
from fastattn.integrations.export import plain_torch
from fastattn.ops import plan


class Sees(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class SeesFunctions(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def precision() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


STATES: dict[str, Callable[[], Any]] = {
    **torch_states.STATES,
    "precision": precision,
    "dispatch mode": Sees,
    "function mode": SeesFunctions,
    "profiler": torch.autograd.profiler.profile,
    "plain torch": plain_torch,
    "forward AD": forward_ad.dual_level,
    "anomaly": torch.autograd.detect_anomaly,
}


@pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::UserWarning")
@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("op", BY_OP)
def test_a_plan_of_one_state_is_not_that_of_another(op: str, state: str) -> None:
    call, options = BY_OP[op]
    if (op, state) == ("kv_cache", "forward AD"):
        options = {}
    tensors = [t.requires_grad_(call is not cached) for t in heads(torch.float32)]

    def assert_same_kind(actual: list[Tensor], expected: list[Tensor]) -> None:
        assert_same(actual, expected)
        assert [t.is_inference() for t in actual] == [t.is_inference() for t in expected]

    torch_states.assert_states_do_not_mix(
        lambda: with_grads(call, tensors, options), STATES[state], assert_same_kind
    )


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


def test_an_empty_variable_is_as_if_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = heads(torch.float32)
    expected = fastattn.attention(*tensors)
    for name in ("FASTATTN_BACKEND", "FASTATTN_DISABLE", "TRITON_INTERPRET"):
        monkeypatch.setenv(name, "")
    assert switches.environment() is switches.UNSET
    assert backends.resolve("auto") == "auto"
    assert backends.runs_every_pass("auto")
    assert fastattn.explain(*tensors).backend == "torch"
    for _ in range(3):
        assert torch.equal(fastattn.attention(*tensors), expected)
    assert plan.count() == 1
    monkeypatch.setenv("FASTATTN_DISABLE", "triton")
    assert switches.environment() != switches.UNSET
    assert fastattn.explain(*tensors).backend == "torch"


def test_where_the_state_cannot_be_told_there_is_no_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastattn.torch_compat.state._CAN_TELL_STATE", False)
    tensors = heads(torch.float32)
    for _ in range(3):
        fastattn.attention(*tensors)
    assert plan.count() == 0
    said = "not planned: this torch does not tell what records a call"
    assert fastattn.explain(*tensors).plan == said


class Mine(Tensor):
    pass


Calls = tuple[Callable[..., Any], Callable[..., backends.Explanation], dict[str, Any]]
CACHE = {"k_cache": torch.zeros(2, 2, 9, 8), "v_cache": torch.zeros(2, 2, 9, 8)}
ENDS = torch.tensor([0, 2, 5], dtype=torch.int32)
EXPLAINED: dict[str, Calls] = {
    "attention": (
        fastattn.attention, fastattn.explain, dict(zip(("query", "key", "value"), heads(torch.float32)))
    ),
    "varlen": (
        fastattn.attention_varlen, fastattn.explain_varlen,
        {**dict.fromkeys(("query", "key", "value"), torch.randn(5, 2, 8)), "cu_seqlens_q": ENDS, "cu_seqlens_k": ENDS},
    ),
    "kv_cache": (
        fastattn.attention_kv_cache, fastattn.explain_kv_cache,
        {"query": torch.randn(2, 4, 1, 8), **CACHE, "cache_lengths": torch.tensor([3, 4], dtype=torch.int32)},
    ),
    "softmax": (fastattn.softmax, fastattn.explain_softmax, {"x": torch.randn(3, 4)}),
    "cross_entropy": (
        fastattn.cross_entropy, fastattn.explain_cross_entropy,
        {"logits": torch.randn(5, 4), "target": torch.arange(5) % 4},
    ),
    "linear_cross_entropy": (
        fastattn.linear_cross_entropy, fastattn.explain_linear_cross_entropy,
        {"hidden": torch.randn(5, 8), "weight": torch.randn(4, 8), "target": torch.arange(5) % 4},
    ),
}  # fmt: skip
UNPLANNED = {
    "autocast": "autocast is on",
    "dispatch mode": "a mode, transform or trace is on",
    "function mode": "a torch function mode is on",
    "profiler": "a profiler is on",
    "plain torch": "plain_torch, an export or a trace is on",
    "forward AD": "forward-mode AD is on",
    "plans switched off": "FASTATTN_DISABLE switches plan off",
}


def assert_outlook(calls: Calls, more: dict[str, Any], hits: list[bool]) -> str:
    """What `explain` says of the plan, which calls of this kind then make or not."""
    op, explain, arguments = calls
    said = explain(**arguments, **more).plan
    assert said is not None
    for _ in range(3):
        with contextlib.suppress(RuntimeError):  # under forward-mode AD a cache is refused
            op(**arguments, **more)
    assert (hits or [False] * 3) == [False, False, said == "planned"]  # for some calls none is looked up
    return said


@pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::UserWarning")
@pytest.mark.parametrize("state", [*STATES, "plans switched off"])
@pytest.mark.parametrize("op", EXPLAINED)
def test_explain_says_whether_a_call_has_a_plan(op: str, state: str, hits: list[bool]) -> None:
    plan.clear()
    states = {**STATES, "plans switched off": lambda: torch_states.variable("FASTATTN_DISABLE", "plan")}
    with states[state]():
        said = assert_outlook(EXPLAINED[op], {}, hits)
    assert said == (f"not planned: {UNPLANNED[state]}" if state in UNPLANNED else "planned")


WITH_OPTIONS: dict[str, tuple[str, dict[str, Any], str]] = {
    "window as a list": ("attention", {"window": [3, 0]}, "planned"),
    "window as a list, varlen": ("varlen", {"window": [3, 0]}, "planned"),
    "window as a list, kv_cache": ("kv_cache", {"window": [3, None]}, "planned"),
    "segments": ("attention", {"segment_ids": torch.zeros(2, 12, dtype=torch.int32)}, "planned"),
    "a pair": ("attention", {"segment_ids": (torch.zeros(2, 12).int(), torch.zeros(2, 12).int())}, "planned"),
    "a list": (
        "attention", {"segment_ids": [torch.zeros(2, 12).int()] * 2},
        "not planned: an argument of class list has no hash",
    ),
    "weights": ("attention", {"return_weights": True}, "not planned: weights are returned"),
    "subclass": (
        "softmax", {"mask": torch.ones(4).bool().as_subclass(Mine)}, "not planned: an operand is of class Mine"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WITH_OPTIONS)
def test_explain_says_which_arguments_have_no_plan(case: str, hits: list[bool]) -> None:
    plan.clear()
    op, options, expected = WITH_OPTIONS[case]
    assert assert_outlook(EXPLAINED[op], options, hits) == expected
    assert fastattn.explain_softmax(torch.ones(())).plan == "not planned: x has no dimension"
