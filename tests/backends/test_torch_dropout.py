"""The dropout stream drawn by NumPy, or by several threads of torch, is the one that every backend shares."""

from __future__ import annotations

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from fastattn.backends.torch import dropout
from fastattn.philox import keep_mask


@pytest.fixture(params=["NumPy", "threads"])
def drawer(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Who draws."""
    before = torch.get_num_threads()
    torch.set_num_threads(1 if request.param == "NumPy" else 2)
    monkeypatch.setattr(dropout, "THREADED_MIN", 0)
    monkeypatch.setattr(dropout, "_recent", dropout._RecentMasks(2**16))
    called: list[str] = []
    for name, function in (("NumPy", "_halves"), ("threads", "_halves_by_threads")):
        halves = getattr(dropout, function)
        monkeypatch.setattr(
            dropout, function, lambda *args, name=name, halves=halves: called.append(name) or halves(*args)
        )
    yield request.param
    torch.set_num_threads(before)
    assert set(called) == {request.param}


def grid(drawn: random.Random) -> dropout.Grid:
    heads = torch.tensor([drawn.randrange(2**24) for _ in range(drawn.choice((1, 2, 6)))])[:, None]
    row, col = drawn.randrange(300), drawn.randrange(300)
    rows = range(row, row + drawn.choice((0, 1, 5, 64)))
    return dropout.Grid(heads, rows, range(col, col + drawn.choice((0, 1, 7, 8, 9, 130))))


@pytest.mark.parametrize("block", [None, 7])
def test_equals_the_stream_of_torch_operations(
    block: int | None, drawer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if block is not None:
        monkeypatch.setattr(dropout, "BLOCK", block)
        monkeypatch.setattr(dropout, "THREADED_BLOCK", block)
    drawn = random.Random(0)
    for _ in range(20):
        seed = torch.tensor([drawn.randrange(-(2**63), 2**63)])
        grids = [grid(drawn) for _ in range(drawn.choice((1, 3)))]
        for p in (1e-9, 0.1, 0.5, 0.99999):
            expected = [keep_mask(seed, each.heads, each.rows, each.cols, p).double() for each in grids]
            alone = dropout.kept_weights(seed, grids[0].heads, grids[0].rows, grids[0].cols, p)
            found = dropout.kept_weights_of(seed, grids, p)
            assert torch.equal(alone.double(), expected[0])
            assert all(torch.equal(a.double(), b) for a, b in zip(found, expected, strict=True))


def test_few_counters_are_not_divided_among_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(dropout, "_draw_by_threads", None)
    heads = torch.arange(2)
    kept = dropout.kept_weights(torch.tensor([3]), heads, range(64), range(64), 0.5)
    assert torch.equal(kept.bool(), keep_mask(torch.tensor([3]), heads, range(64), range(64), 0.5))


def test_a_mask_is_drawn_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dropout, "_recent", dropout._RecentMasks(2**16))
    drawn: list[dropout.Grid] = []
    draw = dropout._drawn
    monkeypatch.setattr(dropout, "_drawn", lambda *args: drawn.extend(args[1]) or draw(*args))
    heads = torch.arange(3)
    calls = [
        (torch.tensor([seed]), heads + head, range(row, 20), range(col, 30), p)
        for seed in (1, 2)
        for head in (0, 1)
        for row in (0, 3)
        for col in (0, 9)
        for p in (0.1, 0.2)
    ]
    first = [dropout.kept_weights(*call).float() for call in calls]
    again = [dropout.kept_weights(*call).float() for call in calls]
    assert len(drawn) == len(calls)
    for call, one, other in zip(calls, first, again):
        assert torch.equal(one, keep_mask(*call).float())
        assert torch.equal(one, other)
        one.zero_()  # what is kept is not what was given
    assert dropout.kept_weights(*calls[0]).any()


def test_masks_beyond_the_limit_are_let_go() -> None:
    recent = dropout._RecentMasks(10)
    packed = {name: np.zeros(size, np.uint8) for name, size in (("a", 4), ("b", 4), ("c", 4), ("large", 11))}
    recent.put("a", packed["a"])
    recent.put("b", packed["b"])
    assert recent.get("a") is packed["a"]  # used later than b now
    recent.put("c", packed["c"])
    recent.put("large", packed["large"])
    assert [recent.get(name) is not None for name in packed] == [True, False, True, False]
    recent.put("c", packed["c"])
    assert recent.bytes == 8


def test_threads_share_the_masks() -> None:
    heads, rows, cols = torch.arange(2), range(17), range(40)
    expected = {seed: keep_mask(torch.tensor([seed]), heads, rows, cols, 0.3).float() for seed in range(8)}

    def run(number: int) -> bool:
        seeds = [(number + i) % 8 for i in range(50)]
        return all(
            torch.equal(
                dropout.kept_weights(torch.tensor([seed]), heads, rows, cols, 0.3).float(),
                expected[seed],
            )
            for seed in seeds
        )

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(run, range(16)))
