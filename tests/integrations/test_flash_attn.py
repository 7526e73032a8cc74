"""flash-attn's functions: its parameters in its order, its layouts, its alignment, its return values."""

import inspect

import pytest
import torch

import fastattn
from fastattn.integrations import flash_attn as fa
from fastattn.reference import attention as reference

B, SQ, SK, H, HKV, D = 2, 5, 7, 4, 2, 8
SHARED = ["dropout_p", "softmax_scale", "causal", "window_size", "softcap", "alibi_slopes", "deterministic"]
SIGNATURES = {
    "flash_attn_func": ["q", "k", "v", *SHARED, "return_attn_probs"],
    "flash_attn_qkvpacked_func": ["qkv", *SHARED, "return_attn_probs"],
    "flash_attn_kvpacked_func": ["q", "kv", *SHARED, "return_attn_probs"],
    "flash_attn_varlen_func": [
        "q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", *SHARED, "return_attn_probs",
        "block_table",
    ],
    "flash_attn_varlen_qkvpacked_func": ["qkv", "cu_seqlens", "max_seqlen", *SHARED, "return_attn_probs"],
    "flash_attn_varlen_kvpacked_func": [
        "q", "kv", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", *SHARED, "return_attn_probs",
    ],
    "flash_attn_with_kvcache": [
        "q", "k_cache", "v_cache", "k", "v", "rotary_cos", "rotary_sin", "cache_seqlens", "cache_batch_idx",
        "cache_leftpad", "block_table", "softmax_scale", "causal", "window_size", "softcap", "rotary_interleaved",
        "alibi_slopes", "num_splits", "return_softmax_lse",
    ],
    "unpad_input": ["hidden_states", "attention_mask", "unused_mask"],
    "pad_input": ["hidden_states", "indices", "batch", "seqlen"],
    "index_put_first_axis": ["values", "indices", "first_axis_dim"],
}  # fmt: skip
DEFAULTS = {
    "dropout_p": 0.0, "softmax_scale": None, "causal": False, "window_size": (-1, -1), "softcap": 0.0,
    "alibi_slopes": None, "deterministic": False, "return_attn_probs": False, "block_table": None,
    "rotary_interleaved": True, "num_splits": 0, "return_softmax_lse": False,
}  # fmt: skip
OPTIONS = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window_size": (2, 1)},
    "causal window": {"causal": True, "window_size": (2, -1)},
    "softcap": {"softcap": 1.5},
    "scale": {"softmax_scale": 0.2, "deterministic": True},
    "alibi": {"alibi_slopes": torch.linspace(0.1, 1, H, dtype=torch.float64), "causal": True},
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature(name):
    parameters = inspect.signature(getattr(fa, name)).parameters.values()
    positional = [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert [p.name for p in positional] == SIGNATURES[name]
    assert all(p.default == DEFAULTS[p.name] for p in positional if p.name in DEFAULTS)


def as_ours(options):
    names = {"softmax_scale": "scale", "window_size": "window"}
    return {names.get(n, n): value for n, value in options.items() if n != "deterministic"}


def expected_of(q, k, v, **options):
    """By the reference, in flash-attn's layout."""
    return reference(*(t.transpose(1, 2) for t in (q, k, v)), **options).transpose(1, 2)


def make(*shapes):
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def assert_same(actual, expected, sources):
    torch.testing.assert_close(actual, expected)
    assert actual.shape == expected.shape
    weight = torch.randn_like(expected)
    grads = [torch.autograd.grad(out, sources, weight, retain_graph=True) for out in (actual, expected)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("option", OPTIONS)
def test_func(option):
    q, k, v = make((B, SQ, H, D), (B, SK, HKV, D), (B, SK, HKV, D))
    out = fa.flash_attn_func(q, k, v, **OPTIONS[option])
    assert out.is_contiguous()
    assert_same(out, expected_of(q, k, v, **as_ours(OPTIONS[option])), (q, k, v))


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize(("queries", "keys", "dim"), [(5, 7, 8), (7, 5, 11), (1, 9, 16)])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [(-1, -1), (2, 1), (0, -1)])
@pytest.mark.parametrize("softcap", [0.0, 1.5])
@pytest.mark.parametrize("alibi", [False, True])
def test_options_crossed(kv_heads, queries, keys, dim, causal, window, softcap, alibi):
    """Padded, and packed with an empty sequence between."""
    q, k, v = make((B, queries, H, dim), (B, keys, kv_heads, dim), (B, keys, kv_heads, dim))
    slopes = torch.rand(B, H, dtype=torch.float64) if alibi else None
    options = {"causal": causal, "window_size": window, "softcap": softcap}
    wanted = {"causal": causal, "window": window, "softcap": softcap or None, "alibi_slopes": slopes}
    expected = expected_of(q, k, v, **wanted)
    assert_same(fa.flash_attn_func(q, k, v, alibi_slopes=slopes, **options), expected, (q, k, v))
    if alibi:
        slopes = torch.stack([slopes[0], slopes[0], slopes[1]])
    packing = (ends([queries, 0, queries]), ends([keys, 0, keys]), queries, keys)
    out = fa.flash_attn_varlen_func(
        *(t.flatten(0, 1) for t in (q, k, v)), *packing, alibi_slopes=slopes, **options
    )
    assert_same(out.unflatten(0, (B, queries)), expected, (q, k, v))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("causal", [False, True])
def test_large_numbers_do_not_overflow(dtype, causal):
    """Scores and gradients beyond the range of 16 bits within, and none in the results."""
    q, k, v = ((t.detach() * 60).to(dtype).requires_grad_() for t in make(*[(1, 17, 2, 16)] * 3))
    out = fa.flash_attn_func(q, k, v, causal=causal)
    for result in (out, *torch.autograd.grad(out, (q, k, v), torch.full_like(out, 30.0))):
        assert torch.isfinite(result).all()


@pytest.mark.parametrize("causal", [False, True])
def test_transposed_gradients_and_repeated_runs(causal):
    """A gradient of any strides gives the same, bitwise, as often as it is asked for."""
    q, k, v = make((B, SQ, H, D), (B, SK, HKV, D), (B, SK, HKV, D))
    out = fa.flash_attn_func(q, k, v, causal=causal)
    weight = torch.randn_like(out)
    other = weight.transpose(0, 3).contiguous().transpose(0, 3)
    runs = [torch.autograd.grad(out, (q, k, v), w, retain_graph=True) for w in (weight, other, weight)]
    for again in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], again))


