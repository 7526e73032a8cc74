"""Plans change no bit of a result or a gradient."""

from __future__ import annotations

import threading
from functools import partial

import pytest
import torch
from plan_cases import (
    BY_OP,
    CASES,
    DTYPES,
    OPTIONS,
    assert_same,
    attended,
    cached,
    heads,
    in_order,
    with_grads,
)
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import fastattn
from fastattn import torch_compat
from fastattn.ops import plan

OFF = "plan"


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


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("of", ["x", "dout"])
def test_rows_of_softmax_that_are_not_finite_are_as_without(
    of: str, number: float, log: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows with one such number, or nothing else, beside finite ones, all with an entry that is hidden."""
    plain = torch.randn(4, 6, 8)
    plain[..., 2] = -torch.inf
    for _ in range(3):
        fastattn.softmax(plain.requires_grad_(), log=log)
    results = []
    for off in (True, False):
        monkeypatch.setenv("FASTATTN_DISABLE", OFF) if off else monkeypatch.delenv("FASTATTN_DISABLE")
        x, dout = plain.detach().clone(), torch.randn(4, 6, 8, generator=torch.Generator().manual_seed(1))
        changed = x if of == "x" else dout
        changed[0, 1, 5] = changed[2, 3] = changed[3, 5, 2] = number
        out = fastattn.softmax(x.requires_grad_(), log=log)
        grad = torch.autograd.grad(out, x, dout)[0]
        assert not grad[x == -torch.inf].any()
        assert (out[x == -torch.inf] == (-torch.inf if log else 0)).all()
        results.append([out, grad])
    assert_same(results[1], results[0])


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
    planned = made.args[0] if isinstance(made, partial) else made.__self__
    said = fastattn.explain(*tensors, **{k: v for k, v in options.items() if k != "return_lse"})
    assert (said.backend, said.backward) == (planned.chosen.NAME, planned.backward.NAME)
    assert planned.spec == said.spec


def no_key(tensors: object) -> None:
    raise AssertionError("a guard was to find the plan")


def test_a_guard_finds_a_plan_that_a_key_found_once(
    hits: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = heads(torch.float32)
    lengths, slopes = torch.tensor([3, 4], dtype=torch.int32), torch.rand(4)
    kinds: list[dict[str, object]] = [
        {}, {"causal": True}, {"key_lengths": lengths}, {"alibi_slopes": slopes}, {"sinks": slopes},
        {"alibi_slopes": slopes, "sinks": -slopes}, {"key_lengths": lengths, "dropout_p": 0.5, "dropout_seed": 3},
    ]  # fmt: skip
    expected = [fastattn.attention(*tensors, **options) for options in kinds]
    for _ in range(2):
        for options in kinds:
            fastattn.attention(*tensors, **options)
    monkeypatch.setattr(torch_compat, "state_of_call", no_key)
    hits.clear()
    for options, out in zip(kinds, expected):
        assert torch.equal(fastattn.attention(*tensors, **options), out)
    assert hits == [True] * len(kinds)


@pytest.mark.parametrize("can_guard", [False, True])
def test_plans_are_found_where_no_guard_can_help(
    can_guard: bool, hits: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where torch has none, and where one tensor is given several times."""
    monkeypatch.setattr(torch_compat.state, "_CAN_GUARD", can_guard)
    x = heads(torch.float32)[0]
    for _ in range(5):
        fastattn.attention(x, x, x)
    assert hits == [False, False, True, True, True]
    assert not plan._guarded


def test_a_guard_keeps_no_tensor_and_guards_are_few(hits: list[bool]) -> None:
    """Calls that look alike at a glance: the same shapes in several memory orders and dtypes."""
    import gc
    import weakref

    made = [
        tensors
        for dtype in (torch.float32, torch.float64, torch.bfloat16)
        for tensors in (heads(dtype), in_order(heads(dtype)))
    ]
    for _ in range(2):
        for tensors in made:
            for _ in range(3):
                fastattn.attention(*tensors)
    assert hits[18:] == [True] * 18
    (guarded,) = plan._guarded.values()
    assert len(guarded) == plan.MOST_GUARDS
    kept = weakref.ref(made[-1][0])
    made.clear()
    del tensors
    gc.collect()
    assert kept() is None
