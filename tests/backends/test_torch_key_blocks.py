"""One query per sequence in blocks of keys: the error rule, and bits that nothing else changes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastattn.backends.torch import key_blocks
from fastattn.backends.torch.key_blocks import KEYS, KeyBlocks
from numerics import assert_each_within_rule

LENGTHS = [1, 64, 65, 3, 200, 128, 30]
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "scale": {"scale": 0.3},
    "window": {"window_left": 40},
    "window of a block": {"window_left": KEYS - 1},
    "own key alone": {"window_left": 0},
    "soft cap": {"softcap": 2.0},
}
DIMS = [(16, 12), (16, 16)]  # torch's fused kernel, where it is used, takes those that are equal


class Paged:
    """Sequences of LENGTHS keys in pages of random order, whose rest holds `filling`."""

    def __init__(
        self, page_size: int, heads: int, dtype: torch.dtype, dims: tuple[int, int] = (16, 12)
    ) -> None:
        generator = torch.Generator().manual_seed(page_size)
        self.keys, self.values = (
            [torch.randn(heads, n, dim, generator=generator).to(dtype) for n in LENGTHS] for dim in dims
        )
        most = max(LENGTHS) // page_size + 1
        order = torch.randperm(len(LENGTHS) * most, generator=generator)
        self.table = order.view(len(LENGTHS), most).int()
        self.page_size, self.heads = page_size, heads

    def pages(self, of: list[Tensor], filling: float = 0.0) -> Tensor:
        made = of[0].new_full((self.table.numel(), self.heads, self.page_size, of[0].shape[2]), filling)
        for row, tensor in zip(self.table.tolist(), of):
            for place, part in enumerate(tensor.split(self.page_size, 1)):
                made[row[place], :, : part.shape[1]] = part
        return made

    def attend(self, query: Tensor, which: list[int], filling: float = 0.0, **options: Any) -> Tensor:
        scale, softcap = options.get("scale"), options.get("softcap")
        blocks = KeyBlocks(
            [LENGTHS[i] for i in which],
            self.table[which],
            self.heads,
            self.page_size,
            options.get("window_left"),
        )
        keys, values = (self.pages(of, filling) for of in (self.keys, self.values))
        return blocks.attend(query[which], keys, values, scale, softcap)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("page_size", [16, 24, 64, 256])
@pytest.mark.parametrize("dims", DIMS)
@pytest.mark.parametrize("name", OPTIONS)
def test_against_float64(name: str, dims: tuple[int, int], page_size: int, dtype: torch.dtype) -> None:
    from fastattn import reference

    options = OPTIONS[name]
    paged = Paged(page_size, 2, dtype, dims)
    query = torch.randn(len(LENGTHS), 4, 1, 16, generator=torch.Generator().manual_seed(1)).to(dtype)
    out = paged.attend(query, list(range(len(LENGTHS))), **options)

    def formula(dtype: torch.dtype) -> dict[str, Tensor]:
        left, made = options.get("window_left"), []
        for one, key, value in zip(query, paged.keys, paged.values):
            made.append(
                reference.attention(
                    *(t[None].to(dtype) for t in (one, key, value)), causal=True, scale=options.get("scale"),
                    window=None if left is None else (left, 0), softcap=options.get("softcap"),
                )
            )  # fmt: skip
        return {"out": torch.cat(made)}

    assert_each_within_rule({"out": out}, lambda: formula(dtype), formula(torch.float64), name, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("copied", [1, key_blocks.COPIED_ELEMENTS])
@pytest.mark.parametrize("dims", DIMS)
@pytest.mark.parametrize("name", OPTIONS)
def test_others_and_pages_change_no_bit(
    name: str,
    dims: tuple[int, int],
    copied: int,
    heads: int,
    dtype: torch.dtype,
    threads: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    paged, others = Paged(16, heads, dtype, dims), Paged(24, heads, dtype, dims)
    others.keys, others.values = paged.keys, paged.values
    query = torch.randn(len(LENGTHS), heads, 1, 16, generator=torch.Generator().manual_seed(1)).to(dtype)
    together = paged.attend(query, list(range(len(LENGTHS))), **OPTIONS[name])
    monkeypatch.setattr(key_blocks, "COPIED_ELEMENTS", copied)
    for number in range(len(LENGTHS)):
        for pages in (paged, others):
            alone = pages.attend(query, [number], **OPTIONS[name])
            assert torch.equal(alone[0], together[number])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("page_size", [KEYS, 4 * KEYS])
@pytest.mark.parametrize("dims", DIMS)
@pytest.mark.parametrize("name", OPTIONS)
def test_neighbours_are_read_where_they_lie_with_the_bits_of_copies(
    name: str, dims: tuple[int, int], page_size: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pages in the order of their places, with holes and a page that two sequences share."""
    paged = Paged(page_size, 2, dtype, dims)
    paged.table = torch.arange(paged.table.numel(), dtype=torch.int32).view(paged.table.shape)
    query = torch.randn(len(LENGTHS), 4, 1, 16, generator=torch.Generator().manual_seed(1)).to(dtype)
    which = [5, 4, 4, 2, 1, 0]
    in_place = paged.attend(query, which, **OPTIONS[name])
    runs = []

    def none(pages: Any, inside: Any) -> Any:
        found, order = found_runs(pages, inside)
        runs.extend(found)
        return [], order

    found_runs = key_blocks._runs
    monkeypatch.setattr(key_blocks, "_runs", none)
    assert torch.equal(paged.attend(query, which, **OPTIONS[name]), in_place)
    assert runs or name == "own key alone"  # one block of each