def test_it_compiles_without_a_break():
    def call(q, k, v):
        out = fa.flash_attn_func(q, k, v, causal=True, window_size=(3, 0))
        packed = fa.flash_attn_varlen_func(q[0], k[0], v[0], ends_q, ends_k, SQ, SK, causal=True)
        return out, packed, fa.flash_attn_qkvpacked_func(torch.stack([q, q, q], 2))

    q, k, v = (t.detach().float() for t in make((B, SQ, H, D), (B, SK, HKV, D), (B, SK, HKV, D)))
    ends_q, ends_k = ends([SQ]), ends([SK])
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(q, k, v), call(q, k, v))


def test_positional_arguments():
    q, k, v = make((B, SQ, H, D), (B, SK, HKV, D), (B, SK, HKV, D))
    slopes = torch.rand(B, H, dtype=torch.float64)
    out = fa.flash_attn_func(q, k, v, 0.0, 0.3, True, (3, 0), 2.0, slopes, True, False)
    expected = expected_of(q, k, v, scale=0.3, causal=True, window=(3, 0), softcap=2.0, alibi_slopes=slopes)
    torch.testing.assert_close(out, expected)


def test_causal_counts_from_the_last_key():
    q, k, v = make((1, 2, 1, D), (1, 4, 1, D), (1, 4, 1, D))
    out = fa.flash_attn_func(q, k, v, causal=True)
    torch.testing.assert_close(out[:, 1:], fa.flash_attn_func(q[:, 1:], k, v))
    torch.testing.assert_close(out[:, :1], fa.flash_attn_func(q[:, :1], k[:, :3], v[:, :3]))
    long, short = make((1, 4, 1, D), (1, 2, 1, D))
    assert not fa.flash_attn_func(long, short, short, causal=True)[:, :2].any()


