"""In attention against a cache, a sequence's bits depend on that sequence alone: not on batch, cache, pages or device.

Splits are made short here, of one block of keys at first, so that a few hundred keys have several sizes of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from attention_cases import DEVICE, Maker
from decode_cases import Case, Inputs, run, slopes
from kv_caches import Options, rotary_tables
from torch import Tensor

import fastattn
from fastattn.backends.triton import kv_cache as triton_kv_cache
from fastattn.kernels import decode_tiles
from fastattn.spec import KVCacheCall
from numerics import assert_within_rule

pytestmark = pytest.mark.filterwarnings("ignore:divide by zero encountered in log2", "ignore:All-NaN slice")

LENGTHS = (213, 0, 61, 130)  # before the append
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
Results = tuple[Tensor, ...]


@pytest.fixture
def short_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two splits of 64 keys, two of 128, two of 256: of one block of the tables' tiles for 16 bits."""
    monkeypatch.setattr(decode_tiles, "FEWEST_SPLIT_KEYS", 64)
    monkeypatch.setattr(decode_tiles, "SPLIT_KEYS_PER_ROW", 1)
    monkeypatch.setattr(decode_tiles, "SPLITS_OF_A_SIZE", 2)


def of_sequences(inputs: Inputs, order: list[int], capacity: int, page: int = 0) -> KVCacheCall:
    """The call of some sequences of a dense cache, in a cache of another capacity, in shuffled pages of it or dense."""
    whole = inputs.call()
    k, v = (torch.full((len(order), t.shape[1], capacity, t.shape[3]), torch.nan, dtype=t.dtype, device=t.device)
            for t in (whole.k_cache, whole.v_cache))  # fmt: skip
    kept = min(capacity, whole.capacity)
    for cache, old in ((k, whole.k_cache), (v, whole.v_cache)):
        cache[:, :, :kept] = old[order, :, :kept]
    options: dict[str, Any] = {"block_table": None}
    if page:
        pages = capacity // page
        shuffled = torch.randperm(len(order) * pages, generator=torch.Generator().manual_seed(3)).to(DEVICE)
        places = shuffled.argsort()
        k, v = (
            t.unflatten(2, (pages, page)).transpose(1, 2).flatten(0, 1)[shuffled].contiguous() for t in (k, v)
        )
        options["block_table"] = places.view(len(order), pages).int()
    for name in ("query", "key", "value", "cache_lengths", "alibi_slopes"):
        tensor = getattr(whole, name)
        options[name] = tensor if tensor is None or tensor.shape[0] == 1 else tensor[order].clone()
    return replace(whole, k_cache=k, v_cache=v, **options)


def others(inputs: Inputs) -> Iterator[tuple[list[int], KVCacheCall]]:
    """Each sequence alone in a cache that it fills, some in other orders, in larger caches and in pages."""
    lengths, new = inputs.case.lengths, inputs.case.new
    for b, length in enumerate(lengths):
        yield [b], of_sequences(inputs, [b], length + new)
    yield [3, 0], of_sequences(inputs, [3, 0], 320, page=20)
    yield [1, 2, 0], of_sequences(inputs, [1, 2, 0], 1024, page=64)


def assert_same_bits(inputs: Inputs, results: Results) -> None:
    """That sequences give the same bits in other calls."""
    for order, call in others(inputs):
        for other, whole in zip(run(call, inputs.case.tile), results):
            for row, b in enumerate(order):
                assert torch.equal(other[row], whole[b]), (order, b)


def assert_right(inputs: Inputs, results: Results) -> None:
    """The error rule, on fresh inputs of the same case."""
    fresh, dtype = Inputs.of(inputs.case), inputs.case.dtype
    golden, plain = fresh.expected(torch.float64), fresh.expected(dtype)
    for a, p, g in zip(results, plain, golden):
        assert_within_rule(a, p, g, str(inputs.case), dtype)


def both(make: Maker) -> Options:
    """Slopes of each sequence's own, a window and sinks, for four sequences of four heads."""
    return {**slopes(make, 4, 4), "sinks": make.normal(4), "window": (150, 0)}


def long_rotary(make: Maker) -> Options:
    return {name: table.to(DEVICE) for name, table in rotary_tables(400, 8).items()}


KINDS = [
    Case(f"{str(dtype)[6:]}, D{dim}, {group} heads", dtype=dtype, head_dim=dim, value_dim=dim, group=group)
    for i, dtype in enumerate(DTYPES)
    for j, group in enumerate((1, 2, 8))
    for dim in ((64, 128)[(i + j) % 2],)
]
KINDS += [
    Case("sinks", lambda make: {"sinks": make.normal(2)}),
    Case("an infinite sink", lambda make: {"sinks": torch.tensor([torch.inf, -torch.inf], device=DEVICE)}),
    Case("window, slopes and sinks", both, kv_heads=2),
    Case("window of one block", lambda make: {"window": (40, 0)}),
    Case("rotary and softcap", lambda make: {**long_rotary(make), "softcap": 2.0}),
    Case("some queries", new=5, group=4),
    Case("a chunk of one tile", new=16, group=4, kv_heads=2),
    Case("a chunk of several tiles", new=40, group=4),
]


