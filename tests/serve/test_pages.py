"""Parts of the engine on their own: the pool of pages, and products in blocks of two sizes."""

from __future__ import annotations

import pytest
import torch

from fastattn.models.paged import LARGE_BLOCKS, InLargeBlocks, blocks_that_agree
from fastattn.serve.engine.pages import PagePool, PagesExhausted, names_of


def test_pages_are_counted_named_and_found() -> None:
    pool = PagePool(3, 2)
    names = names_of([1, 2, 3, 4], 2, 2)
    assert names_of([1, 2, 9, 9], 2, 2)[0] == names[0]
    assert names_of([9, 2, 3, 4], 2, 2)[1] != names[1]  # all before it counts
    first, second = pool.take(), pool.take()
    pool.name(first, names[0])
    pool.name(second, names[1])
    for page in (second, first):
        pool.release(page)
    assert pool.available == 3
    assert pool.begin_with(names) == [first, second]
    pool.hold(first)
    assert pool.available == 2
    taken = [pool.take(), pool.take()]  # the free one, then the named one that nobody holds
    assert second in taken
    assert pool.begin_with(names) == [first]
    with pytest.raises(PagesExhausted):
        pool.take()


def test_a_page_has_the_names_of_its_parts() -> None:
    pool = PagePool(2, 4)
    names = names_of([1, 2, 3, 4, 5, 6], 2, 3)
    page, other = pool.take(), pool.take()
    pool.name(page, names[0])
    pool.name(other, names[0])  # the first keeps it
    pool.name(other, names[1])
    assert [pool.page_of(name) for name in names] == [page, other, None]
    pool.release(page)
    pool.release(other)
    assert pool.available == 2
    assert pool.take() == page  # the one that was left first
    assert [pool.page_of(name) for name in names] == [None, other, None]


@pytest.mark.parametrize("agreeing", [LARGE_BLOCKS, LARGE_BLOCKS[:1], ()])
def test_large_blocks_are_used_where_they_have_the_bits_of_small_ones(agreeing: tuple[int, ...]) -> None:
    weight = torch.randn(24, 40, generator=torch.Generator().manual_seed(1))

    def product(x: torch.Tensor) -> torch.Tensor:
        out = (x[:, None].double() * weight).sum(-1).float()
        return out if len(x) in (4, *agreeing) else out * (1 + 2**-20)

    assert blocks_that_agree(product, weight) == agreeing


@pytest.mark.parametrize(
    ("rows", "blocks"),
    [(0, [0]), (3, [4]), (5, [16]), (16, [16]), (17, [32]), (40, [64]), (64, [64]), (70, [64, 16])],
)
def test_blocks_hold_all_rows_in_their_order(rows: int, blocks: list[int]) -> None:
    sizes = []

    def recorded(x: torch.Tensor) -> torch.Tensor:
        sizes.append(len(x))
        return x + 1

    x = torch.randn(rows, 40, generator=torch.Generator().manual_seed(2))
    assert torch.equal(InLargeBlocks(recorded, LARGE_BLOCKS)(x), x + 1)
    assert sizes == blocks
