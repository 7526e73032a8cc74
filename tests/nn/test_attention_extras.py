"""Options that MultiHeadAttention has and torch's lacks: windows, positions, sinks, grouped heads, caches."""

from functools import partial

import pytest
import torch
from multi_head_pairs import EMBED, HEADS, pair
from torch import nn

from fastattn import reference
from fastattn.nn.attention import MultiHeadAttention
from fastattn.nn.kv_cache import KVCache
from fastattn.nn.positions import alibi_slopes, apply_rotary


def by_hand(module, x, **options):
    """Projections, then `reference.attention`, then the output projection, with one head per row of the weights."""
    head_dim, heads, kv_heads = module.head_dim, module.num_heads, module.num_kv_heads
    packed = x @ module.in_proj_weight.T + module.in_proj_bias
    q, k, v = packed.split([heads * head_dim, kv_heads * head_dim, kv_heads * head_dim], dim=-1)
    q, k, v = (t.unflatten(-1, (-1, head_dim)).transpose(1, 2) for t in (q, k, v))
    if module.q_norm is not None:
        norms = (module.q_norm.weight, module.k_norm.weight)
        eps = torch.finfo(q.dtype).eps
        q, k = (w * t * (t.pow(2).mean(-1, keepdim=True) + eps).rsqrt() for t, w in zip((q, k), norms))
    if module.rotary is not None:
        table = module.rotary.table(torch.arange(x.shape[1]), torch.float64)
        q, k = apply_rotary(q, table), apply_rotary(k, table)
    out = reference.attention(q, k, v, **options)
    out = out.transpose(1, 2).flatten(-2) @ module.out_proj.weight.T
    return out if module.out_proj.bias is None else out + module.out_proj.bias


EXTRAS = {
    "num_kv_heads": ({"num_kv_heads": 2}, {}),
    "one kv head": ({"num_kv_heads": 1}, {}),
    "rotary": ({"rotary": True}, {}),
    "window": ({"window": (2, 1)}, {"window": (2, 1)}),
    "alibi": ({"alibi": True}, {"alibi_slopes": alibi_slopes(HEADS)}),
    "softcap": ({"softcap": 0.5}, {"softcap": 0.5}),
    "qk_norm": ({"qk_norm": True}, {}),
    "norms of a function": ({"qk_norm": partial(nn.RMSNorm, dtype=torch.float64)}, {}),
    "head_dim": ({"head_dim": 10}, {}),
    "head_dim, grouped": ({"head_dim": 3, "num_kv_heads": 2}, {}),
    "no output bias": ({"out_bias": False}, {}),
    "scale": ({"scale": 0.3}, {"scale": 0.3}),
    "all": (
        {"num_kv_heads": 2, "rotary": True, "window": (3, 0), "alibi": True, "softcap": 2.0, "qk_norm": True},
        {"window": (3, 0), "alibi_slopes": alibi_slopes(HEADS), "softcap": 2.0},
    ),
}


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("case", EXTRAS)
def test_extras_do_what_they_say(case, causal):
    options, reference_options = EXTRAS[case]
    torch.manual_seed(0)
    module = MultiHeadAttention(EMBED, HEADS, batch_first=True, dtype=torch.float64, **options)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter))
    x = torch.randn(2, 9, EMBED, dtype=torch.float64, requires_grad=True)
    sources = [x, *module.parameters()]
    results = []
    for out in (
        module(x, x, x, causal=causal, need_weights=False)[0],
        by_hand(module, x, causal=causal, **reference_options),
    ):
        results.append((out, torch.autograd.grad(out.square().sum(), sources)))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-9, atol=1e-10)
    for actual, expected in zip(results[0][1], results[1][1]):
        torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("options", [{"rotary": True}, {"alibi": True}, {"window": (3, 0)}])