@pytest.mark.parametrize("option", OPTIONS)
def test_packed(option):
    (qkv,) = make((B, SQ, 3, H, D))
    expected = expected_of(*qkv.unbind(2), **as_ours(OPTIONS[option]))
    assert_same(fa.flash_attn_qkvpacked_func(qkv, **OPTIONS[option]), expected, (qkv,))
    q, kv = make((B, SQ, H, D), (B, SK, 2, HKV, D))
    expected = expected_of(q, *kv.unbind(2), **as_ours(OPTIONS[option]))
    assert_same(fa.flash_attn_kvpacked_func(q, kv, **OPTIONS[option]), expected, (q, kv))


LENGTHS_Q, LENGTHS_K = [3, 0, 4, 2], [3, 2, 5, 1]


def ends(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def sequences(tensor, lengths):
    return tensor.split([*lengths, len(tensor) - sum(lengths)])[: len(lengths)]


@pytest.mark.parametrize("option", OPTIONS)
def test_varlen(option):
    options = OPTIONS[option]
    q, kv = make((sum(LENGTHS_Q), H, D), (sum(LENGTHS_K), 2, HKV, D))
    packing = (ends(LENGTHS_Q), ends(LENGTHS_K), max(LENGTHS_Q), max(LENGTHS_K))
    parts = zip(sequences(q, LENGTHS_Q), sequences(kv, LENGTHS_K))
    expected = torch.cat([expected_of(a[None], *b[None].unbind(2), **as_ours(options))[0] for a, b in parts])
    assert_same(fa.flash_attn_varlen_func(q, *kv.unbind(1), *packing, **options), expected, (q, kv))
    assert_same(fa.flash_attn_varlen_kvpacked_func(q, kv, *packing, **options), expected, (q, kv))
    (qkv,) = make((sum(LENGTHS_Q), 3, H, D))
    parts = sequences(qkv, LENGTHS_Q)
    expected = torch.cat([expected_of(*part[None].unbind(2), **as_ours(options))[0] for part in parts])
    out = fa.flash_attn_varlen_qkvpacked_func(qkv, packing[0], packing[2], **options)
    assert_same(out, expected, (qkv,))


def test_return_attn_probs():
    q, k, v = make((B, SQ, H, D), (B, SK, HKV, D), (B, SK, HKV, D))
    out, lse, probs = fa.flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
    heads_first = [t.transpose(1, 2) for t in (q, k, v)]
    expected, expected_lse, weights = reference(
        *heads_first, causal=True, return_lse=True, return_weights=True
    )
    torch.testing.assert_close((out.transpose(1, 2), lse), (expected, expected_lse))
    assert probs is None
    out, lse, probs = fa.flash_attn_func(q, k, v, 0.5, causal=True, return_attn_probs=True)
    torch.testing.assert_close(lse, expected_lse)
    torch.testing.assert_close(probs.abs(), weights)
    assert (probs < 0).any()
    assert (probs > 0).any()
    v_heads = heads_first[2].repeat_interleave(H // HKV, 1)
    torch.testing.assert_close(out.transpose(1, 2), probs.clamp(min=0) * 2 @ v_heads)
    out, lse, probs = fa.flash_attn_varlen_func(
        q[0], k[0], v[0], ends([SQ]), ends([SK]), SQ, SK, return_attn_probs=True
    )
    plain = reference(*(t[:1] for t in heads_first), return_lse=True)
    torch.testing.assert_close((out.transpose(0, 1)[None], lse[None]), plain)
    assert probs is None


def test_sinks():
    q, k, v, sinks = make((B, SQ, H, D), (B, SK, HKV, D), (B, SK, HKV, D), (H,))
    assert_same(fa.flash_attn_func(q, k, v, s_aux=sinks), expected_of(q, k, v, sinks=sinks), (q, k, v, sinks))
    packing = (ends([SQ, SQ]), ends([SK, SK]), SQ, SK)
    out = fa.flash_attn_varlen_func(*(t.flatten(0, 1) for t in (q, k, v)), *packing, s_aux=sinks)
    torch.testing.assert_close(out.unflatten(0, (B, SQ)), expected_of(q, k, v, sinks=sinks))
    with torch.no_grad():
        out = fa.flash_attn_with_kvcache(q, k.clone(), v.clone(), s_aux=sinks)
        torch.testing.assert_close(out, expected_of(q, k, v, sinks=sinks))


def cache(places=12):
    k_cache, v_cache = (torch.randn(B, places, HKV, D, dtype=torch.float64) for _ in range(2))
    return k_cache, v_cache, torch.tensor([4, 7], dtype=torch.int32)


def rotated(x, cos, sin, start, interleaved):
    """x (S, H, D) turned to positions start, start + 1, ..."""
    half = cos.shape[1]
    c, s = (table[start : start + len(x), None] for table in (cos, sin))
    x, rest = x[..., : 2 * half], x[..., 2 * half :]
    a, b = (x[..., ::2], x[..., 1::2]) if interleaved else x.chunk(2, -1)
    turned = (a * c - b * s, a * s + b * c)
    turned = torch.stack(turned, -1).flatten(-2) if interleaved else torch.cat(turned, -1)
    return torch.cat([turned, rest], -1)


@pytest.mark.parametrize("rotary", [None, True, False])
@pytest.mark.parametrize("option", ["causal", "causal window", "softcap", "alibi"])
@pytest.mark.parametrize("tokens", [1, 3])
def test_with_kvcache(option, tokens, rotary):
    options = OPTIONS[option] | ({"causal": True} if rotary is not None else {})
    k_cache, v_cache, lengths = cache()
    q, k, v = (t.detach() for t in make((B, tokens, H, D), (B, tokens, HKV, D), (B, tokens, HKV, D)))
    before, tables = (k_cache.clone(), v_cache.clone(), lengths.clone()), {}
    if rotary is not None:
        angles = torch.rand(12, 3, dtype=torch.float64)
        tables = {"rotary_cos": angles.cos(), "rotary_sin": angles.sin(), "rotary_interleaved": rotary}
    out, lse = fa.flash_attn_with_kvcache(
        q, k_cache, v_cache, k, v, cache_seqlens=lengths, return_softmax_lse=True, **tables, **options
    )
    assert torch.equal(lengths, before[2])
    for b, n in enumerate(lengths.tolist()):
        query, new = q[b], k[b]
        if rotary is not None:
            query, new = (rotated(t, angles.cos(), angles.sin(), n, rotary) for t in (query, new))
        keys, values = torch.cat([before[0][b, :n], new]), torch.cat([before[1][b, :n], v[b]])
        expected = expected_of(query[None], keys[None], values[None], **as_ours(options))
        torch.testing.assert_close(out[b], expected[0])
        torch.testing.assert_close(k_cache[b], torch.cat([keys, before[0][b, n + tokens :]]))
        torch.testing.assert_close(v_cache[b], torch.cat([values, before[1][b, n + tokens :]]))
    assert lse.shape == (B, H, tokens)


def test_with_a_paged_cache():
    k_cache, v_cache, lengths = cache(12)
    order = torch.randperm(6)
    pages = [torch.empty(6, 4, HKV, D, dtype=torch.float64) for _ in range(2)]
    for paged, whole in zip(pages, (k_cache, v_cache)):
        paged[order] = whole.reshape(6, 4, HKV, D)
    table = order.view(B, 3).to(torch.int32)
    q, k, v = (t.detach() for t in make((B, 2, H, D), (B, 2, HKV, D), (B, 2, HKV, D)))
    expected = fa.flash_attn_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=lengths, causal=True)
    out = fa.flash_attn_with_kvcache(q, *pages, k, v, cache_seqlens=lengths, block_table=table, causal=True)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(pages[0][order].reshape(k_cache.shape), k_cache)


def test_lengths_of_a_cache():
    k_cache, v_cache, _ = cache()
    q = torch.randn(B, 1, H, D, dtype=torch.float64)
    torch.testing.assert_close(
        fa.flash_attn_with_kvcache(q, k_cache, v_cache), expected_of(q, k_cache, v_cache)
    )
    torch.testing.assert_close(
        fa.flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens=5),
        expected_of(q, k_cache[:, :5], v_cache[:, :5]),
    )


