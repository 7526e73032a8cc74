"""No replay that was recorded in one state of torch, the environment or the tiles runs in another."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from replay_calls import OPS, Noted, launched, noted, requiring

from fastattn.ops import plan
from fastattn.spec import AttentionSpec

pytestmark = pytest.mark.filterwarnings("ignore:FASTATTN_BACKEND:RuntimeWarning")


@pytest.fixture
def triton() -> Iterator[Noted]:
    with noted() as found:
        yield found


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