def test_positions_count_from_the_last_key(options):
    """The last queries alone give what they give among all; and a causal hint changes nothing but the kernel."""
    module = MultiHeadAttention(EMBED, HEADS, batch_first=True, dtype=torch.float64, **options)
    x = torch.randn(2, 9, EMBED, dtype=torch.float64)
    whole = module(x, x, x, causal=True)[0]
    torch.testing.assert_close(module(x[:, 5:], x, x, causal=True)[0], whole[:, 5:])
    hidden = torch.ones(9, 9, dtype=torch.bool).triu(1)
    for need_weights in (True, False):
        hinted = module(x, x, x, attn_mask=hidden, is_causal=True, need_weights=need_weights)[0]
        torch.testing.assert_close(hinted, whole)
        last = module(x[:, 5:], x, x, attn_mask=hidden[5:], is_causal=True, need_weights=need_weights)[0]
        torch.testing.assert_close(last, whole[:, 5:])
    longer = module(x, x[:, 4:], x[:, 4:], causal=True)[0]
    torch.testing.assert_close(longer[:, 4:], module(x[:, 4:], x[:, 4:], x[:, 4:], causal=True)[0])


def test_repr_names_the_options_in_use():
    plain = repr(MultiHeadAttention(EMBED, HEADS))
    assert "embed_dim=24, num_heads=4" in plain
    assert "rotary" not in plain
    full = repr(
        MultiHeadAttention(EMBED, HEADS, rotary=True, alibi=True, sinks=True, num_kv_heads=2, window=(3, 0))
    )
    assert all(
        name in full
        for name in ("rotary=Rotary(", "alibi=True", "sinks=True", "num_kv_heads=2", "window=(3, 0)")
    )


def test_sinks_take_weight_and_learn():
    torch.manual_seed(0)
    module = MultiHeadAttention(EMBED, HEADS, batch_first=True, sinks=True, dtype=torch.float64)
    assert "sinks" in dict(module.named_parameters())
    x = torch.randn(2, 6, EMBED, dtype=torch.float64)
    out, weights = module(x, x, x)
    assert (weights.sum(-1) < 1).all()
    torch.testing.assert_close(out, by_hand(module, x, sinks=module.sinks))
    (grad,) = torch.autograd.grad(out.square().sum(), [module.sinks])
    assert (grad != 0).all()


def test_gqa_parameters_are_narrow_and_named_alike():
    module = MultiHeadAttention(EMBED, HEADS, num_kv_heads=2, add_bias_kv=True)
    shapes = {name: tuple(p.shape) for name, p in module.named_parameters()}
    kv_dim = 2 * EMBED // HEADS
    assert shapes["in_proj_weight"] == (EMBED + 2 * kv_dim, EMBED)
    assert shapes["in_proj_bias"] == (EMBED + 2 * kv_dim,)
    assert shapes["bias_k"] == (1, 1, kv_dim)
    assert (module.in_proj_bias == 0).all()


def test_a_head_dim_of_its_own_is_initialised_as_torch_would():
    module = MultiHeadAttention(26, 4, head_dim=10, num_kv_heads=2, bias=False, out_bias=True)
    assert module.in_proj_weight.shape == (80, 26)
    assert module.out_proj.weight.shape == (26, 40)
    assert module.out_proj.weight.abs().max() <= 40**-0.5
    assert module.in_proj_bias is None
    assert (module.out_proj.bias == 0).all()
    assert module(*[torch.randn(3, 26)] * 3)[0].shape == (3, 26)
    assert all(text in repr(module) for text in ("head_dim=10", "num_heads=4"))
    same = MultiHeadAttention(24, 4, head_dim=6, kdim=5, vdim=7)  # torch's own width
    assert same.head_dim == 6


def test_segments_and_lengths_hide_what_they_should():
    _, ours = pair(batch_first=True)
    x = torch.randn(1, 8, EMBED, dtype=torch.float64)
    ids = torch.tensor([[0, 0, 0, 1, 1, 1, 1, -1]])
    out = ours(x, x, x, segment_ids=ids, causal=True, need_weights=False)[0]
    for part in (slice(0, 3), slice(3, 7)):
        alone = ours(x[:, part], x[:, part], x[:, part], causal=True, need_weights=False)[0]
        torch.testing.assert_close(out[:, part], alone)
    short = ours(x, x[:, :5], x[:, :5], need_weights=False)[0]
    poisoned = x.clone()
    poisoned[:, 5:] = float("nan")
    got = ours(x, poisoned, poisoned, key_lengths=torch.tensor([5]), need_weights=False)[0]
    torch.testing.assert_close(got, short)