def test_unpad_and_pad():
    x = torch.randn(3, 5, 2, 4, requires_grad=True)
    mask = torch.tensor([[1, 1, 1, 0, 0], [0, 1, 0, 1, 1], [0, 0, 0, 0, 0]])
    tokens, indices, cu_seqlens, longest, used = fa.unpad_input(x, mask)
    assert torch.equal(tokens, x[mask.bool()])
    assert indices.tolist() == [0, 1, 2, 6, 8, 9]
    assert cu_seqlens.tolist() == [0, 3, 6, 6]
    assert cu_seqlens.dtype == torch.int32
    assert longest == 3
    assert used.tolist() == [3, 3, 0]
    back = fa.pad_input(tokens, indices, 3, 5)
    assert torch.equal(back, x * mask[..., None, None])
    assert torch.equal(fa.index_first_axis(x.flatten(0, 1), indices), tokens)
    assert torch.equal(fa.index_put_first_axis(tokens, indices, 15), back.flatten(0, 1))
    (grad,) = torch.autograd.grad(back.sum(), x)
    assert torch.equal(grad, torch.ones_like(x) * mask[..., None, None])
    more = fa.unpad_input(x, mask.bool(), torch.tensor([[0, 0, 0, 1, 1]] * 3))
    assert more[2].tolist() == [0, 5, 8, 10]
    assert more[4].tolist() == [3, 3, 0]


