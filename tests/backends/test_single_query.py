"""One query per head on a CPU: the error rule, and bits that depend on nothing but the sequence itself."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import fastattn
from fastattn import reference, torch_compat
from fastattn.backends.torch import ragged_query
from fastattn.backends.torch.single_query import results, single_query
from fastattn.ops import arguments, plan
from fastattn.spec import AttentionCall
from numerics import assert_attention_within_rule, assert_each_within_rule

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LENGTHS = (1, 2, 7, 33, 100, 513)


@pytest.fixture(params=[1, 2, 4])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """Threads of torch's operations."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture(params=[False, True], ids=["other maker", "maker of MKL"])
def maker(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whose processor the code is chosen for: what is chosen for the maker of MKL has the same bits there alone."""
    if request.param and not torch_compat.has_mkl_on_intel():
        pytest.skip("a processor of another maker")
    plan.clear()
    monkeypatch.setattr(torch_compat, "has_mkl_on_intel", lambda: request.param)
    yield
    plan.clear()


def caches(batch: int, kv_heads: int, capacity: int, dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Random caches."""
    k, v = (torch.randn(batch, kv_heads, capacity, dim).to(dtype) for _ in range(2))
    return k, v


def attend(
    query: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: list[int], **more: Tensor
) -> list[Tensor]:
    """[out, lse] of the torch backend."""
    out, lse = fastattn.attention_kv_cache(
        query,
        k_cache,
        v_cache,
        torch.tensor(lengths, dtype=torch.int32),
        return_lse=True,
        backend="torch",
        **more,
    )
    return [out, lse]


@pytest.mark.usefixtures("maker")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("group", [1, 2, 8])
def test_a_sequence_has_the_same_bits_in_every_batch(
    dtype: torch.dtype, dim: int, group: int, threads: int
) -> None:
    """Alone, between neighbours of other lengths, in a batch of its length, and in a larger cache."""
    torch.manual_seed(0)
    kv_heads = 2
    batch = len(LENGTHS)
    k, v = caches(batch, kv_heads, max(LENGTHS), dim, dtype)
    query = torch.randn(batch, kv_heads * group, 1, dim).to(dtype)
    together = attend(query, k, v, list(LENGTHS))
    order = [3, 5, 0, 4, 2, 1]
    shuffled = attend(query[order], k[order], v[order], [LENGTHS[b] for b in order])
    for b, length in enumerate(LENGTHS):
        mine = slice(b, b + 1)
        alone = attend(query[mine], k[mine, :, :length], v[mine, :, :length], [length])
        larger = [torch.cat([c[mine], torch.full_like(c[mine], torch.nan)], 2) for c in (k, v)]
        same = [t[mine].expand(3, -1, -1, -1) for t in (query, k, v)]
        equal = attend(*(t.contiguous() for t in same), [length] * 3)
        for i, result in enumerate(alone):
            assert torch.equal(together[i][mine], result)
            assert torch.equal(shuffled[i][order.index(b)], result[0])
            assert torch.equal(attend(query[mine], *larger, [length])[i], result)
            assert all(torch.equal(one, result[0]) for one in equal[i])


# (key/value heads, group, dim, keys): one head of one sequence is one matrix, which MKL multiplies by other code than
# several; products of few rows and scratch buffers of odd sizes depend on alignment.
SHAPES = [
    (1, 1, 24, 1025), (1, 1, 80, 17), (1, 1, 96, 100), (1, 5, 16, 700), (1, 6, 24, 17), (1, 7, 128, 100),
    (1, 8, 64, 600), (1, 3, 128, 1100), (2, 3, 64, 512), (3, 5, 8, 513), (3, 2, 80, 17), (8, 1, 128, 128),
    (4, 1, 64, 511), (12, 1, 64, 1000),
]  # fmt: skip


@pytest.mark.usefixtures("maker")
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_no_shape_depends_on_its_batch(
    shape: tuple[int, int, int, int], dtype: torch.dtype, threads: int
) -> None:
    kv_heads, group, dim, length = shape
    torch.manual_seed(0)
    for batch in (2, 3):
        k, v = caches(batch, kv_heads, length + 3, dim, dtype)
        query = torch.randn(batch, kv_heads * group, 1, dim).to(dtype)
        together = attend(query, k, v, [length] * batch)
        for b in range(batch):
            mine = slice(b, b + 1)
            alone = attend(query[mine].clone(), k[mine].clone(), v[mine].clone(), [length])
            assert all(torch.equal(x[mine], y) for x, y in zip(together, alone)), b


@pytest.mark.usefixtures("maker")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_sequences(dtype: torch.dtype, threads: int) -> None:
    """Also by a plan, and of one head."""
    for kv_heads, group in ((1, 8), (2, 1), (2, 4)):
        k, v = caches(0, kv_heads, 9, 64, dtype)
        query = torch.randn(0, kv_heads * group, 1, 64).to(dtype)
        for _ in range(3):
            out, lse = attend(query, k, v, [])
            assert (out.shape, lse.shape) == (query.shape, query.shape[:3])
            assert fastattn.attention(query, k, v, backend="torch").shape == query.shape


def test_lse_changes_no_bit_of_out(threads: int) -> None:
    torch.manual_seed(0)
    for kv_heads, group, dim, length in SHAPES:
        for dtype in DTYPES:
            k, v = caches(1, kv_heads, length, dim, dtype)
            query = torch.randn(1, kv_heads * group, 1, dim).to(dtype)
            out, _ = single_query(query, k, v, dim**-0.5, exact_scores=False)
            alone, nothing = results(query, k, v, dim**-0.5, False, wants_lse=False)
            assert nothing is None
            assert torch.equal(out, alone)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_shuffled_pages_change_no_bit(dtype: torch.dtype, threads: int) -> None:
    torch.manual_seed(0)
    page, pages, lengths = 16, 8, [100, 37, 128]
    k, v = caches(3, 2, page * pages, 64, dtype)
    query = torch.randn(3, 4, 1, 64).to(dtype)
    dense = attend(query, k, v, lengths)
    table = torch.randperm(3 * pages).view(3, pages)
    paged = []
    for cache in (k, v):
        blocks = cache.unflatten(2, (pages, page)).transpose(1, 2).flatten(0, 1)  # (B * pages, Hkv, page, D)
        paged.append(torch.empty_like(blocks).index_copy_(0, table.flatten(), blocks))
    results = attend(query, *paged, lengths, block_table=table.int())
    for one, other in itertools.zip_longest(results, dense):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("padded", [False, True], ids=["cache", "padded"])
@pytest.mark.parametrize(("dim", "value_dim"), [(64, 64), (128, 128), (7, 80)])
@pytest.mark.parametrize("fast", [False, True], ids=["widened", "16 bits"])
def test_the_error_rule(
    dtype: torch.dtype, padded: bool, dim: int, value_dim: int, fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With products in the dtype itself and with widened operands."""
    monkeypatch.setattr(torch_compat, "has_fast_products", lambda dtype: fast)
    torch.manual_seed(0)
    lengths = [600, 600, 5]
    query = torch.randn(3, 8, 1, dim).to(dtype)
    k, v = (torch.randn(3, 2, 600, width).to(dtype) for width in (dim, value_dim))
    if padded:
        held = torch.tensor(lengths, dtype=torch.int32)
        results = fastattn.attention(query, k, v, key_lengths=held, return_lse=True, backend="torch")
    else:
        results = attend(query, k, v, lengths)
    for b, length in enumerate(lengths):
        operands = [t[b : b + 1] for t in (query, k[:, :, :length], v[:, :, :length])]
        assert_attention_within_rule([t[b : b + 1] for t in results], operands, f"sequence {b}")


@pytest.mark.parametrize("batch", [1, 3])
def test_caches_in_another_memory_order(batch: int) -> None:
    """(B, S, H, D) memory, where no view joins batch and heads."""
    torch.manual_seed(0)
    k, v = caches(batch, 2, 40, 64, torch.float32)
    query = torch.randn(batch, 4, 1, 64)
    other = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (k, v)]
    results = attend(query, *other, [40] * batch)
    assert_attention_within_rule(results, (query, k, v), "another memory order")


@pytest.mark.parametrize("window", [None, (4, None), (0, 0)], ids=str)
@pytest.mark.parametrize("causal", [True, False, "top_left"])
def test_windows_cut_the_keys(window: tuple[int | None, int | None] | None, causal: bool | str) -> None:
    torch.manual_seed(0)
    k, v = caches(1, 2, 20, 64, torch.float64)
    query = torch.randn(1, 4, 1, 64, dtype=torch.float64)
    options = {"causal": causal, "window": window, "return_lse": True}
    out, lse = fastattn.attention_kv_cache(
        query, k, v, torch.tensor([20], dtype=torch.int32), backend="torch", **options
    )
    want_out, want_lse = reference.attention(query, k, v, **options)
    torch.testing.assert_close(out, want_out)
    torch.testing.assert_close(lse, want_lse)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fault", [torch.nan, torch.inf])
def test_a_neighbour_that_is_not_finite_changes_no_bit(
    dtype: torch.dtype, fault: float, threads: int
) -> None:
    """Also where a plan is replayed, from the third call on."""
    torch.manual_seed(0)
    k, v = caches(3, 2, 40, 64, dtype)
    query = torch.randn(3, 4, 1, 64).to(dtype)
    k[1, 0, 5] = fault
    lengths = [40, 40, 40]
    for _ in range(3):
        together = attend(query, k, v, lengths)
        for b in (0, 2):
            mine = slice(b, b + 1)
            alone = attend(query[mine], k[mine], v[mine], [40])
            assert all(torch.equal(x, y[mine]) for x, y in zip(alone, together)), b
        assert together[0][1, :2].isnan().any()


def ragged_cases() -> dict[str, dict[str, Any]]:
    """Options under which each sequence's one query sees a range of the 40 keys, none, or (the last) other keys."""
    places = torch.arange(40)
    lengths = torch.tensor([40, 0, 17, 40])
    left = torch.where(places >= torch.tensor([0, 5, 39, 40])[:, None], 0, -1)
    packed = torch.stack([places // 10, places // 40, (places - 8) // 8, 3 - places // 10])
    torn = torch.stack([places % 3, places // 10, places // 10, places // 10])
    one = torch.tensor([[0], [0], [0], [0]])
    return {
        "lengths": {"key_lengths": lengths},
        "lengths, causal window": {"key_lengths": lengths, "causal": True, "window": (30, 0)},
        "top left": {"key_lengths": lengths, "causal": "top_left"},
        "left padding": {"segment_ids": (one, left), "causal": True},
        "left padding, window": {"segment_ids": (one, left), "causal": True, "window": (9, 0)},
        "left padding, lengths, sinks": {
            "segment_ids": (one, left), "key_lengths": lengths, "sinks": torch.linspace(-1, 1, 4).double(),
        },
        "documents": {"segment_ids": (torch.tensor([[3], [0], [2], [-1]]), packed)},
        "no range": {"segment_ids": (one, torn)},
    }  # fmt: skip


RAGGED = ragged_cases()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", RAGGED)
def test_ranges_of_keys_by_sequence(name: str, dtype: torch.dtype) -> None:
    """The error rule for results and gradients, and the bits of a sequence alone."""
    torch.manual_seed(0)
    options = RAGGED[name]
    tensors = [torch.randn(4, heads, n, 16).to(dtype) for heads, n in ((4, 1), (2, 40), (2, 40))]
    dout, dlse = torch.randn(4, 4, 1, 16).to(dtype), torch.randn(4, 4, 1)

    def results(attention: Callable[..., Any], to: torch.dtype) -> dict[str, Tensor]:
        leaves = [t.to(to).requires_grad_() for t in tensors]
        out, lse = attention(*leaves, **options, return_lse=True)
        upstream = torch.where(lse.isinf(), 0.0, dlse.to(lse.dtype))
        grads = torch.autograd.grad((out, lse), leaves, (dout.to(out.dtype), upstream))
        return {"out": out.detach(), "lse": lse.detach(), **dict(zip(("dq", "dk", "dv"), grads))}

    actual = results(partial(fastattn.attention, backend="torch"), dtype)
    golden = results(reference.attention, torch.float64)
    assert_each_within_rule(actual, lambda: results(reference.attention, dtype), golden, name, dtype)
    for b in range(4):
        mine = slice(b, b + 1)
        own = {
            key: tuple(t[mine] for t in value) if isinstance(value, tuple) and key == "segment_ids" else
            value[mine] if key == "key_lengths" else value
            for key, value in options.items()
        }  # fmt: skip
        out, lse = fastattn.attention(*(t[mine] for t in tensors), **own, return_lse=True, backend="torch")
        assert torch.equal(out, actual["out"][mine])
        assert torch.equal(lse, actual["lse"][mine])


def test_what_a_query_sees_as_a_range() -> None:
    tensors = [torch.randn(4, 2, n, 16) for n in (1, 40, 40)]
    found = {
        name: ragged_query.ranges(AttentionCall(*arguments.call_arguments(*tensors, **{**options, "sinks": None})))
        for name, options in RAGGED.items()
    }  # fmt: skip
    assert found == {
        "lengths": [(0, 40), (0, 0), (0, 17), (0, 40)],
        "lengths, causal window": [(9, 40), (0, 0), (9, 17), (9, 40)],
        "top left": [(0, 1), (0, 0), (0, 1), (0, 1)],
        "left padding": [(0, 40), (5, 40), (39, 40), (0, 0)],
        "left padding, window": [(30, 40), (30, 40), (39, 40), (0, 0)],
        "left padding, lengths, sinks": [(0, 40), (0, 0), (0, 0), (0, 0)],
        "documents": [(30, 40), (0, 40), (24, 32), (0, 0)],
        "no range": [None, (0, 10), (0, 10), (0, 10)],
    }
