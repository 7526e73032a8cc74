"""What attention against a cache reads and writes, and where: new tokens, pages, strides, offsets beyond 32 bits."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from attention_cases import DEVICE
from decode_cases import Case, Inputs, rotary, run
from torch import Tensor

import fastattn
from fastattn.spec import KVCacheCall
from numerics import assert_within_rule

pytestmark = pytest.mark.filterwarnings("ignore:divide by zero encountered in log2", "ignore:All-NaN slice")
NAN = float("nan")


def written(inputs: Inputs) -> tuple[list[Tensor], list[Tensor]]:
    """The caches as the kernel leaves them, and as they should be: old ones with the new tokens put in by hand."""
    k, v = (t.clone() for t in (inputs.call().k_cache, inputs.call().v_cache))
    assert inputs.key is not None
    assert inputs.value is not None
    cache = inputs.cache
    for b, length in enumerate(cache.lengths.tolist()):
        for i in range(inputs.key.shape[2]):
            block, row = b, length + i
            if inputs.case.kind == "paged":
                block, row = int(cache.block_table[b, row // inputs.case.page]), row % inputs.case.page
            k[block, :, row], v[block, :, row] = inputs.key[b, :, i], inputs.value[b, :, i]
    call = inputs.call()
    run(call)
    return [call.k_cache, call.v_cache], [k, v]


@pytest.mark.parametrize("kind", ["dense", "paged"])
@pytest.mark.parametrize("new", [1, 33])
def test_new_tokens_land_where_they_should_and_nowhere_else(new: int, kind: str) -> None:
    """To the last slot of the cache, over more tokens than a program of the append takes, and not in spare pages."""
    lengths = (0, 3, 40 - new) if new == 1 else (3, 40 - new)
    case = Case("append", new=new, lengths=lengths, kv_heads=2, group=1, kind=kind, page=3, head_dim=20)
    for actual, wanted in zip(*written(Inputs.of(case))):
        assert torch.equal(actual.view(torch.int16), wanted.view(torch.int16))  # NaN as well


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotated_keys_are_rounded_once(interleaved: bool) -> None:
    inputs = Inputs.of(Case("append", rotary(5, rotary_interleaved=interleaved), new=5, lengths=(0, 30)))
    other = Inputs.of(inputs.case)
    run(inputs.call())
    fastattn.attention_kv_cache(
        other.query, **other.cache.call("dense"), key=other.key, value=other.value, **other.options, backend="torch"
    )  # fmt: skip
    torch.testing.assert_close(inputs.cache.k, other.cache.k, rtol=2**-10, atol=1e-4, equal_nan=True)
    assert torch.equal(inputs.cache.k[..., 10:].nan_to_num(), other.cache.k[..., 10:].nan_to_num())


def test_what_a_full_cache_cannot_take_is_not_written() -> None:
    """Lengths on a GPU are not looked at; a token past the end must not land in the next sequence's memory."""
    inputs = Inputs.of(Case("full", new=2, lengths=(3, 30)))
    before = inputs.cache.k.clone()
    call = inputs.call(cache_lengths=torch.tensor([39, 30], dtype=torch.int32, device=DEVICE))
    run(call)
    before[0, :, 39], before[1, :, 30:32] = inputs.key[0, :, 0], inputs.key[1]
    assert torch.equal(call.k_cache.view(torch.int16), before.view(torch.int16))


@pytest.mark.parametrize("kind", ["dense", "paged"])
def test_blocks_outside_the_window_are_never_loaded(kind: str) -> None:
    """Queries 60 and 61 see keys from 54 on, of the blocks that begin at 48; NaN before would reach the results."""
    case = Case(
        "window", lambda make: {"window": (6, 0)}, new=2, lengths=(60,), capacity=64, kind=kind, page=16
    )
    clean, poisoned = Inputs.of(case), Inputs.of(case)
    for cache in (poisoned.cache.k, poisoned.cache.v):
        cache[:, :, :48] = NAN
    for cache in poisoned.cache.paged:
        cache[poisoned.cache.block_table[0, :3].long()] = NAN
    for a, b in zip(run(clean.call()), run(poisoned.call())):
        assert torch.equal(a, b)


def test_splits_without_keys_are_never_read() -> None:
    """Their outputs are not written: whatever the memory held, here NaN, must not count."""
    inputs = Inputs.of(Case("empty splits", append=False, lengths=(0, 5, 33), num_splits=3))
    wanted = run(inputs.call())
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN
    try:
        assert inputs.query.new_empty(1).isnan()
        actual = run(inputs.call())
    finally:
        torch.use_deterministic_algorithms(False)
    for a, b in zip(actual, wanted):
        assert torch.equal(a, b)


