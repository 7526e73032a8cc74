"""The work of a function is recorded and replayed on other tensors; what cannot be recorded gives the reason."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastattn import torch_compat
from fastattn.backends import programs
from fastattn.backends.replay import Replay, can_replay
from fastattn.recorders import this_thread

ELSEWHERE = torch.ones(3)


def views(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    out = x.new_empty((3, 2)).t()
    out.copy_(x)
    part = out[1:]
    part.mul_(2)
    return out, part, (x + y)[0]


def in_place(x: Tensor, y: Tensor) -> Tensor:
    y.add_(x)
    return y


def several(x: Tensor, y: Tensor) -> tuple[Tensor | None, ...]:
    low, high = torch.aminmax(x)
    first, second = y.split(1)
    return torch.cat([first, second]), low, high, None


def by_name(x: Tensor, y: Tensor) -> Tensor:
    out = torch.empty_like(x)
    torch.add(x, y, alpha=3, out=out)
    return torch.where(out > 0, out, -0.0).sum(0, dtype=torch.float64)


def indexed(x: Tensor, y: Tensor) -> Tensor:
    return x[:, torch.argsort(y[0])]


FUNCTIONS: list[Callable[..., Any]] = [views, in_place, several, by_name, indexed]


def parts(results: Any) -> list[Tensor | None]:
    return list(results) if isinstance(results, tuple) else [results]


@pytest.mark.parametrize("function", FUNCTIONS)
def test_what_was_recorded_is_done_again(function: Callable[..., Any]) -> None:
    replay = Replay(function)
    for number in range(3):
        pair = [torch.randn(2, 3), torch.randn(2, 3)]
        expected = parts(function(*(t.clone() for t in pair)))
        found = parts(replay(*pair))
        assert (replay.program is not None, replay.refusal) == (True, None)
        assert len(found) == len(expected)
        for one, other in zip(found, expected):
            assert (one is None) == (other is None)
            if one is not None and other is not None:
                assert one.stride() == other.stride()
                torch.testing.assert_close(one, other, rtol=0, atol=0)
        if function is in_place:
            assert found[0] is pair[1]
        if function is views:
            assert found[0].data_ptr() != found[1].data_ptr(), number  # a view of the same memory
            assert found[0].untyped_storage().data_ptr() == found[1].untyped_storage().data_ptr()


REFUSED: dict[str, Callable[[Tensor], Any]] = {
    "a number": lambda x: x * x.sum().item(),
    "a choice": lambda x: x if bool(x[0] > 0) else -x,
    "a shape": lambda x: x[x > 0],
    "places": lambda x: x.nonzero(),
    "an operand from elsewhere": lambda x: x + ELSEWHERE,
    "a result from elsewhere": lambda x: ELSEWHERE,
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_depends_on_values_is_not_recorded(name: str) -> None:
    replay = Replay(REFUSED[name])
    for x in (torch.ones(3), -torch.ones(3), torch.tensor([1.0, -2.0, 3.0])):
        torch.testing.assert_close(replay(x), REFUSED[name](x), rtol=0, atol=0)
        assert replay.program is None
        assert replay.refusal


def test_a_tensor_given_twice_is_two_inputs() -> None:
    replay = Replay(lambda x, y: x - 2 * y)
    x, y = torch.ones(2), torch.full((2,), 5.0)
    assert replay(x, x).tolist() == [-1, -1]
    assert replay(x, y).tolist() == [-9, -9]


def test_an_error_leaves_nothing_behind() -> None:
    def refusing(x: Tensor) -> Tensor:
        raise ValueError("x")

    replay = Replay(refusing)
    with pytest.raises(ValueError, match="x"):
        replay(torch.ones(2))
    assert this_thread.recorder is None
    assert replay.program is None


def test_neither_a_recording_nor_a_replay_keeps_tensors() -> None:
    replay = Replay(views)
    for _ in range(3):
        x, y = torch.ones(2, 3), torch.ones(2, 3)
        found = replay(x, y)
        kept = [weakref.ref(t) for t in (x, y, *found)]
        del x, y, found
        assert all(ref() is None for ref in kept)


def test_what_a_function_lets_go_is_let_go_while_it_is_recorded() -> None:
    """A tensor that gets the id of a freed one is another tensor."""
    left: list[weakref.ref[Tensor]] = []

    def function(x: Tensor) -> Tensor:
        for number in range(5):
            part = x + number
            left.append(weakref.ref(part))
            x = x + part.sum()
            del part
            assert left[-1]() is None
        return x

    replay = Replay(function)
    expected = function(torch.ones(2))
    for _ in range(2):
        assert torch.equal(replay(torch.ones(2)), expected)
    assert replay.program is not None
    assert len(left) == 10


def test_large_temporaries_are_released_after_their_last_use(monkeypatch: pytest.MonkeyPatch) -> None:
    def long(x: Tensor) -> Tensor:
        first = torch.empty_like(x)
        first.copy_(x)
        second = torch.stack([first, first])
        third = second[0] + 1
        return third.sum()

    for large, alive in ((1, 1), (2**20, 4)):
        monkeypatch.setattr(programs, "LARGE", large)
        replay = Replay(long)
        replay(torch.ones(4))
        program = replay.program
        assert program is not None
        assert sum(len(released) > 0 for *_, released in program.steps) == (0 if alive == 4 else 3)
        assert replay(torch.ones(4)) == 8


def test_memory_is_allocated_as_the_result_that_it_becomes() -> None:
    """No view is then made in a replay; memory that only launches read needs none either."""

    class Launch:
        def __init__(self, *args: Any) -> None:
            self.args = args

        def start(self) -> None:
            for arg in self.args:
                arg.fill_(7)

        def starter(self, compiled: None) -> Callable[..., Any]:
            return lambda *args: Launch(*args).start()

    def function(x: Tensor) -> Tensor:
        memory = x.new_empty((3, 2))
        launch = Launch(memory.view(6), x.view(2, 3).t())
        launch.start() if this_thread.recorder is None else this_thread.recorder.launch(launch)
        return memory.t()

    replay = Replay(function)
    for _ in range(3):
        x = torch.zeros(6)
        out = replay(x)
        assert out.stride() == (1, 2)
        assert out.eq(7).all()
        assert x.eq(7).all()
    program = replay.program
    assert program is not None
    assert [kind for kind, *_ in program.steps] == [programs.EMPTY, programs.NOTHING]


def test_only_backends_that_say_so_are_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastattn.backends import BACKENDS

    assert {backend.NAME for backend in BACKENDS if can_replay(backend)} == {"cuda", "triton"}
    monkeypatch.setattr(torch_compat.state, "_TorchDispatchMode", None)
    assert not any(map(can_replay, BACKENDS))
