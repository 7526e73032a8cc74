"""What MultiHeadAttention refuses, in its constructor and in a call, by name."""

import pytest
import torch
from multi_head_pairs import BATCH, EMBED, HEADS, LEN_K, inputs, pair
from torch import nn

from fastattn.nn.attention import MultiHeadAttention
from fastattn.nn.kv_cache import KVCache
from fastattn.nn.positions import Rotary


def test_is_causal_needs_a_mask_as_in_torch():
    for module in pair():
        x = inputs(module, kind="self")[0]
        with pytest.raises(RuntimeError, match=r"attn_mask|is_causal"):
            module(x, x, x, is_causal=True)


BAD_CALLS = {
    "4-D query": (lambda q: (q[None], q, q), {}),
    "ranks differ": (lambda q: (q, q[0], q[0]), {}),
    "value shorter": (lambda q: (q, q, q[:, :-1]), {}),
    "wrong width": (lambda q: (q[..., :-1], q, q), {}),
    "batches differ": (lambda q: (q, q[:-1], q[:-1]), {}),
    "integer mask": (lambda q: (q, q, q), {"attn_mask": torch.zeros(LEN_K, LEN_K, dtype=torch.int64)}),
    "mask too small": (lambda q: (q, q, q), {"attn_mask": torch.zeros(2, 2, dtype=torch.bool)}),
    "3-D mask too small": (
        lambda q: (q, q, q),
        {"attn_mask": torch.zeros(2, LEN_K, LEN_K, dtype=torch.bool)},
    ),
    "4-D mask": (lambda q: (q, q, q), {"attn_mask": torch.zeros(1, 1, LEN_K, LEN_K, dtype=torch.bool)}),
    "padding mask 1-D": (lambda q: (q, q, q), {"key_padding_mask": torch.zeros(LEN_K, dtype=torch.bool)}),
    "padding mask size": (lambda q: (q, q, q), {"key_padding_mask": torch.zeros(BATCH, 2, dtype=torch.bool)}),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_what_torch_rejects_is_rejected_by_name(case):
    make, options = BAD_CALLS[case]
    theirs, ours = pair(batch_first=True)
    tensors = make(inputs(theirs, kind="self")[0])
    with pytest.raises(Exception) as expected:  # noqa: PT011
        theirs(*tensors, **options)
    with pytest.raises(ValueError, match=r"query|key|value|mask") as actual:
        ours(*tensors, **options)
    if isinstance(expected.value, (AssertionError, RuntimeError)):
        kind = AssertionError if isinstance(expected.value, AssertionError) else RuntimeError
        assert isinstance(actual.value, kind) or case in ("wrong width", "batches differ", "value shorter")


def test_constructor_errors_are_torchs():
    for cls in (nn.MultiheadAttention, MultiHeadAttention):
        with pytest.raises(ValueError, match="embed_dim"):
            cls(0, 4)
        with pytest.raises(AssertionError, match="divisible"):
            cls(10, 4)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"num_kv_heads": 3}, "num_kv_heads"),
        ({"rotary": Rotary(8)}, "rotary"),
        ({"head_dim": 0}, "head_dim: got 0"),
        ({"head_dim": 2.5}, "head_dim: got 2.5"),
        ({"head_dim": 5, "kdim": 7}, "head_dim: got 5, which with kdim"),
        ({"scale": float("nan")}, "scale: got nan"),
        ({"alibi": torch.ones(3)}, "alibi"),
        ({"add_bias_kv": True, "rotary": True}, "add_bias_kv"),
        ({"add_zero_attn": True, "window": (1, 1)}, "add_zero_attn"),
        ({"add_zero_attn": True, "alibi": True}, "add_zero_attn"),
        ({"backend": "nope"}, "backend"),
        ({"window": (1,)}, "window"),
        ({"softcap": -1.0}, "softcap"),
    ],
)
def test_bad_extras_are_refused_in_the_constructor(options, name):
    with pytest.raises((ValueError, TypeError), match=name):
        MultiHeadAttention(EMBED, HEADS, **options)


def test_appended_keys_refuse_what_needs_positions():
    _, ours = pair(batch_first=True, add_bias_kv=True)
    x = inputs(ours, kind="self")[0]
    for options in ({"causal": True}, {"key_lengths": torch.tensor([1, 2, 3])}):
        with pytest.raises(ValueError, match="add_bias_kv"):
            ours(x, x, x, **options)


def test_cache_refuses_gradients():
    _, ours = pair(batch_first=True)
    x = torch.randn(2, 3, EMBED, dtype=torch.float64)
    with pytest.raises(ValueError, match="gradient"):
        ours(x, x, x, cache=KVCache(2, HEADS, 4, EMBED // HEADS, dtype=torch.float64))


OTHER = torch.zeros(1, 3, dtype=torch.int64)


@pytest.mark.parametrize(
    "options",
    [{"key_lengths": torch.tensor([99, 1])}, {"segment_ids": OTHER}, {"backend": "cuda"}, {"dtype": torch.float32},
     {"length": 3}, {"backend": "cuda", "mask": True}, {"backend": "cuda", "need_weights": True}],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("held", [0, 2])
@torch.no_grad()
def test_a_refused_call_leaves_the_length_of_its_cache(held, options):
    options = dict(options)
    dtype, length = options.pop("dtype", torch.float64), options.pop("length", 1)
    masked = options.pop("mask", False)
    module = MultiHeadAttention(
        EMBED, HEADS, batch_first=True, dtype=torch.float64, backend=options.pop("backend", "auto")
    )
    cache = KVCache(2, HEADS, held + 2, EMBED // HEADS, dtype=dtype)
    cache.append(*torch.randn(2, 2, HEADS, held, EMBED // HEADS, dtype=dtype).unbind())
    x = torch.randn(2, length, EMBED, dtype=torch.float64)
    padding = torch.zeros(2, held + length, dtype=torch.bool) if masked else None
    with pytest.raises((ValueError, TypeError, RuntimeError)):
        module(x, x, x, padding, causal=True, cache=cache, **{"need_weights": False, **options})
    assert cache.length == held