def test_sequences_share_pages() -> None:
    """Two continuations of one prompt, whose pages are there once."""
    inputs = Inputs.of(Case("shared", kind="paged", page=8, lengths=(24, 24)))
    cache = inputs.cache
    cache.block_table[1, :3] = cache.block_table[0, :3]
    golden, plain = inputs.expected(torch.float64), inputs.expected(torch.float16)
    for a, p, g in zip(run(inputs.call()), plain, golden):
        assert_within_rule(a, p, g)


def strided(tensor: Tensor, kind: str) -> Tensor:
    """A copy of a cache that lies in memory otherwise."""
    if kind == "rows first":
        return tensor.transpose(1, 2).contiguous().transpose(1, 2)
    if kind == "part of a larger one":
        return torch.cat([tensor, tensor], dim=3)[..., : tensor.shape[3]]
    if kind == "unaligned":
        return torch.nn.functional.pad(tensor, (0, 1))[..., :-1]
    return tensor.mT.contiguous().mT  # "columns first"


@pytest.mark.parametrize("layout", ["rows first", "part of a larger one", "unaligned", "columns first"])
@pytest.mark.parametrize("kind", ["dense", "paged"])
def test_any_strides(kind: str, layout: str) -> None:
    inputs = Inputs.of(Case("strides", rotary(8), new=2, lengths=(1, 30), kv_heads=2, kind=kind, page=16))
    whole = inputs.call()
    k_cache, v_cache = (strided(t, layout) for t in (whole.k_cache, whole.v_cache))
    query = whole.query.transpose(1, 2).contiguous().transpose(1, 2)
    key, value = (t.mT.contiguous().mT for t in (whole.key, whole.value))
    call = replace(whole, query=query, key=key, value=value, k_cache=k_cache, v_cache=v_cache)
    actual, wanted = run(call), run(whole)
    for a, b in zip((*actual, k_cache, v_cache), (*wanted, whole.k_cache, whole.v_cache)):
        assert torch.equal(a.nan_to_num(), b.nan_to_num())
    assert actual[0].stride() == query.stride()


def with_last_page_in_use(call: KVCacheCall) -> KVCacheCall:
    """The same call with its pages moved so that a sequence's last one is the last of all."""
    blocks = call.k_cache.shape[0]
    shift = blocks - 1 - int(call.block_table[0, -1])
    k_cache, v_cache = (cache.roll(shift, 0) for cache in (call.k_cache, call.v_cache))
    return replace(call, k_cache=k_cache, v_cache=v_cache, block_table=(call.block_table + shift) % blocks)


@pytest.mark.parametrize("far", ["rows", "rows of one block", "heads", "pages", "pages smaller than blocks"])
def test_offsets_beyond_32_bits(far: str) -> None:
    """The last row, head or page lies 2**31 elements and more after the first; only what is in use is touched."""
    kind, page = "paged" if far.startswith("pages") else "dense", 16 if far == "pages" else 8
    capacity = 16 if far == "rows of one block" else 3 * page
    case = Case("far", new=2, lengths=(capacity - 2,), capacity=capacity, kv_heads=2, kind=kind, page=page)
    near = Inputs.of(case).call()
    if kind == "paged":
        near = with_last_page_in_use(near)
    blocks, heads, rows, dim = near.k_cache.shape
    span = 2**31 + 2**20
    apart = {count: -(-(2**31 + 2**12) // (8 * count)) * 8 for count in (rows - 1, max(blocks - 1, 1))}
    strides = (span, dim, apart[rows - 1], 1)
    if far == "heads":
        strides = (span, 2**31, dim, 1)
    elif kind == "paged":
        strides = (apart[blocks - 1], rows * dim, dim, 1)
    storage = torch.empty(span, dtype=torch.float16, device=DEVICE)
    spread = []
    for index, cache in enumerate((near.k_cache, near.v_cache)):
        view = storage.as_strided(cache.shape, strides, storage_offset=index * heads * rows * dim)
        view.copy_(cache)
        spread.append(view)
    call = replace(near, k_cache=spread[0], v_cache=spread[1])
    for a, b in zip((*run(call), *spread), (*run(near), near.k_cache, near.v_cache)):
        assert torch.equal(a.nan_to_num(), b.nan_to_num())