@pytest.mark.parametrize(
    "options", [{}, {"rotary": True, "num_kv_heads": 2}, {"alibi": True, "window": (4, 0)}]
)
def test_cache_decodes_what_the_whole_sequence_gives(options):
    torch.manual_seed(0)
    module = MultiHeadAttention(EMBED, HEADS, batch_first=True, dtype=torch.float64, **options)
    x = torch.randn(2, 9, EMBED, dtype=torch.float64)
    cache = KVCache(2, module.num_kv_heads, 9, module.head_dim, dtype=torch.float64)
    whole = module(x, x, x, causal=True, need_weights=False)[0]
    with torch.no_grad():
        parts = [
            module(part, part, part, causal=True, need_weights=False, cache=cache)[0]
            for part in x.split([4, 1, 3, 1], dim=1)
        ]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole)
    assert cache.length == cache.capacity == 9
    with torch.no_grad(), pytest.raises(ValueError, match="cache"):
        module(x[:, :1], x[:, :1], x[:, :1], causal=True, cache=cache)


@pytest.mark.parametrize("is_causal", [False, True])
def test_a_hint_of_a_causal_mask_changes_nothing_with_a_cache(is_causal):
    torch.manual_seed(0)
    module = MultiHeadAttention(EMBED, HEADS, batch_first=True, dtype=torch.float64)
    x, later = torch.randn(2, 9, EMBED, dtype=torch.float64), torch.ones(9, 9, dtype=torch.bool).triu(1)
    cache = KVCache(2, HEADS, 9, module.head_dim, dtype=torch.float64)
    options = {"need_weights": False, "is_causal": is_causal, "cache": cache}
    with torch.no_grad():
        whole = module(x, x, x, causal=True, need_weights=False)[0]
        parts = [
            module(part, part, part, attn_mask=later[end - part.shape[1] : end, :end], **options)[0]
            for part, end in zip(x.split([4, 3, 1, 1], dim=1), (4, 7, 8, 9))
        ]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole)


def calls_of(monkeypatch: pytest.MonkeyPatch, name: str) -> list[dict[str, object]]:
    """The options of each call that a cache makes of a function."""
    from fastattn.nn import kv_cache

    seen: list[dict[str, object]] = []
    function = getattr(kv_cache, name)

    def noting(*tensors: object, **options: object) -> object:
        seen.append(options)
        return function(*tensors, **options)

    monkeypatch.setattr(kv_cache, name, noting)
    return seen


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize(
    "options",
    [{}, {"rotary": True, "num_kv_heads": 2, "qk_norm": True}, {"alibi": True, "window": (4, 0)},
     {"sinks": True, "softcap": 5.0}],
)  # fmt: skip
def test_steps_behind_a_prompt_go_to_the_cache_op(options, batch_first, monkeypatch):
    torch.manual_seed(0)
    module = MultiHeadAttention(EMBED, HEADS, batch_first=batch_first, dtype=torch.float64, **options)
    x = torch.randn(2, 9, EMBED, dtype=torch.float64)
    if not batch_first:
        x = x.transpose(0, 1)
    whole = module(x, x, x, causal=True, need_weights=False)[0]
    cache = KVCache(2, module.num_kv_heads, 12, module.head_dim, dtype=torch.float64)
    steps = calls_of(monkeypatch, "attention_kv_cache")
    with torch.no_grad():
        parts = [
            module(part, part, part, causal=True, need_weights=False, cache=cache)[0]
            for part in x.split([3, 1, 4, 1], dim=int(batch_first))
        ]
    torch.testing.assert_close(torch.cat(parts, dim=int(batch_first)), whole)
    assert len(steps) == 3
    assert cache.length == 9