def test_packing_is_padding_without_the_padding():
    q, k, v = make((3, 6, H, D), (3, 6, HKV, D), (3, 6, HKV, D))
    mask = torch.arange(6) < torch.tensor([[6], [2], [4]])
    (q_tokens, indices, ends_q, longest, _), (k_tokens, *_), (v_tokens, *_) = (
        fa.unpad_input(t, mask) for t in (q, k, v)
    )
    packed = fa.flash_attn_varlen_func(
        q_tokens, k_tokens, v_tokens, ends_q, ends_q, longest, longest, causal=True
    )
    out = fa.pad_input(packed, indices, 3, 6)
    padded = fastattn.attention(
        *(t.transpose(1, 2) for t in (q, k, v)), causal=True, key_lengths=mask.sum(-1)
    ).transpose(1, 2)
    torch.testing.assert_close(out, padded * mask[..., None, None])


@pytest.mark.parametrize(
    ("function", "change", "error", "match"),
    [
        ("func", {"q": torch.zeros(B, SQ, H)}, ValueError, "q: "),
        ("func", {"causal": "top_left"}, TypeError, "causal"),
        ("func", {"dropout_p": 1.0}, ValueError, "dropout_p"),
        ("func", {"softcap": -1.0}, ValueError, "softcap"),
        ("func", {"window_size": 3}, ValueError, "window"),
        ("func", {"k": torch.zeros(B, SK, 3, D)}, ValueError, "heads"),
        ("varlen", {"cu_seqlens_q": torch.tensor([0, 5])}, TypeError, "cu_seqlens_q"),
        ("cache", {"cache_seqlens": None}, ValueError, "cache_seqlens"),
        ("cache", {"k": None, "v": None, "rotary_cos": torch.ones(12, 4)}, ValueError, "rotary_cos"),
    ],
)
def test_refused(function, change, error, match):
    q, k = torch.zeros(B, SQ, H, D), torch.zeros(B, SK, HKV, D)
    calls = {
        "func": (fa.flash_attn_func, {"q": q, "k": k, "v": k}),
        "varlen": (
            fa.flash_attn_varlen_func,
            {
                "q": q[0], "k": k[0], "v": k[0], "cu_seqlens_q": ends([SQ]), "cu_seqlens_k": ends([SK]),
                "max_seqlen_q": SQ, "max_seqlen_k": SK,
            },
        ),
        "cache": (
            fa.flash_attn_with_kvcache,
            {
                "q": q, "k_cache": torch.zeros(B, 12, HKV, D), "v_cache": torch.zeros(B, 12, HKV, D),
                "k": k[:, :SQ], "v": k[:, :SQ], "cache_seqlens": 3,
            },
        ),
    }  # fmt: skip
    run, arguments = calls[function]
    with pytest.raises(error, match=match):
        run(**(arguments | change))


@pytest.mark.parametrize("shape", [(B, SQ, 2, H, D), (B, SQ, 3, D)])
def test_packed_shapes_are_checked(shape):
    with pytest.raises(ValueError, match="qkv"):
        fa.flash_attn_qkvpacked_func(torch.zeros(shape))
    with pytest.raises(ValueError, match="kv"):
        fa.flash_attn_kvpacked_func(torch.zeros(B, SQ, H, D), torch.zeros(B, SQ, 1, H, D))
    with pytest.raises(ValueError, match="attention_mask"):
        fa.unpad_input(torch.zeros(2, 3, 4), torch.ones(2, 4))
