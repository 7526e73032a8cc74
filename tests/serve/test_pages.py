"""Parts of the engine on their own: the pool of pages, and products in blocks of two sizes."""

from __future__ import annotations

import pytest
import torch

from fastattn.models.paged import LARGE_BLOCK, InLargeBlocks, blocks_agree
from fastattn.nn.rows import InBlocks
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


@pytest.mark.parametrize("same", [True, False])
def test_large_blocks_are_used_where_they_have_the_bits_of_small_ones(same: bool) -> None:
    weight = torch.randn(24, 40, generator=torch.Generator().manual_seed(1))

    def product(x: torch.Tensor) -> torch.Tensor:
        out = (x[:, None].double() * weight).sum(-1).float()
        return out if same or len(x) < LARGE_BLOCK else out * (1 + 2**-20)

    assert blocks_agree(product, weight) == same
    sizes = []

    def recorded(x: torch.Tensor) -> torch.Tensor:
        sizes.append(len(x))
        return product(x)

    x = torch.randn(2 * LARGE_BLOCK + 6, 40, generator=torch.Generator().manual_seed(2))
    found = InLargeBlocks(recorded)(x)
    assert sizes == [LARGE_BLOCK, LARGE_BLOCK, 4, 4]
    assert torch.equal(found, InBlocks(product)(x)) == same
