"""Attention against a cache on the Triton backend: small tiles, so that blocks, pages and splits end everywhere."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from attention_cases import DEVICE, Maker
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kv_caches import Cache, Options, expected, rotary_tables
from torch import Tensor
from torch.library import opcheck

import fastattn
from fastattn.backends import triton as backend
from fastattn.kernels.tiles import Tile
from fastattn.ops.kv_cache import _call_arguments
from fastattn.spec import AttentionSpec, KVCacheCall
from numerics import assert_within_rule

pytestmark = pytest.mark.filterwarnings("ignore:divide by zero encountered in log2", "ignore:All-NaN slice")
SMALL_TILE, UNEVEN_TILE = Tile(16, 16, 4, 1), Tile(16, 32, 4, 2)
EXAMPLES = int(os.environ.get("FASTATTN_TEST_EXAMPLES", "0"))
NAN = float("nan")
DEFAULTS: Options = {
    "block_table": None,
    "rotary_cos": None,
    "rotary_sin": None,
    "rotary_interleaved": False,
    "alibi_slopes": None,
    "sinks": None,
    "causal": True,
    "window": None,
    "softcap": None,
    "scale": None,
}


@dataclass(frozen=True)
class Case:
    """One call: its shapes, its cache, and its options, a function of a tensor maker."""

    name: str
    options: Any = field(default=lambda make: {})
    lengths: tuple[int, ...] = (0, 37)  # before the append
    new: int = 1  # queries, and tokens appended
    append: bool = True
    kind: str = "dense"
    page: int = 8
    capacity: int = 40
    kv_heads: int = 1
    group: int = 2
    head_dim: int = 16
    value_dim: int = 16
    num_splits: int | None = 2
    dtype: torch.dtype = torch.float16
    tile: Tile = SMALL_TILE

    def __str__(self) -> str:
        return self.name


@dataclass
class Inputs:
    """The tensors of a case."""

    case: Case
    cache: Cache
    query: Tensor
    key: Tensor | None
    value: Tensor | None
    options: Options

    @classmethod
    def of(cls, case: Case, seed: int = 0) -> Inputs:
        """Fresh inputs of a case; the cache's are always the same."""
        make, batch = Maker(seed), len(case.lengths)
        cache = Cache(
            list(case.lengths), case.dtype, kv_heads=case.kv_heads, head_dim=case.head_dim,
            value_dim=case.value_dim, capacity=case.capacity, page=case.page, spare=3, device=DEVICE,
        )  # fmt: skip
        query, key, value = (
            make.normal(batch, heads, case.new, dim, dtype=case.dtype)
            for heads, dim in (
                (case.kv_heads * case.group, case.head_dim),
                (case.kv_heads, case.head_dim),
                (case.kv_heads, case.value_dim),
            )
        )
        new = (key, value) if case.append else (None, None)
        return cls(case, cache, query, *new, case.options(make))

    def call(self, **changes: Any) -> KVCacheCall:
        """The normalised call a backend gets."""
        args = _call_arguments(
            self.query, key=self.key, value=self.value, num_splits=self.case.num_splits,
            **{**DEFAULTS, **self.cache.call(self.case.kind), **self.options},
        )  # fmt: skip
        return replace(KVCacheCall(*args), **changes)

    def expected(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The reference's results."""
        return expected(self.cache, self.case.kind, self.query, self.key, self.value, dtype, **self.options)


def run(call: KVCacheCall, tile: Tile | None = SMALL_TILE) -> tuple[Tensor, Tensor]:
    """(out, lse) of the Triton backend."""
    spec = AttentionSpec.of(call.attending(call.query, call.k_cache, call.v_cache, call.alibi_slopes))
    assert backend.why_not(spec) is None
    return backend.kv_cache_fwd(spec, call, tile)


def check(case: Case, **changes: Any) -> tuple[Tensor, Tensor]:
    """Hold the results of a case to the error rule."""
    inputs = Inputs.of(case)
    golden, plain = inputs.expected(torch.float64), inputs.expected(case.dtype)
    actual = run(inputs.call(**changes), case.tile)
    for a, p, g, result in zip(actual, plain, golden, ("out", "lse")):
        assert_within_rule(a, p, g, f"{case}: {result}", case.dtype)
    return actual


def slopes(make: Maker, *shape: int) -> Options:
    return {"alibi_slopes": make.normal(*shape).abs()}


def rotary(half: int, **more: Any) -> Any:
    return lambda make: {n: t.to(DEVICE) for n, t in rotary_tables(40, half).items()} | more


def everything(make: Maker) -> Options:
    return {
        **rotary(6)(make),
        **slopes(make, 2, 4),
        "sinks": make.normal(4),
        "softcap": 3.0,
        "window": (11, None),
    }


CASES = (
    Case("one token"),
    Case("one token, nothing appended", append=False, lengths=(1, 40)),
    Case("an empty cache", append=False, lengths=(0, 0)),
    Case("an empty cache with sinks", lambda make: {"sinks": make.normal(2)}, append=False, lengths=(0, 17)),
    Case("sinks and one split", lambda make: {"sinks": make.normal(2)}, num_splits=1),
    Case("sinks and many splits", lambda make: {"sinks": make.normal(2)}, num_splits=7),
    Case("a chunk", new=7, lengths=(0, 33), group=3, num_splits=3),
    Case("a chunk of several tiles", new=21, lengths=(0, 19), kv_heads=2),
    Case("a chunk, one split", new=21, lengths=(0, 19), num_splits=1),
    Case("a chunk longer than the past", append=False, new=21, lengths=(5, 30)),
    Case("all keys", lambda make: {"causal": False}, new=3, lengths=(12, 37)),
    Case("top left", lambda make: {"causal": "top_left"}, new=20, lengths=(0, 13), append=True),
    Case("window", lambda make: {"window": (18, 0)}, new=5, lengths=(2, 35)),
    Case("window on both sides", lambda make: {"window": (9, 2), "causal": False}, new=9, lengths=(4, 31)),
    Case("window of one key", lambda make: {"window": (0, 0)}, lengths=(0, 39)),
    Case("softcap", lambda make: {"softcap": 1.5}, new=3, lengths=(2, 20)),
    Case("scale below zero", lambda make: {"scale": -0.4}),
    Case("slopes", lambda make: slopes(make, 4), group=4, new=3, lengths=(2, 20)),
    Case("slopes per sequence", lambda make: slopes(make, 2, 4), kv_heads=2),
    Case("rotary", rotary(8), new=4, lengths=(0, 30)),
    Case("rotary on some columns", rotary(3), lengths=(0, 30), num_splits=1),
    Case("rotary interleaved", rotary(8, rotary_interleaved=True), lengths=(0, 30)),
    Case("rotary interleaved on some columns", rotary(5, rotary_interleaved=True), new=2, lengths=(1, 30)),
    Case("rotary without an append", rotary(8), append=False, lengths=(3, 30)),
    Case("pages that are blocks", kind="paged", page=16),
    Case("pages of several blocks", kind="paged", page=32, new=5, lengths=(0, 35)),
    Case("pages smaller than blocks", kind="paged", page=8, new=5, lengths=(0, 35)),
    Case("pages across blocks", kind="paged", page=12, new=5, lengths=(3, 35)),
    Case("pages of three", kind="paged", page=3, lengths=(2, 35)),
    Case("pages of one", kind="paged", page=1, lengths=(0, 20)),
    Case("pages and a window", lambda make: {"window": (5, 0)}, kind="paged", page=16, lengths=(2, 39)),
    Case("pages and everything", everything, kind="paged", page=3, new=3, lengths=(1, 30), kv_heads=2),
    Case("everything", everything, new=3, lengths=(1, 30), kv_heads=2, num_splits=1),
    Case("head dim 1", head_dim=1, value_dim=1),
    Case("wider values", value_dim=24, kind="paged"),
    Case("narrower values", head_dim=20, value_dim=7),
    Case("head dim 256", head_dim=256, value_dim=256, lengths=(3, 30)),
    Case("one head each", group=1, kv_heads=3),
    Case("more heads than rows", group=17, new=2, lengths=(4, 30)),
    Case("bfloat16", rotary(8), dtype=torch.bfloat16, new=2, lengths=(1, 30)),
    Case("float32", rotary(8), dtype=torch.float32, new=2, lengths=(1, 30), kind="paged"),
    Case("float32 and sinks", lambda make: {"sinks": make.normal(4)}, dtype=torch.float32, kv_heads=2),
    Case("uneven tile", new=9, lengths=(4, 31), tile=UNEVEN_TILE, kind="paged", page=16),
)  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_error_rule(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("kind", ["dense", "paged"])
@pytest.mark.parametrize("num_splits", [1, 2, 3, 7, 1000])
def test_any_number_of_splits(num_splits: int, kind: str) -> None:
    """Empty, one token, part of a block, full: 1000 splits are more than there are blocks of any of them."""
    case = Case(
        "splits", lambda make: {"sinks": make.normal(2)}, append=False, lengths=(0, 1, 70, 100), capacity=100,
        kind=kind, num_splits=num_splits,
    )  # fmt: skip
    check(case)


def test_splits_agree() -> None:
    """Within the rounding of float32."""
    inputs = Inputs.of(Case("agree", new=3, lengths=(0, 1, 61), capacity=64, dtype=torch.float32))
    results = [run(inputs.call(num_splits=n)) for n in (1, 2, 3, 4)]
    for out, lse in results[1:]:
        torch.testing.assert_close(out, results[0][0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(lse, results[0][1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["dense", "paged"])
@pytest.mark.parametrize("num_splits", [1, 3])
def test_a_sequence_gives_the_same_bits_alone_and_in_a_batch(num_splits: int, kind: str) -> None:
    case = Case("batch", new=2, lengths=(5, 61, 0), capacity=64, kind=kind, num_splits=num_splits)
    together, again = Inputs.of(case), Inputs.of(case)
    results = run(together.call())
    for first, second in zip(results, run(again.call())):
        assert torch.equal(first, second)
    for b in range(3):
        whole = Inputs.of(case).call()
        one = slice(b, b + 1)
        of_sequence = {name: getattr(whole, name)[one] for name in ("query", "key", "value", "cache_lengths")}
        if kind == "paged":
            of_sequence["block_table"] = whole.block_table[one]
        else:
            of_sequence |= {"k_cache": whole.k_cache[one], "v_cache": whole.v_cache[one]}
        for alone, all_of_them in zip(run(replace(whole, **of_sequence)), results):
            assert torch.equal(alone, all_of_them[one])


@pytest.mark.parametrize("page", [1, 3, 16, 40])
def test_pages_give_the_bits_of_a_dense_cache(page: int) -> None:
    case = Case("pages", rotary(8), new=3, lengths=(0, 37), page=page, num_splits=3)
    dense, paged = (run(Inputs.of(replace(case, kind=kind)).call()) for kind in ("dense", "paged"))
    for a, b in zip(dense, paged):
        assert torch.equal(a, b)


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
    call = inputs.call(cache_lengths=torch.tensor([39, 30], dtype=torch.int32, device=DEVICE))
    run(call)
    assert torch.equal(call.k_cache[0, :, 39], inputs.key[0, :, 0])
    assert call.k_cache[1, :, :1].isfinite().all()
    assert torch.equal(call.k_cache[1, :, 30:32], inputs.key[1])


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


@pytest.mark.parametrize("far", ["rows", "heads", "pages"])
def test_offsets_beyond_32_bits(far: str) -> None:
    """The last row, head or page begins 2**31 elements and more after the first; only what is in use is touched."""
    kind = "paged" if far == "pages" else "dense"
    inputs = Inputs.of(
        Case("far", new=2, lengths=(20,), capacity=24, kv_heads=2, kind=kind, page=8, append=True)
    )
    call, near = Inputs.of(inputs.case).call(), inputs.call()
    blocks, heads, rows, dim = call.k_cache.shape
    span = 2**31 + 2**20
    strides = {
        "rows": (span, dim, span // (rows - 1) - 64, 1),
        "heads": (span, 2**31, dim, 1),
        "pages": (span // max(blocks - 1, 1) - 512, rows * dim, dim, 1),
    }[far]
    storage = torch.empty(span, dtype=torch.float16, device=DEVICE)
    spread = []
    for index, cache in enumerate((call.k_cache, call.v_cache)):
        view = storage.as_strided(cache.shape, strides, storage_offset=index * heads * rows * dim)
        view.copy_(cache)
        spread.append(view)
    call = replace(call, k_cache=spread[0], v_cache=spread[1])
    for a, b in zip((*run(call), *spread), (*run(near), near.k_cache, near.v_cache)):
        assert torch.equal(a.nan_to_num(), b.nan_to_num())


@pytest.mark.parametrize("changes", [{"lengths": ()}, {"new": 0}, {"kv_heads": 1, "capacity": 0, "lengths": (0,),
                                                                   "append": False}], ids=str)  # fmt: skip
def test_nothing_to_do(changes: dict[str, Any]) -> None:
    inputs = Inputs.of(replace(Case("nothing"), **changes))
    out, lse = run(inputs.call())
    assert out.shape == (*inputs.query.shape[:3], 16)
    assert not out.any()
    assert (lse == -torch.inf).all()


def test_tiles_of_users_and_the_heuristic() -> None:
    """The public call, with the tiles and the splits it chooses itself."""
    inputs = Inputs.of(Case("public", everything, new=3, lengths=(1, 90), capacity=100, kv_heads=2))
    inputs.options |= {n: t.to(DEVICE) for n, t in rotary_tables(100, 6).items()}
    golden, plain = inputs.expected(torch.float64), inputs.expected(torch.float16)
    actual = fastattn.attention_kv_cache(
        inputs.query, **inputs.cache.call("dense"), key=inputs.key, value=inputs.value, **inputs.options,
        return_lse=True, backend="triton",
    )  # fmt: skip
    for a, p, g in zip(actual, plain, golden):
        assert_within_rule(a, p, g)


@pytest.mark.skipif(
    DEVICE == "cuda", reason="the caches' contents may not be compared after a mutation there"
)
@pytest.mark.parametrize("kind", ["dense", "paged"])
def test_the_schema_names_what_is_written(kind: str) -> None:
    inputs = Inputs.of(Case("opcheck", rotary(8), lengths=(5, 30), kind=kind))
    for cache in (inputs.cache.k, inputs.cache.v, *inputs.cache.paged):
        cache.nan_to_num_()
    call = inputs.call()
    args = [getattr(call, name) for name in KVCacheCall.__dataclass_fields__]
    checks = ("test_schema", "test_faketensor")
    opcheck(torch.ops.fastattn.kv_cache_fwd.default, (*args, "triton"), test_utils=checks)


CALLS = st.fixed_dictionaries(
    {
        "lengths": st.lists(st.integers(0, 45), min_size=1, max_size=2).map(tuple),
        "new": st.integers(1, 20),
        "append": st.booleans(),
        "kind": st.sampled_from(["dense", "paged"]),
        "page": st.sampled_from([1, 3, 8, 16, 32, 65]),
        "kv_heads": st.integers(1, 2),
        "group": st.integers(1, 3),
        "head_dim": st.sampled_from([8, 16, 24]),
        "value_dim": st.sampled_from([5, 16, 24]),
        "num_splits": st.sampled_from([1, 2, 3, 7]),
        "tile": st.sampled_from([SMALL_TILE, UNEVEN_TILE]),
    }
)
OPTIONS = st.fixed_dictionaries(
    {
        "causal": st.sampled_from([False, True, "top_left"]),
        "window": st.none() | st.tuples(*[st.none() | st.integers(0, 30)] * 2),
        "softcap": st.sampled_from([None, 2.0]),
        "tensors": st.sets(st.sampled_from(["alibi_slopes", "sinks", "rotary", "interleaved"])),
        "half": st.integers(1, 4),
    }
)


@settings(
    max_examples=EXAMPLES or 12,
    derandomize=not EXAMPLES,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@given(CALLS, OPTIONS)
def test_combinations(drawn: dict[str, Any], chosen: dict[str, Any]) -> None:
    heads, batch = drawn["kv_heads"] * drawn["group"], len(drawn["lengths"])
    asked = chosen["tensors"]
    if not drawn["append"] and asked & {"rotary", "interleaved"}:  # queries stand at positions from 0 on
        drawn = {**drawn, "lengths": tuple(max(n, drawn["new"]) for n in drawn["lengths"])}

    def options(make: Maker) -> Options:
        made = {name: chosen[name] for name in ("causal", "window", "softcap")}
        if "alibi_slopes" in asked:
            made |= slopes(make, batch, heads)
        if "sinks" in asked:
            made["sinks"] = make.normal(heads)
        if asked & {"rotary", "interleaved"}:
            tables = rotary_tables(65, chosen["half"])
            made |= {n: t.to(DEVICE) for n, t in tables.items()}
            made["rotary_interleaved"] = "interleaved" in asked
        return made

    check(Case("drawn", options, capacity=65, **drawn))
