"""States of torch and of the environment in which a call may run, as contexts that restore what was before."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch


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


STATES: dict[str, Callable[[], Any]] = {
    "no grad": torch.no_grad,
    "inference": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "deterministic": deterministic,
    "forced backend": lambda: variable("FASTATTN_BACKEND", "torch"),
    "a disabled part": lambda: variable("FASTATTN_DISABLE", "cuda.attention_fwd"),
}


def assert_states_do_not_mix(
    run: Callable[[], Any],
    enter: Callable[[], Any],
    assert_same: Callable[[Any, Any], None],
) -> tuple[Any, Any]:
    """In and after a state, whichever came first, calls with plans give what calls without plans give.

    Returns:
        The results without plans outside the state and inside it.
    """
    from fastattn.ops import plan

    def call(inside: bool) -> Any:
        with enter() if inside else contextlib.nullcontext():
            return run()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "wanted", lambda key: False)
        expected = {inside: call(inside) for inside in (False, True)}
    for order in ((False, True), (True, False)):
        plan.clear()
        for inside in (*order, *order):
            for _ in range(3):
                assert_same(call(inside), expected[inside])
    return expected[False], expected[True]