@pytest.mark.parametrize("case", KINDS, ids=str)
@pytest.mark.usefixtures("short_splits")
def test_a_sequence_gives_the_same_bits_alone_and_in_any_batch(case: Case) -> None:
    case = replace(case, lengths=LENGTHS, capacity=260, num_splits=None, tile=None)
    inputs = Inputs.of(case)
    results = run(inputs.call(), None)
    assert_same_bits(Inputs.of(case), results)
    if "infinite" not in case.name:
        assert_right(inputs, results)
    else:
        assert not results[0][:, 0].any()
        assert (results[1][:, 0] == torch.inf).all()


def test_splits_as_they_are() -> None:
    """More than 16 of 256 keys, so that the last ones have twice as many."""
    case = Case("long", lengths=(4700, 256, 300), capacity=4800, num_splits=None, tile=None)
    inputs = Inputs.of(case)
    results = run(inputs.call(), None)
    assert_right(inputs, results)
    for b, length in enumerate(case.lengths):
        alone = run(of_sequences(Inputs.of(case), [b], length + 1), None)
        assert all(torch.equal(one[0], whole[b]) for one, whole in zip(alone, results))


@pytest.mark.parametrize("programs", [1, 2, 3, 100])
@pytest.mark.usefixtures("short_splits")
def test_the_number_of_programs_changes_no_bit(programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("programs", both, lengths=LENGTHS, capacity=260, kv_heads=2, num_splits=None)
    wanted = run(Inputs.of(case).call(), None)
    asked: list[int] = []

    def fixed(several: bool, tiles: int, count: int, *sizes: int) -> int:
        asked.append(min(programs, count))
        return asked[-1]

    monkeypatch.setattr(decode_tiles, "programs_for", fixed)
    for a, b in zip(run(Inputs.of(case).call(), None), wanted):
        assert torch.equal(a, b)
    assert len(asked) == 1


@pytest.mark.parametrize(("pieces", "heads"), [(2, 8), (4, 2), (12, 1)])
@pytest.mark.parametrize("kind", ["dense", "paged"])
@pytest.mark.usefixtures("short_splits")
def test_a_small_workspace_changes_no_bit(
    pieces: int, heads: int, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four sequences of three key heads at a time, two of one sequence's, one."""

    def options(make: Maker) -> Options:
        return {**slopes(make, 4, 6), "sinks": make.normal(6)}

    case = Case(
        "pieces", options, lengths=LENGTHS, capacity=272, page=16, kv_heads=3, kind=kind, num_splits=None
    )
    wanted = run(Inputs.of(case).call(), None)
    made: list[tuple[int, int]] = []
    attend = triton_kv_cache._attend_in_splits

    def counted(spec: Any, call: KVCacheCall, splits: decode_tiles.Splits, *rest: Any) -> None:
        made.append((call.query.shape[0], call.query.shape[1]))
        attend(spec, call, splits, *rest)

    count = 4  # of 272 keys: 64, 64, 128, 16
    monkeypatch.setattr(decode_tiles, "WORKSPACE_BYTES", heads * 4 * count * 2 * (case.value_dim + 1))
    monkeypatch.setattr(triton_kv_cache, "_attend_in_splits", counted)
    for a, b in zip(run(Inputs.of(case).call(), None), wanted):
        assert torch.equal(a, b)
    if heads == 2:
        pieces *= 2  # two key heads, then the third
    assert len(made) == pieces
    assert sum(batch * query_heads for batch, query_heads in made) == 4 * 6


def test_pieces_cover_every_sequence_and_head_once() -> None:
    for batch, heads, at_once in ((5, 3, 7), (5, 3, 2), (1, 8, 100), (4, 1, 0), (0, 3, 5), (3, 4, 4)):
        seen = torch.zeros(batch, heads)
        for sequences, some_heads in triton_kv_cache.batch_pieces(batch, heads, at_once):
            part = seen[sequences, some_heads]
            assert 0 < part.numel() <= max(1, at_once)
            part += 1
        assert (seen == 1).all()


@pytest.mark.usefixtures("short_splits")
def test_padded_calls_with_one_query() -> None:
    """What a sequence is padded to changes no bit."""
    make = Maker()
    query, key, value = (make.normal(3, heads, n, 16) for heads, n in ((4, 1), (2, 300), (2, 300)))
    lengths = torch.tensor([300, 47, 210], device=DEVICE)
    whole = fastattn.attention(query, key, value, key_lengths=lengths, backend="triton")
    for b, length in enumerate(lengths.tolist()):
        one = slice(b, b + 1)
        alone = fastattn.attention(query[one], key[one, :, :length], value[one, :, :length], backend="triton")
        padded = fastattn.attention(
            query[one], key[one, :, : length + 1], value[one, :, : length + 1], key_lengths=lengths[one],
            backend="triton",
        ) if length < 300 else alone  # fmt: skip
        assert torch.equal(alone[0], whole[b])
        assert torch.equal(padded[0], whole[b])
