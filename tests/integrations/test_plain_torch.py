"""Attention in torch's own operations, which recorded programs hold, computes what fastattn computes."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from export_cases import EXPORTED, HKV, B, D, H, L, S, chance, foreign, qkv, randn, results_of
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

import fastattn
from fastattn import reference
from fastattn.integrations.export import plain_torch
from numerics import assert_within_rule, plain_in_any_order

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True},
    "top left": {"causal": "top_left"},
    "window": {"window": (1, 0)},
    "top left in a window": {"causal": "top_left", "window": (2, 2)},
    "mask": {"mask": chance(0.3, B, 1, L, S)},
    "mask by key": {"mask": chance(0.5, B, 1, 1, S), "causal": True},
    "bias": {"bias": randn(H, L, S)},
    "bias of -inf": {"bias": randn(1, L, S).masked_fill(chance(0.7, 1, L, S), -torch.inf), "causal": True},
    "segments": {
        "segment_ids": (torch.tensor([[0, 0, 1, 1, -1]] * B), torch.tensor([[0, 0, 0, 2, 1, -1, 5]] * B))
    },
    "lengths": {"key_lengths": torch.tensor([0, 3])},
    "lengths in a window": {"key_lengths": torch.tensor([6, 3]), "window": (2, 0)},
    "alibi": {"alibi_slopes": randn(B, H).abs(), "causal": True},
    "alibi and bias": {"alibi_slopes": randn(H).abs(), "bias": randn(L, S), "mask": chance(0.5, L, S)},
    "sinks": {"sinks": randn(H), "key_lengths": torch.tensor([0, 3])},
    "a sink of -inf": {
        "sinks": torch.tensor([0.0, -torch.inf, 1.0, 2.0]),
        "key_lengths": torch.tensor([0, 3]),
    },
    "softcap": {"softcap": 2.0, "causal": "top_left"},
    "scale": {"scale": 0.3},
    "negative scale": {"scale": -0.3, "causal": True},
    "scale of 0": {"scale": 0.0},
    "dropout": {"dropout_p": 0.4, "dropout_seed": 3, "causal": True},
}
by_options = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


@by_options
@pytest.mark.parametrize(
    "returned",
    [{}, {"return_lse": True}, {"return_lse": True, "return_weights": True}, {"return_weights": "mean"}],
    ids=["out", "lse", "all", "mean weights"],
)
def test_plain_torch_computes_the_same(options: dict[str, Any], returned: dict[str, Any]) -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        with plain_torch():
            actual = results_of(fastattn.attention, qkv(dtype), **options, **returned)
        golden = results_of(reference.attention, [t.double() for t in qkv(dtype)], **options, **returned)
        if dtype == torch.float64:  # no dtype is exacter
            for a, g in zip(actual, golden, strict=True):
                torch.testing.assert_close(a, g)
            continue
        formula = partial(results_of, reference.attention, qkv(dtype), **options, **returned)
        plain = plain_in_any_order(formula, golden)
        for i, (a, p, g) in enumerate(zip(actual, plain, golden, strict=True)):
            assert a.dtype == (torch.float32 if i == 1 and "return_lse" in returned else dtype)
            assert_within_rule(a, p, g, f"result {i} in {dtype}", dtype=dtype)


@pytest.mark.parametrize(
    "options",
    [
        {"key_lengths": torch.tensor([5, 3])},
        {"mask": (torch.arange(S) < torch.tensor([5, 3])[:, None])[:, None, None]},
        {"bias": torch.where(torch.arange(S) < 3, 0.0, -torch.inf).double()},
        {"segment_ids": (torch.zeros(B, L).int(), torch.where(torch.arange(S) < 3, 0, -1).expand(B, S))},
    ],
    ids=lambda options: next(iter(options)),
)
def test_keys_that_nobody_sees_may_be_nan(options: dict[str, Any]) -> None:
    q, k, v = qkv()
    lengths = options.get("key_lengths", torch.tensor([5, 3] if "mask" in options else [3, 3]))
    poison = torch.arange(S) >= lengths[:, None]
    with plain_torch():
        clean = results_of(fastattn.attention, [q, k, v], **options)
        poisoned = [t.masked_fill(poison[:, None, :, None], torch.nan) for t in (k, v)]
        for expected, actual in zip(clean, results_of(fastattn.attention, [q, *poisoned], **options)):
            torch.testing.assert_close(actual, expected)


VARLEN = {
    "causal": {"causal": True, "return_lse": True},
    "top left": {"causal": "top_left"},
    "window": {"window": (1, 1)},
    "slopes": {"alibi_slopes": randn(3, H), "softcap": 3.0, "return_lse": True},
    "sinks": {"alibi_slopes": randn(H)},
    "sinks, lse": {"return_lse": True},
}


@pytest.mark.parametrize("name", VARLEN)
def test_packed_sequences(name: str) -> None:
    """With an empty sequence, queries without keys, and tokens that belong to none."""
    cu_seqlens = torch.tensor([0, 3, 3, 8]).int(), torch.tensor([0, 4, 9, 9]).int()
    tensors = [randn(n, heads, D, seed=i) for i, (n, heads) in enumerate(((9, H), (10, HKV), (10, HKV)))]
    if "sinks" in name:
        tensors.append(randn(H, seed=3))

    def call(function: Callable[..., Any]) -> list[Tensor]:
        def of(*operands: Tensor) -> Any:
            sinks = operands[3] if len(operands) > 3 else None
            return function(*operands[:3], *cu_seqlens, sinks=sinks, **VARLEN[name])

        return results_of(of, tensors)

    with plain_torch():
        actual = call(fastattn.attention_varlen)
    for a, e in zip(actual, call(reference.attention_varlen)):
        torch.testing.assert_close(a, e)


@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("options", [{}, {"window": (2, 0), "softcap": 2.0}, {"causal": "top_left"}], ids=str)
def test_a_cache(paged: bool, options: dict[str, Any]) -> None:
    query, new = randn(B, H, 3, D), randn(2, B, HKV, 3, D, seed=1)
    shape = (2, 5, HKV, 4, D) if paged else (2, B, HKV, 9, D)
    table = {"block_table": torch.tensor([[3, 0, 77], [1, 4, 2]]).int()} if paged else {}
    rotary = {"rotary_cos": randn(12, 2, seed=5), "rotary_sin": randn(12, 2, seed=6)}
    found = []
    for enabled in (False, True):
        caches = randn(*shape, seed=2)
        with plain_torch(enabled):
            results = fastattn.attention_kv_cache(
                query, *caches, torch.tensor([4, 6]).int(), key=new[0], value=new[1], return_lse=True,
                alibi_slopes=randn(H, seed=7), **table, **rotary, **options,
            )  # fmt: skip
        found.append((*results, caches))
    for expected, actual in zip(*found):
        torch.testing.assert_close(actual, expected)


def test_the_context() -> None:
    tensors = qkv()

    def ops(call: Callable[..., Any]) -> list[str]:
        return foreign(make_fx(call)(*tensors).graph)

    call = EXPORTED["plain"][0]
    assert ops(call)
    with plain_torch():
        assert not ops(call)
        with plain_torch(False):
            assert ops(call)
        assert not ops(call)
        with pytest.raises(ZeroDivisionError), plain_torch(False):
            raise ZeroDivisionError
        assert not ops(call)
    assert ops(call)
    assert not ops(plain_torch()(call))
    with pytest.raises(TypeError, match="enabled: got str, needs a bool"):
        plain_torch("yes")


def test_compiled_code_follows_the_context() -> None:
    torch._dynamo.reset()
    graphs: list[Any] = []

    def keep(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph

    compiled = torch.compile(EXPORTED["causal"][0], backend=keep, fullgraph=True)
    with torch.no_grad():
        for enabled in (None, True, None):
            if enabled:
                with plain_torch():
                    out = compiled(*qkv())
            else:
                out = compiled(*qkv())
            torch.testing.assert_close(out, fastattn.attention(*qkv(), causal=True))
    assert ["fastattn" in graph.code for graph in graphs] == [True, False]
