"""No replay that was recorded in one state of torch, the environment or the tiles runs in another."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch_states
from replay_calls import OPS, Noted, launched, noted, requiring

from fastattn.spec import AttentionSpec

pytestmark = pytest.mark.filterwarnings("ignore:FASTATTN_BACKEND:RuntimeWarning")


@pytest.fixture
def triton() -> Iterator[Noted]:
    with noted() as found:
        yield found


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
    **torch_states.STATES,
    "a part disabled that is used": lambda: torch_states.variable(
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
ALWAYS = {"no grad", "inference", "forced backend"}


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")
@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("op", CHANGING)
def test_a_replay_of_one_state_is_not_that_of_another(triton: Noted, op: str, state: str) -> None:
    call, make, leaves = OPS[op]
    tensors = requiring(make(), *leaves)

    def assert_same(actual: Any, expected: Any) -> None:
        assert actual == expected

    outside, inside = torch_states.assert_states_do_not_mix(
        lambda: launched(triton, call, tensors), STATES[state], assert_same
    )
    assert (outside != inside) == (state in CHANGING[op] | ALWAYS)
