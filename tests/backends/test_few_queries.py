"""A few queries per sequence against a cache on a CPU: the error rule, and bits of a sequence alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fastattn
from fastattn import torch_compat
from fastattn.backends.torch import single_query
from fastattn.ops import plan
from numerics import assert_attention_within_rule

# (key/value heads, group, D, Dv, keys, queries): one head of one sequence is one matrix, or two halves of many keys
SHAPES = [
    (2, 2, 64, 64, 300, 5), (12, 1, 64, 64, 200, 2), (1, 4, 64, 64, 2100, 3), (1, 1, 64, 64, 40, 5),
    (1, 3, 128, 128, 1100, 5), (2, 4, 128, 128, 600, 16), (2, 1, 24, 40, 16, 16), (3, 2, 7, 80, 33, 4),
]  # fmt: skip


def made(shape: tuple[int, ...], batch: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """A query and caches with room for 3 more tokens, which are NaN."""
    kv_heads, group, dim, value_dim, length, count = shape
    torch.manual_seed(0)
    query = torch.randn(batch, kv_heads * group, count, dim).to(dtype)
    k, v = (torch.randn(batch, kv_heads, length + 3, width).to(dtype) for width in (dim, value_dim))
    k[:, :, length:], v[:, :, length:] = torch.nan, torch.nan
    return query, k, v


def attend(query: Tensor, k: Tensor, v: Tensor, lengths: list[int], **more: object) -> tuple[Tensor, Tensor]:
    """(out, lse) of the torch backend."""
    held = torch.tensor(lengths, dtype=torch.int32)
    return fastattn.attention_kv_cache(query, k, v, held, return_lse=True, backend="torch", **more)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_error_rule_and_the_bits_of_a_sequence_alone(
    shape: tuple[int, ...], dtype: torch.dtype, causal: bool, threads: int
) -> None:
    length = shape[4]
    query, k, v = made(shape, 3, dtype)
    lengths = [length, length, shape[5]]
    plan.clear()
    first, *others = (attend(query, k, v, lengths, causal=causal) for _ in range(2))
    for b, own in enumerate(lengths):
        mine = slice(b, b + 1)
        alone = [
            attend(query[mine], k[mine], v[mine], [own], causal=causal) for _ in range(3)
        ]  # the last by a plan
        for results in (first, *others):
            for one in alone:
                assert all(torch.equal(x[mine], y) for x, y in zip(results, one)), b
        operands = [t[mine] for t in (query, k[:, :, :own], v[:, :, :own])]
        assert_attention_within_rule(alone[-1], operands, f"sequence {b}", causal=causal)


@pytest.mark.parametrize("widened", [False, True], ids=["16 bits", "widened"])
def test_without_products_of_16_bits(widened: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if widened:
        monkeypatch.setattr(torch_compat, "has_fast_products", lambda dtype: False)
    query, k, v = made((2, 2, 64, 64, 1200, 5), 1, torch.bfloat16)
    results = attend(query, k, v, [1200])
    operands = [query, k[:, :, :1200], v[:, :, :1200]]
    assert_attention_within_rule(results, operands, "1200 keys", causal=True)


def test_a_plan_leaves_other_numbers_of_keys_to_tiles() -> None:
    """Fewer keys than queries, of which some see none, and more scores than are kept at once; new keys are written
    once."""
    query, k, v = made((2, 2, 16, 16, 40, 4), 1, torch.float32)
    new = torch.randn(2, 1, 2, 2, 16)
    for start in (30, 31, 32, 0, 33):  # a plan from the third on
        own_k, own_v = k.clone(), v.clone()
        out, lse = attend(query, own_k, own_v, [start], key=new[0], value=new[1])
        k_all, v_all = (torch.cat([cache[:, :, :start], t], 2) for cache, t in ((k, new[0]), (v, new[1])))
        assert_attention_within_rule((out, lse), (query, k_all, v_all), f"from {start}", causal=True)
        assert torch.equal(own_k[:, :, start : start + 2], new[0])
    assert not single_query.are_few(4, 4, 2, True)
    assert not single_query.are_few(4, 16, single_query.MOST_SCORES // 64 + 1, True)
    assert single_query.are_few(4, 1, single_query.MOST_SCORES, True)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_scores_that_are_not_finite(bad: float, threads: int) -> None:
    """A row is NaN from the first bad key that it sees, and rows and sequences without one keep their bits."""
    query, k, v = made((2, 1, 16, 16, 30, 4), 2, torch.float32)
    query = query.abs()
    clean = attend(query, k, v, [30, 30])
    k[1, 0, 28] = bad  # seen by the last two queries
    for _ in range(3):
        for one, other in zip(attend(query, k, v, [30, 30]), clean):
            assert torch.equal(one[0], other[0])
            assert torch.equal(one[1, 1], other[1, 1])
            assert torch.equal(one[1, 0, :2], other[1, 0, :2])
            assert bool(one[1, 0, 2:].isnan().all())
