"""`attention_kv_cache`: decoding and chunked prefill, dense and paged, against the padded call's reference."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from kv_caches import Cache, expected, rotary_tables
from torch import Tensor
from torch.library import opcheck

import fastattn
from fastattn.integrations.flash_attn import flash_attn_with_kvcache
from fastattn.ops.kv_cache import call_arguments
from numerics import assert_within_rule, plain_in_any_order

BATCH, HEADS, KV_HEADS, DIM, VALUE_DIM, CAPACITY = 3, 4, 2, 16, 16, 40  # of Cache's own defaults

ROTARY = rotary_tables(CAPACITY, 6)
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "not causal": {"causal": False},
    "window": {"window": (6, 0)},
    "softcap and scale": {"softcap": 2.0, "scale": 0.3},
    "slopes": {"alibi_slopes": torch.rand(HEADS)},
    "slopes per sequence": {"alibi_slopes": torch.rand(BATCH, HEADS)},
    "sinks": {"sinks": torch.randn(HEADS)},
    "rotary": ROTARY,
    "rotary interleaved": {**ROTARY, "rotary_interleaved": True},
}


@pytest.mark.parametrize("lengths", [[5, 0, 31], [9, 9, 9]], ids=["ragged", "equal"])
@pytest.mark.parametrize("new", [1, 6], ids=["decode", "chunk"])
@pytest.mark.parametrize("kind", ["dense", "paged"])
@pytest.mark.parametrize("name", OPTIONS)
def test_append_and_attend(name: str, kind: str, new: int, lengths: list[int]) -> None:
    query = torch.randn(BATCH, HEADS, new, DIM)
    key, value = torch.randn(BATCH, KV_HEADS, new, DIM), torch.randn(BATCH, KV_HEADS, new, VALUE_DIM)
    golden = expected(Cache(lengths), kind, query, key, value, torch.float64, **OPTIONS[name])
    formula = partial(expected, Cache(lengths), kind, query, key, value, torch.float32, **OPTIONS[name])
    plain = plain_in_any_order(formula, golden)
    cache = Cache(lengths)
    actual = fastattn.attention_kv_cache(
        query, **cache.call(kind), key=key, value=value, **OPTIONS[name], return_lse=True
    )
    for a, p, g, result in zip(actual, plain, golden, ("out", "lse")):
        assert_within_rule(a, p, g, f"{name}: {result}")
    assert cache.lengths.tolist() == lengths
    before, (k, v) = Cache(lengths), cache.dense(kind)
    for b, length in enumerate(lengths):
        assert torch.equal(v[b, :, length : length + new], value[b])
        if "rotary_cos" not in OPTIONS[name]:
            assert torch.equal(k[b, :, length : length + new], key[b])
        for old, now in zip(before.dense(kind), (k, v)):
            assert torch.equal(old[b, :, :length], now[b, :, :length])
            assert bool(now[b, :, length + new :].isnan().all())


@pytest.mark.parametrize("kind", ["dense", "paged"])
def test_without_new_keys_nothing_is_written(kind: str) -> None:
    cache = Cache([5, 12, 31])
    before = [t.clone() for t in (*cache.dense(kind),)]
    query = torch.randn(BATCH, HEADS, 3, DIM)
    out, lse = fastattn.attention_kv_cache(query, **cache.call(kind), return_lse=True)
    golden = expected(cache, kind, query, None, None, torch.float64)
    plain = plain_in_any_order(partial(expected, cache, kind, query, None, None, torch.float32), golden)
    for a, p, g in zip((out, lse), plain, golden):
        assert_within_rule(a, p, g)
    for old, now in zip(before, cache.dense(kind)):
        torch.testing.assert_close(old, now, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_and_another_value_dim(dtype: torch.dtype) -> None:
    cache = Cache([5, 12, 31], dtype, value_dim=24)
    query = torch.randn(BATCH, HEADS, 1, DIM).to(dtype)
    key, value = (torch.randn(BATCH, KV_HEADS, 1, dim).to(dtype) for dim in (DIM, 24))
    plain, golden = (
        expected(Cache([5, 12, 31], dtype, value_dim=24), "dense", query, key, value, d)
        for d in (dtype, torch.float64)
    )
    actual = fastattn.attention_kv_cache(query, **cache.call("dense"), key=key, value=value, return_lse=True)
    for a, p, g in zip(actual, plain, golden):
        assert_within_rule(a, p, g, dtype=dtype)


def test_decoding_token_by_token_is_causal_attention() -> None:
    q = torch.randn(BATCH, HEADS, 20, DIM, dtype=torch.float64)
    k, v = (torch.randn(BATCH, KV_HEADS, 20, DIM, dtype=torch.float64) for _ in range(2))
    whole = fastattn.attention(q, k, v, causal=True)
    k_cache, v_cache = (
        torch.full((BATCH, KV_HEADS, 20, DIM), torch.nan, dtype=torch.float64) for _ in range(2)
    )
    steps = []
    for t in range(20):
        now = slice(t, t + 1)
        steps.append(
            fastattn.attention_kv_cache(
                q[:, :, now],
                k_cache,
                v_cache,
                torch.full((BATCH,), t, dtype=torch.int32),
                key=k[:, :, now],
                value=v[:, :, now],
            )
        )
    torch.testing.assert_close(torch.cat(steps, dim=2), whole)


def test_any_strides() -> None:
    """A (B, S, Hkv, D)-backed cache, a slice of a larger one, and one whose last stride is not 1."""
    cache = Cache([5, 12, 31])
    query = torch.randn(BATCH, HEADS, 1, DIM)
    key, value = (torch.randn(BATCH, KV_HEADS, 1, DIM) for _ in range(2))
    expect = fastattn.attention_kv_cache(query, **cache.call("dense"), key=key, value=value)
    for strided in (
        lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
        lambda t: torch.cat([t, t], dim=1)[:, :KV_HEADS],
        lambda t: t.mT.contiguous().mT,
    ):
        fresh = Cache([5, 12, 31])
        k_cache, v_cache = strided(fresh.k), strided(fresh.v)
        out = fastattn.attention_kv_cache(query, k_cache, v_cache, fresh.lengths, key=key, value=value)
        torch.testing.assert_close(out, expect)
        torch.testing.assert_close(k_cache[1, :, 12:13], key[1])


@pytest.mark.parametrize("kind", ["dense", "paged"])
def test_opcheck(kind: str) -> None:
    cache = Cache([5, 0, 31])
    query = torch.randn(BATCH, HEADS, 1, DIM)
    key, value = (torch.randn(BATCH, KV_HEADS, 1, DIM) for _ in range(2))
    arguments = cache.call(kind)
    k_cache, v_cache = (arguments[name].nan_to_num() for name in ("k_cache", "v_cache"))
    args = call_arguments(
        query, k_cache, v_cache, cache.lengths, key, value, arguments.get("block_table"), *ROTARY.values(), None,
        None, False, None, causal=True, window=None, softcap=None, scale=None,
    )  # fmt: skip
    opcheck(torch.ops.fastattn.kv_cache_fwd.default, (*args, "auto"))


def test_compiled_decoding_writes_the_cache_and_does_not_recompile() -> None:
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    step = torch.compile(
        lambda q, k, v, lengths, key, value: fastattn.attention_kv_cache(
            q, k, v, lengths, key=key, value=value
        ),
        fullgraph=True,
        backend=counter,
    )
    cache, eager = Cache([5, 0, 20]), Cache([5, 0, 20])
    for _ in range(3):
        query = torch.randn(BATCH, HEADS, 1, DIM)
        key, value = (torch.randn(BATCH, KV_HEADS, 1, DIM) for _ in range(2))
        out = step(query, cache.k, cache.v, cache.lengths, key, value)
        expect = fastattn.attention_kv_cache(query, eager.k, eager.v, eager.lengths, key=key, value=value)
        torch.testing.assert_close(out, expect)
        torch.testing.assert_close(cache.k, eager.k, equal_nan=True)
        cache.lengths += 1
        eager.lengths += 1
    assert counter.frame_count == 1


C = Cache([5, 0, 31])
QUERY, KEY, VALUE = (torch.zeros(BATCH, heads, 2, DIM) for heads in (HEADS, KV_HEADS, KV_HEADS))
BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "query rank": ({"query": QUERY[0]}, ValueError, "query: got shape .4, 2, 16., needs 4 dimensions"),
    "requires grad": ({"query": QUERY.clone().requires_grad_()}, RuntimeError, "query: requires grad"),
    "sinks require grad": ({"sinks": torch.zeros(HEADS, requires_grad=True)}, RuntimeError, "sinks: requires grad"),
    "key without value": ({"value": None}, ValueError, "value: got None, needs a tensor"),
    "key shape": ({"key": KEY[:, :1]}, ValueError, r"key: got shape \(3, 1, 2, 16\), needs \(3, 2, 2, 16\)"),
    "value shape": ({"value": VALUE[:, :, :1]}, ValueError, r"value: got shape \(3, 2, 1, 16\), needs \(3, 2, 2, 16\)"),
    "key dtype": ({"key": KEY.half()}, TypeError, "key: got torch.float16, needs the cache's torch.float32"),
    "cache dtype": ({"k_cache": C.k.half()}, TypeError, "key: got torch.float16, needs the query's torch.float32"),
    "caches differ": ({"v_cache": C.v[:, :, :9]}, ValueError, "v_cache: got shape .*, needs the k_cache's"),
    "batch": ({"k_cache": C.k[:2], "v_cache": C.v[:2]}, ValueError, "k_cache: got batch size 2, needs the query's 3"),
    "lengths shape": ({"cache_lengths": C.lengths[:2]}, ValueError, r"cache_lengths: got shape \(2,\), needs \(3,\)"),
    "lengths dtype": ({"cache_lengths": C.lengths.float()}, TypeError, "cache_lengths: got torch.float32"),
    "negative length": ({"cache_lengths": C.lengths - 1}, ValueError, "cache_lengths: got values from -1 to 30"),
    "full cache": ({"cache_lengths": C.lengths + 8}, ValueError, "cache_lengths: got values from 8 to 39, needs 0 to"),
    "table rank": ({"block_table": C.lengths}, ValueError, r"block_table: got shape \(3,\), needs \(3, pages\)"),
    "rotary alone": ({"rotary_cos": ROTARY["rotary_cos"]}, ValueError, "rotary_sin: got None"),
    "rotary shape": ({"rotary_cos": torch.zeros(40, 9), "rotary_sin": torch.zeros(40, 9)}, ValueError,
                     r"rotary_cos: got shape \(40, 9\), needs \(positions, 1 to 8\)"),
    "rotary short": ({"rotary_cos": torch.zeros(9, 4), "rotary_sin": torch.zeros(9, 4)}, ValueError,
                     "rotary_cos: got 9 positions, needs positions 0 to 32"),
    "splits": ({"num_splits": 0}, ValueError, "num_splits: got 0, needs a positive integer"),
    "backend": ({"backend": "fast"}, ValueError, "backend: got 'fast'"),
}  # fmt: skip


@pytest.mark.parametrize("change", BAD)
def test_bad_input_is_refused_by_name_and_nothing_is_written(change: str) -> None:
    wrong, error, message = BAD[change]
    before = C.k.clone()
    with pytest.raises(error, match=message):
        fastattn.attention_kv_cache(
            **{"query": QUERY, **C.call("dense"), "key": KEY, "value": VALUE, **wrong}
        )
    torch.testing.assert_close(C.k, before, rtol=0, atol=0, equal_nan=True)


def storage_of(tensor: Tensor) -> Tensor:
    """All memory that a tensor may touch, by value."""
    return torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage()).clone()


def packed(*, dim: int) -> tuple[Tensor, Tensor]:
    """Both caches of one buffer, stacked or interleaved along `dim`."""
    shape = [BATCH, KV_HEADS, CAPACITY, DIM]
    shape.insert(dim, 2)
    k_cache, v_cache = torch.zeros(shape).unbind(dim)
    return k_cache, v_cache


def shared_caches(kind: str) -> dict[str, Tensor]:
    """Arguments of a call in which something that is written shares memory with something else."""
    k, v = (torch.randn(BATCH, KV_HEADS, CAPACITY, DIM) for _ in range(2))
    long = torch.randn(BATCH * KV_HEADS * 2 * CAPACITY * DIM)
    wide = torch.randn(BATCH, KV_HEADS, CAPACITY + 1, DIM)
    shared: dict[str, dict[str, Tensor]] = {
        "k_cache over sequences": {"k_cache": k[:1].expand_as(k)},
        "v_cache over sequences": {"v_cache": v[:1].expand_as(v)},
        "k_cache over heads": {"k_cache": k[:, :1].expand_as(k)},
        "k_cache over tokens": {"k_cache": k[:, :, :1].expand_as(k)},
        "v_cache over dims": {"v_cache": v[..., :1].expand_as(v)},
        "k_cache in windows": {"k_cache": long.as_strided(k.shape, (5 * DIM, CAPACITY * 5 * DIM, DIM, 1))},
        "v_cache rows that overlap": {"v_cache": long.as_strided(k.shape, (*k.stride()[:2], DIM - 1, 1))},
        "v_cache is k_cache": {"v_cache": k},
        "v_cache a view of k_cache": {"v_cache": k.transpose(1, 2).transpose(1, 2)},
        "v_cache one token on": {"k_cache": wide[:, :, :-1], "v_cache": wide[:, :, 1:]},
        "v_cache of the same array": {
            "k_cache": torch.from_numpy(array := k.numpy()), "v_cache": torch.from_numpy(array[:])
        },
        "query in k_cache": {"query": k.flatten()[: QUERY.numel()].view(QUERY.shape)},
        "key in k_cache": {"key": k[:, :, :2]},
        "key in v_cache": {"key": v[:, :, 4:6]},
        "value in k_cache": {"value": k[:, :, 4:6]},
        "value in v_cache": {"value": v[:, :, -2:]},
    }  # fmt: skip
    return {"k_cache": k, "v_cache": v, **shared[kind]}


SHARED = (
    "k_cache over sequences", "v_cache over sequences", "k_cache over heads", "k_cache over tokens",
    "v_cache over dims", "k_cache in windows", "v_cache rows that overlap", "v_cache is k_cache",
    "v_cache a view of k_cache", "v_cache one token on", "v_cache of the same array", "query in k_cache",
    "key in k_cache", "key in v_cache", "value in k_cache", "value in v_cache",
)  # fmt: skip


@pytest.mark.parametrize("error", [ValueError, RuntimeError])
@pytest.mark.parametrize("kind", SHARED)
def test_memory_that_would_be_written_twice_or_read_is_refused(kind: str, error: type[Exception]) -> None:
    arguments = {"query": QUERY, "key": KEY, "value": VALUE, **shared_caches(kind)}
    lengths = torch.tensor([5, 0, 31], dtype=torch.int32)
    before = [storage_of(t) for t in arguments.values()]
    with pytest.raises(error, match=rf"^{kind.split()[0]}: got .*memory.* needs "):
        fastattn.attention_kv_cache(**arguments, cache_lengths=lengths)
    for old, tensor in zip(before, arguments.values()):
        assert torch.equal(old, storage_of(tensor))
    if "cache" in kind.split()[0]:  # without new keys nothing is written
        del arguments["key"], arguments["value"]
        fastattn.attention_kv_cache(**arguments, cache_lengths=lengths)


def test_flash_attns_function_refuses_them_too() -> None:
    """Heads last but one, as it has them; what is only read may be expanded."""
    q, k, v = (t.transpose(1, 2) for t in (QUERY, KEY, VALUE))
    cache = torch.randn(1, CAPACITY, KV_HEADS, DIM).expand(BATCH, -1, -1, -1)
    other = torch.randn(BATCH, CAPACITY, KV_HEADS, DIM)
    before = cache.clone()
    for caches in ((cache, other), (other, cache), (other, other)):
        with pytest.raises(RuntimeError, match=r"^[kv]_cache: got .*memory.* to append"):
            flash_attn_with_kvcache(q, *caches, k, v, cache_seqlens=3)
    assert torch.equal(cache, before)
    flash_attn_with_kvcache(q, cache, cache, cache_seqlens=3)


def test_no_other_op_writes_to_its_arguments() -> None:
    """A new one has to make the same checks."""
    writing = {
        schema.name
        for schema in torch._C._jit_get_all_schemas()
        if schema.name.startswith("fastattn::")
        and any(a.alias_info is not None and a.alias_info.is_write for a in schema.arguments)
    }
    assert writing == {"fastattn::kv_cache_fwd"}


@pytest.mark.parametrize("dim", range(5))
def test_caches_of_one_buffer_are_written_where_they_do_not_share_elements(dim: int) -> None:
    """Stacked (2, ...), interleaved by head, token or element: as two buffers."""
    lengths = torch.tensor([5, 0, 31], dtype=torch.int32)
    query, key, value = (torch.randn(t.shape) for t in (QUERY, KEY, VALUE))
    results = []
    for k_cache, v_cache in (packed(dim=dim), (t.contiguous() for t in packed(dim=0))):
        out = fastattn.attention_kv_cache(query, k_cache, v_cache, lengths, key=key, value=value)
        results.append((out, k_cache, v_cache))
    for one, other in zip(*results):
        assert torch.equal(one, other)


def test_queries_keys_and_values_of_one_projection_are_no_conflict() -> None:
    qkv = torch.randn(BATCH, 2, HEADS + 2 * KV_HEADS, DIM).transpose(1, 2)
    query, key, value = qkv.split([HEADS, KV_HEADS, KV_HEADS], 1)
    fastattn.attention_kv_cache(query, **Cache([5, 0, 31]).call("dense"), key=key, value=value)


def test_compiled_code_refuses_shared_memory_too() -> None:
    step = torch.compile(
        lambda k, v: fastattn.attention_kv_cache(QUERY, k, v, C.lengths, key=KEY, value=VALUE),
        fullgraph=True,
        backend="aot_eager",
    )
    k_cache = torch.zeros(1, KV_HEADS, CAPACITY, DIM)
    before = k_cache.clone()
    with pytest.raises(RuntimeError):
        step(k_cache.expand(BATCH, -1, -1, -1), torch.zeros(BATCH, KV_HEADS, CAPACITY, DIM))
    assert torch.equal(k_cache, before)


@pytest.mark.parametrize("other", ["appended to", "full"])
def test_a_page_that_is_appended_to_belongs_to_one_sequence(other: str) -> None:
    """Shared pages are read; one that a sequence appends to must not be another's, in part or whole."""
    cache = Cache([5, 3 if other == "appended to" else 20, 31])
    arguments = cache.call("paged")
    arguments["block_table"][1, 0] = arguments["block_table"][0, 0]
    before = [t.clone() for t in cache.paged]
    with pytest.raises(ValueError, match=r"^block_table: got page \d+ in several places, needs it in one"):
        fastattn.attention_kv_cache(QUERY, **arguments, key=KEY, value=VALUE)
    for old, now in zip(before, cache.paged):
        torch.testing.assert_close(old, now, rtol=0, atol=0, equal_nan=True)
    fastattn.attention_kv_cache(QUERY, **arguments)


def test_sequences_may_share_pages_that_are_full() -> None:
    cache = Cache([9, 20, 31])
    arguments = cache.call("paged")
    arguments["block_table"][1:, 0] = arguments["block_table"][0, 0]
    arguments["block_table"][:2, -1] = arguments["block_table"][2, 0]  # beyond their ends nothing is used
    golden = expected(cache, "paged", QUERY, KEY, VALUE, torch.float64)
    plain = plain_in_any_order(partial(expected, cache, "paged", QUERY, KEY, VALUE, torch.float32), golden)
    out = fastattn.attention_kv_cache(QUERY, **arguments, key=KEY, value=VALUE)
    assert_within_rule(out, plain[0], golden[0])


def test_a_block_table_that_points_nowhere_is_refused() -> None:
    cache = Cache([5, 0, 31])
    arguments = cache.call("paged")
    arguments["block_table"] = arguments["block_table"] + 3
    with pytest.raises(ValueError, match=r"block_table: got values from \d+ to 1[567], needs 0 to 14"):
        fastattn.attention_kv_cache(QUERY, **arguments, key=KEY, value=VALUE)
