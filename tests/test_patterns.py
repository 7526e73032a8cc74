"""docs/patterns.md: its recipes are exact, gradients too, without memory of the length squared."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from allocations import Allocations
from torch import Tensor

import fastattn
from fastattn import reference
from numerics import assert_within_rule, plain_in_any_order

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "patterns.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def run(example: str) -> dict[str, Any]:
    names: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(example, "docs/patterns.md", "exec"), names)
    return names


@pytest.fixture(scope="module")
def recipes() -> dict[str, Any]:
    """The functions that the page defines."""
    names: dict[str, Any] = {}
    for example in EXAMPLES:
        names |= run(example)
    return names


def inputs(length: int, dtype: torch.dtype, heads: int = 4, kv_heads: int = 2) -> list[Tensor]:
    made = [torch.randn(2, n, length, 16) for n in (heads, kv_heads, kv_heads)]
    return [tensor.to(dtype).requires_grad_() for tensor in made]


def results(call: Callable[..., Tensor], leaves: list[Tensor], dout: Tensor) -> list[Tensor]:
    out = call(*leaves)
    return [out, *torch.autograd.grad(out, leaves, dout)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("length", "window", "first"),
    [
        (40, 8, 4),
        (40, 1, 1),
        (40, 8, 0),
        (40, 8, 20),
        (40, 39, 3),
        (40, 40, 3),
        (40, 50, 60),
        (9, 4, 9),
        (1, 1, 1),
    ],
)
@pytest.mark.parametrize("options", [{}, {"softcap": 2.0, "scale": 0.5}], ids=["plain", "softcap"])
def test_a_window_and_the_first_keys_are_exact(
    recipes: dict[str, Any],
    length: int,
    window: int,
    first: int,
    options: dict[str, float],
    dtype: torch.dtype,
) -> None:
    position = torch.arange(length)
    distance = position[:, None] - position
    mask = (distance >= 0) & ((distance < window) | (position < first))

    def formula(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = reference.attention(query, key, value, mask=mask, **options)
        assert isinstance(out, Tensor)
        return out

    def ours(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return recipes["window_and_first"](query, key, value, window, first, **options)

    leaves = inputs(length, dtype)
    dout = torch.randn(2, 4, length, 16).to(dtype)
    doubles = [leaf.detach().double().requires_grad_() for leaf in leaves]
    golden = results(formula, doubles, dout.double())
    plain = plain_in_any_order(partial(results, formula, leaves, dout), golden)
    for name, *found in zip(("out", "dq", "dk", "dv"), results(ours, leaves, dout), plain, golden):
        assert_within_rule(*found, name=name)


def test_no_memory_of_the_length_squared(recipes: dict[str, Any]) -> None:
    length = 2048
    leaves = inputs(length, torch.float32, heads=1, kv_heads=1)
    with Allocations() as made:
        results(lambda *qkv: recipes["window_and_first"](*qkv, 64, 4), leaves, torch.ones(2, 1, length, 16))
    assert max(made.sizes) < length * length  # bytes: not even a mask of bools


def test_a_merge_is_exact_where_a_part_or_both_show_no_key(recipes: dict[str, Any]) -> None:
    """Batch entries see keys of both parts, of one, of the other, and of none."""
    lengths = torch.tensor([[5, 5, 0, 0], [7, 0, 7, 0]])

    def ours(query: Tensor, *parts: Tensor) -> Tensor:
        pairs = (parts[:2], lengths[0]), (parts[2:], lengths[1])
        seen = [fastattn.attention(query, *kv, key_lengths=n, return_lse=True) for kv, n in pairs]
        return recipes["merge"](*seen[0], *seen[1])[0]

    def formula(query: Tensor, *parts: Tensor) -> Tensor:
        visible = [torch.arange(size) < n[:, None] for size, n in zip((5, 7), lengths)]
        key, value = (torch.cat(pair, dim=2) for pair in (parts[::2], parts[1::2]))
        out = reference.attention(query, key, value, mask=torch.cat(visible, dim=1)[:, None, None])
        assert isinstance(out, Tensor)
        return out

    leaves = [torch.randn(4, 2, n, 8, requires_grad=True) for n in (3, 5, 5, 7, 7)]
    dout = torch.randn(4, 2, 3, 8)
    golden = results(formula, [leaf.detach().double().requires_grad_() for leaf in leaves], dout.double())
    plain = plain_in_any_order(partial(results, formula, leaves, dout), golden)
    for found in zip(results(ours, leaves, dout), plain, golden):
        assert_within_rule(*found)