def test_runs_are_blocks_at_one_place_of_consecutive_pages() -> None:
    pages, inside = np.array([7, 3, 5, 4, 9, 8, 8, 2, 3]), np.array([0, 0, 0, 0, 1, 1, 0, 1, 1])
    runs, order = key_blocks._runs(pages, inside)
    assert sorted(order.tolist()) == list(range(9))
    assert [tuple(run) for run in runs] == [(0, 3, 3, 0), (3, 5, 7, 0), (5, 7, 2, 1), (7, 9, 8, 1)]
    for run in runs:
        blocks = order[run.start : run.stop]
        assert pages[blocks].tolist() == list(range(run.page, run.page + len(blocks)))
        assert set(inside[blocks]) == {run.inside}
    assert key_blocks._runs(np.array([4, 4, 1]), np.array([0, 0, 0]))[0] == []


@pytest.mark.parametrize("filling", [math.nan, math.inf, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dims", DIMS)
def test_what_pages_held_before_is_not_seen(
    dims: tuple[int, int], dtype: torch.dtype, filling: float
) -> None:
    paged = Paged(16, 2, dtype, dims)
    query = torch.randn(len(LENGTHS), 4, 1, 16, generator=torch.Generator().manual_seed(1)).to(dtype)
    which = list(range(len(LENGTHS)))
    assert torch.equal(paged.attend(query, which, filling), paged.attend(query, which))


@pytest.mark.parametrize("fault", [math.nan, math.inf])
@pytest.mark.parametrize("of", ["keys", "values"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dims", DIMS)
def test_what_is_not_finite_stays_in_its_sequence(
    dims: tuple[int, int], dtype: torch.dtype, of: str, fault: float
) -> None:
    paged = Paged(16, 2, dtype, dims)
    query = torch.randn(len(LENGTHS), 4, 1, 16, generator=torch.Generator().manual_seed(1)).to(dtype)
    which = list(range(len(LENGTHS)))
    clean = paged.attend(query, which)
    getattr(paged, of)[4][0, 7, 3] = fault
    found = paged.attend(query, which)
    assert (found[4].isnan() if math.isnan(fault) else ~found[4].isfinite()).any()
    assert torch.equal(found[[0, 1, 2, 3, 5, 6]], clean[[0, 1, 2, 3, 5, 6]])


def test_a_block_whose_weights_sum_to_one_without_scores() -> None:
    """Queries of zeros: a block of one key has the log-sum-exp 0, as a row of torch's kernel that saw nothing."""
    paged = Paged(16, 2, torch.float32, (16, 16))
    query = torch.zeros(len(LENGTHS), 4, 1, 16)
    found = paged.attend(query, list(range(len(LENGTHS))))
    for number, values in enumerate(paged.values):
        mean = values.double().mean(1).repeat_interleave(2, 0).float()[:, None]
        torch.testing.assert_close(found[number], mean)