@pytest.mark.parametrize(
    "extra", [{}, {"window": (3, 0)}, {"alibi": True}, {"num_kv_heads": 2, "sinks": True}]
)
@pytest.mark.parametrize(
    ("hidden", "at_the_end"),
    [([0, 0], True), ([3, 1], True), ([8, 0], True), ([-3, -1], False), ([-2, 2], False)],
    ids=str,
)
def test_steps_of_padded_batches(extra, hidden, at_the_end, monkeypatch):
    """A padding mask over all keys held hides the last ones of each sequence, or (below 0) the first ones."""
    torch.manual_seed(0)
    module = MultiHeadAttention(EMBED, HEADS, batch_first=True, dtype=torch.float64, **extra)
    x = torch.randn(2, 8, EMBED, dtype=torch.float64)
    places = torch.arange(8)
    padding = torch.stack([places >= 8 - n if n >= 0 else places < -n for n in hidden])
    step = x[:, 7:]
    with torch.no_grad():
        expected = module(step, x, x, padding, causal=True, need_weights=False)[0]
    cache = KVCache(2, module.num_kv_heads, 10, module.head_dim, dtype=torch.float64)
    steps = calls_of(monkeypatch, "attention_kv_cache")
    with torch.no_grad():
        module(x[:, :7], x[:, :7], x[:, :7], causal=True, need_weights=False, cache=cache)
        out = module(step, step, step, padding, causal=True, need_weights=False, cache=cache)[0]
    torch.testing.assert_close(out, expected)
    assert cache.length == 8
    placed = "window" in extra or "alibi" in extra
    assert len(steps) == (at_the_end and not placed)


def test_what_the_cache_op_cannot_say_goes_to_attention(monkeypatch):
    """Weights, a bias, segments, lengths, dropout and grad mode, with the results of keys given at once."""
    torch.manual_seed(0)
    module = MultiHeadAttention(EMBED, HEADS, batch_first=True, dtype=torch.float64).requires_grad_(False)
    x = torch.randn(2, 8, EMBED, dtype=torch.float64)
    steps = calls_of(monkeypatch, "attention_kv_cache")
    ids = torch.tensor([[0] * 4 + [1] * 4] * 2)
    for options in (
        {"need_weights": True}, {"attn_mask": torch.randn(1, 8, dtype=torch.float64), "need_weights": False},
        {"segment_ids": (ids[:, 7:], ids), "need_weights": False},
        {"key_lengths": torch.tensor([5, 8]), "need_weights": False}, {"need_weights": False},
    ):  # fmt: skip
        cache = KVCache(2, HEADS, 10, module.head_dim, dtype=torch.float64)
        module(x[:, :7], x[:, :7], x[:, :7], causal=True, need_weights=False, cache=cache)
        out = module(x[:, 7:], x[:, 7:], x[:, 7:], causal=True, cache=cache, **options)[0]
        torch.testing.assert_close(out, module(x[:, 7:], x, x, causal=True, **options)[0])
    assert not steps


@pytest.mark.parametrize("causal", [True, False, "top_left"])
@pytest.mark.parametrize("masked", [False, True])
@torch.no_grad()
def test_a_step_of_a_cache_is_attention_to_all_it_holds(causal, masked):
    query, new_key, new_value = torch.randn(3, 2, 4, 1, 8, dtype=torch.float64).unbind()
    cache = KVCache(2, 4, 6, 8, dtype=torch.float64)
    cache.append(*torch.randn(2, 2, 4, 5, 8, dtype=torch.float64).unbind())
    mask = torch.arange(6) < torch.tensor([6, 3])[:, None] if masked else None
    mask = None if mask is None else mask[:, None, None]
    more = {"bias": None, "segment_ids": None, "key_lengths": None, "dropout_p": 0.0, "return_weights": False}
    out = cache.attention(query, new_key, new_value, causal=causal, mask=mask, **more)
    torch.testing.assert_close(
        out, reference.attention(query, cache.keys, cache.values, causal=causal, mask=mask)
    )
