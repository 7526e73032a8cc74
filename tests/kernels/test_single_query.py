"""Padded calls with one query per head on the Triton backend: split over their keys as calls on a cache are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attention_cases import DEVICE, Maker

import fastattn
from fastattn import reference
from fastattn.backends.triton.kv_cache import is_decode_call
from fastattn.kernels.decode_tiles import FEWEST_SPLIT_KEYS
from fastattn.spec import AttentionCall, AttentionSpec, KVCacheCall
from numerics import assert_within_rule

pytestmark = pytest.mark.filterwarnings("ignore:divide by zero encountered in log2")
LENGTH = FEWEST_SPLIT_KEYS + 70  # keys, in two splits
OPTIONS: dict[str, Any] = {
    "plain": lambda make: {},
    "causal": lambda make: {"causal": True},
    "top left": lambda make: {"causal": "top_left"},
    "window": lambda make: {"window": (90, 3)},
    "lengths": lambda make: {"key_lengths": torch.tensor([0, LENGTH - 100], device=DEVICE), "causal": True},
    "softcap and sinks": lambda make: {"softcap": 2.0, "sinks": make.normal(4)},
    "slopes per sequence": lambda make: {"alibi_slopes": make.normal(2, 4).abs()},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_error_rule(name: str) -> None:
    make = Maker()
    query, key, value = (
        make.normal(2, heads, length, dim, dtype=torch.float16)
        for heads, length, dim in ((4, 1, 16), (2, LENGTH, 16), (2, LENGTH, 24))
    )
    options = OPTIONS[name](make)
    actual = fastattn.attention(query, key, value, **options, return_lse=True, backend="triton")
    golden, plain = (
        reference.attention(*(t.to(dtype) for t in (query, key, value)), **options, return_lse=True)
        for dtype in (torch.float64, torch.float16)
    )
    for a, p, g, result in zip(actual, plain, golden, ("out", "lse")):
        assert_within_rule(a, p, g, f"{name}: {result}", torch.float16)
    alone = fastattn.attention(
        query[1:], key[1:], value[1:], **{n: v[1:] if n in ("key_lengths", "alibi_slopes") else v
                                          for n, v in options.items()}, backend="triton",
    )  # fmt: skip
    assert torch.equal(alone, actual[0][1:])


def spec_of(seqlen_q: int = 1, **options: Any) -> AttentionSpec:
    query, key = torch.empty(1, 2, seqlen_q, 16), torch.empty(1, 2, 20, 16)
    return AttentionSpec.of(AttentionCall(query, key, key, **options))


def test_what_is_split_over_its_keys() -> None:
    lengths = torch.tensor([3], dtype=torch.int32)
    assert is_decode_call(spec_of())
    assert is_decode_call(spec_of(causal="bottom_right", key_lengths=lengths))
    assert is_decode_call(
        spec_of(causal="top_left", window_left=3, alibi_slopes=torch.ones(1, 2), sinks=torch.ones(2))
    )
    assert not is_decode_call(spec_of(seqlen_q=2))
    assert not is_decode_call(spec_of(mask=torch.ones(1, 1, 1, 20, dtype=torch.bool)))
    assert not is_decode_call(spec_of(bias=torch.ones(1, 1, 1, 20)))
    assert not is_decode_call(spec_of(query_segments=lengths[:, None], key_segments=torch.zeros(1, 20)))
    assert not is_decode_call(spec_of(dropout_p=0.5, dropout_seed=torch.zeros(1, dtype=torch.int64)))
    for placed in (
        {"causal": "top_left"},
        {"window_left": 3},
        {"window_right": 0},
        {"alibi_slopes": torch.ones(1, 2)},
    ):
        assert not is_decode_call(spec_of(key_lengths=lengths, **placed))


def test_explain_names_the_tile_of_decoding() -> None:
    query, key = torch.empty(1, 2, 1, 16), torch.empty(1, 2, 20, 16)
    assert "decode 16x" in fastattn.explain(query, key, key, backend="triton").tiles


def test_a_model_decodes_from_its_cache_this_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step after the prompt: MultiHeadAttention's cache holds keys as the kernel wants them."""
    from fastattn.backends.triton import kv_cache as triton_kv_cache
    from fastattn.nn.kv_cache import KVCache

    lengths: list[int] = []
    split = triton_kv_cache._attend

    def counted(spec: AttentionSpec, call: KVCacheCall, *more: Any) -> Any:
        lengths.extend(call.cache_lengths.tolist())
        return split(spec, call, *more)

    monkeypatch.setattr(triton_kv_cache, "_attend", counted)
    x = torch.randn(2, 5, 32, device=DEVICE)
    outs = []
    for backend in ("triton", "torch"):
        torch.manual_seed(0)
        module = fastattn.MultiHeadAttention(32, 4, num_kv_heads=2, batch_first=True, backend=backend).to(
            DEVICE
        )
        cache = KVCache(2, 2, 8, 8, device=DEVICE)
        with torch.no_grad():
            steps = [module(step, step, step, need_weights=False, causal=True, cache=cache)[0]
                     for step in (x[:, :3], x[:, 3:4], x[:, 4:])]  # fmt: skip
        outs.append(torch.cat(steps, dim=1))
    torch.testing.assert_close(outs[0], outs[1], rtol=1e-5, atol=1e-5)
    assert lengths == [3, 3, 4, 4]  # before each append
