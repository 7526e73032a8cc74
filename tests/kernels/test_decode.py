"""Attention against a cache on the Triton backend: small tiles, so that blocks, pages and splits end everywhere."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import pytest
import torch
from attention_cases import DEVICE, SMALL_TILE, UNEVEN_TILE, Maker
from decode_cases import Case, Inputs, check, everything, rotary, run, slopes
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kv_caches import Options, rotary_tables
from torch.library import opcheck

import fastattn
from fastattn.kernels import decode_tiles
from fastattn.spec import KVCacheCall
from numerics import assert_within_rule

pytestmark = pytest.mark.filterwarnings("ignore:divide by zero encountered in log2", "ignore:All-NaN slice")
EXAMPLES = int(os.environ.get("FASTATTN_TEST_EXAMPLES", "0"))

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


@pytest.mark.parametrize("num_splits", [1, 2, 3, 4])
def test_splits_in_float32(num_splits: int) -> None:
    sizes: dict[str, Any] = {"new": 3, "lengths": (0, 1, 61), "capacity": 64, "dtype": torch.float32}
    check(Case("agree", num_splits=num_splits, **sizes))


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


@pytest.mark.parametrize("sinks", [False, True], ids=["plain", "sinks"])
@pytest.mark.parametrize("kind", ["dense", "paged"])
def test_a_sequence_is_cut_by_its_own_keys_alone(
    kind: str, sinks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel's own splits: neighbours of other lengths and more room in the cache change no bit."""
    monkeypatch.setattr(decode_tiles, "SPLIT_KEYS", {64: 2 * SMALL_TILE.block_n})
    decode_tiles.splits_for.cache_clear()
    options = (lambda make: {"sinks": make.normal(2)}) if sinks else (lambda make: {})
    lengths = (5, 61, 0, 30)
    case = Case("cut", options, new=1, lengths=lengths, capacity=64, kind=kind, num_splits=None)
    check(case)
    whole = Inputs.of(case).call()
    results = run(whole)
    for b, length in enumerate(lengths):
        fresh, one = Inputs.of(case).call(), slice(b, b + 1)
        mine = {name: getattr(fresh, name)[one] for name in ("query", "key", "value", "cache_lengths")}
        room = -(-(length + 1) // 8) * 8
        if kind == "paged":
            mine["block_table"] = fresh.block_table[one, : room // 8]
        else:
            mine |= {name: getattr(fresh, name)[one, :, :room] for name in ("k_cache", "v_cache")}
        for alone, together in zip(run(replace(fresh, **mine)), results):
            assert torch.equal(alone, together[one])
    decode_tiles.splits_for.cache_clear()
