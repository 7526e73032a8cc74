"""The table of products of a few rows: a line for each product, and numbers of rows whose bits depend on the place."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from measure import perplexity, rows


def test_the_table_has_a_line_for_every_product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "SIZES", ((5, 7),))
    monkeypatch.setattr(rows, "ROUNDS", 1)
    monkeypatch.setattr(rows, "COLD_BYTES", 1)  # two weights of each kind
    header, _, *lines = rows.table()
    assert header.count("|") == 2 + len(rows.COUNTS) + 2
    names = [line.split("|")[1].strip() for line in lines]
    for dtype in ("float32", "bfloat16", "float16"):
        assert {f"torch, {dtype}", f"chosen, {dtype}"} <= set(names)
    assert "int8, float32" in names
    assert all(line.count("|") == header.count("|") for line in lines)


def test_bits_that_depend_on_the_place_or_the_neighbours_are_seen() -> None:
    def by_place(x: Tensor) -> Tensor:
        return x + torch.arange(len(x))[:, None]

    def by_neighbours(x: Tensor) -> Tensor:
        return x / x.abs().max()

    assert rows.same_at_every_place(lambda x: 2 * x, 4, 3, torch.float32)
    assert not rows.same_at_every_place(by_place, 4, 3, torch.float32)
    assert not rows.same_at_every_place(by_neighbours, 4, 3, torch.float32)


def test_perplexities_of_a_tiny_trained_model() -> None:
    plain, int8, bfloat16 = perplexity.lines(2, vocab_size=300, n_embd=16, n_layer=1)
    assert plain.startswith("float32: ")
    assert int8.startswith("int8: ")
    assert int8.endswith(" %)")
    assert bfloat16.startswith("bfloat16: ")
