"""Nothing in, nothing out: every public function with an empty batch and empty lengths, as torch's."""

import pytest
import torch
import torch.nn.functional as F
from zero_sizes import DIM, HEADS, KV_HEADS, by_sizes, randn, run, same

import fastattn
from fastattn import reference
from fastattn.integrations import flash_attn
from fastattn.integrations.export import plain_torch

ATTENTION_OPTIONS = {
    "plain": lambda B, L, S: {},
    "causal": lambda B, L, S: {"causal": True},
    "top left": lambda B, L, S: {"causal": "top_left"},
    "window": lambda B, L, S: {"window": (1, 1)},
    "mask": lambda B, L, S: {"mask": torch.ones(B, 1, 1, S, dtype=torch.bool)},
    "segments": lambda B, L, S: {"segment_ids": (torch.zeros(B, L).int(), torch.zeros(B, S).int())},
    "lengths": lambda B, L, S: {"key_lengths": torch.full((B,), S)},
    "alibi": lambda B, L, S: {"alibi_slopes": torch.ones(B, HEADS, dtype=torch.float64)},
    "softcap": lambda B, L, S: {"softcap": 3.0},
    "dropout": lambda B, L, S: {"dropout_p": 0.5, "dropout_seed": 1},
}


@by_sizes
@pytest.mark.parametrize("options", ATTENTION_OPTIONS.values(), ids=ATTENTION_OPTIONS)
def test_attention(sizes, options):
    B, L, S = sizes
    tensors = randn(B, HEADS, L, DIM), randn(B, KV_HEADS, S, DIM), randn(B, KV_HEADS, S, DIM)
    shared = {**options(*sizes), "return_lse": True, "return_weights": True}
    extras = randn(B, HEADS, L, S), randn(HEADS)

    def call(function):
        return lambda q, k, v, b, s: function(q, k, v, bias=b, sinks=s, **shared)

    expected = run(call(reference.attention), *tensors, *extras)
    same(run(call(fastattn.attention), *tensors, *extras), expected)
    with plain_torch():
        same(run(call(fastattn.attention), *tensors, *extras), expected)
    del shared["return_lse"], shared["return_weights"]
    with plain_torch():
        same(run(call(fastattn.attention), *tensors, *extras)[:1], expected[:1])


@by_sizes
def test_varlen(sizes):
    B, L, S = sizes
    cu_seqlens = [torch.arange(B + 1, dtype=torch.int32) * n for n in (L, S)]
    tensors = randn(B * L, HEADS, DIM), randn(B * S, KV_HEADS, DIM), randn(B * S, KV_HEADS, DIM)

    def call(function, *bounds):
        return lambda q, k, v, sinks, slopes: function(
            q, k, v, *cu_seqlens, *bounds, sinks=sinks, alibi_slopes=slopes, causal=True, return_lse=True
        )

    extras = randn(HEADS), randn(B, HEADS)
    expected = run(call(reference.attention_varlen), *tensors, *extras)
    for bounds in ((), (L, S)):
        same(run(call(fastattn.attention_varlen, *bounds), *tensors, *extras), expected)
    with plain_torch():
        same(run(call(fastattn.attention_varlen), *tensors, *extras), expected)


@by_sizes
@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("new", [False, True])
def test_kv_cache(sizes, paged, new):
    B, L, S = sizes
    query = randn(B, HEADS, L, DIM, grad=False)
    fresh = randn(2, B, KV_HEADS, L, DIM, grad=False)
    held = randn(2, B, KV_HEADS, S + L, DIM, grad=False)
    options = {}
    if paged:  # a page holds a sequence, and there may be no page at all
        options["block_table"] = torch.arange(B, dtype=torch.int32)[:, None]
    if new:
        options |= dict(zip(("key", "value"), fresh))
        options |= {"rotary_cos": torch.ones(S + L, DIM // 2), "rotary_sin": torch.zeros(S + L, DIM // 2)}
    lengths = torch.full((B,), S, dtype=torch.int32)
    out, lse = fastattn.attention_kv_cache(query, *held.clone(), lengths, return_lse=True, **options)
    keys, values = (torch.cat((h[:, :, :S], f), dim=2) if new else h[:, :, :S] for h, f in zip(held, fresh))
    expected = reference.attention(query, keys, values, causal=True, return_lse=True)
    same((out, lse), expected)
    if not S and not new:
        none = torch.zeros(B, 0, dtype=torch.int32)
        pages = torch.zeros(2, 0, KV_HEADS, 16, DIM, dtype=torch.float64)
        out = fastattn.attention_kv_cache(query, *pages, lengths, block_table=none)
        same((out,), expected[:1])


LEADING = [(0,), (0, 4), (4, 0), (3, 0, 4), (0, 3, 4), ()]


@pytest.mark.parametrize("leading", LEADING, ids=str)
@pytest.mark.parametrize(("length", "keys"), [(3, 5), (0, 5), (3, 0), (0, 0)])
@pytest.mark.parametrize("kind", ["plain", "causal", "bool", "float", "float per batch", "dropout"])
def test_scaled_dot_product_attention(leading, length, keys, kind):
    if 0 not in (*leading, length, keys):
        pytest.skip("nothing is empty")
    tensors = [randn(*leading, n, DIM) for n in (length, keys, keys)]
    if kind == "bool":
        options = {"attn_mask": torch.ones(length, keys, dtype=torch.bool)}
    else:
        options = {"is_causal": kind == "causal", "dropout_p": float(kind == "dropout")}
    if kind.startswith("float"):
        tensors.append(randn(*(leading if kind.endswith("batch") else ()), length, keys))

    def call(function):
        return lambda q, k, v, *mask: function(q, k, v, *mask, **options)

    expected = run(call(F.scaled_dot_product_attention), *tensors)
    same(run(call(fastattn.scaled_dot_product_attention), *tensors), expected)
    with fastattn.sdpa_override():
        same(run(call(F.scaled_dot_product_attention), *tensors), expected)


@by_sizes
def test_flash_attn_functions(sizes):
    B, L, S = sizes
    q, k, v = (randn(B, n, HEADS, DIM) for n in (L, S, S))
    heads_first = [t.transpose(1, 2) for t in (q, k, v)]
    out, lse = reference.attention(*heads_first, causal=True, return_lse=True)
    expected = out.transpose(1, 2), lse
    for kind in ("func", "kvpacked"):
        function = getattr(flash_attn, f"flash_attn_{'' if kind == 'func' else 'kvpacked_'}func")
        operands = (q, k, v) if kind == "func" else (q, torch.stack((k, v), dim=2))
        same(function(*operands, causal=True, return_attn_probs=True)[:2], expected)
    packed = [t.flatten(0, 1) for t in (q, k, v)]
    cu_seqlens = [torch.arange(B + 1, dtype=torch.int32) * n for n in (L, S)]
    same(
        (flash_attn.flash_attn_varlen_func(*packed, *cu_seqlens, L, S, causal=True).unflatten(0, (B, L)),),
        expected[:1],
    )
    with torch.no_grad():
        cached = flash_attn.flash_attn_with_kvcache(q, k, v, causal=True, return_softmax_lse=True)
        same(cached, expected)
        cached = flash_attn.flash_attn_with_kvcache(q, k, v, k[:, :0], v[:, :0], cache_seqlens=S, causal=True)
        same((cached,), expected[:1])
    for length, tensor in ((L, q), (S, k)):
        tokens, indices, ends, longest, lengths = flash_attn.unpad_input(tensor, torch.ones(B, length))
        assert (len(tokens), longest, lengths.tolist()) == (B * length, length if B else 0, [length] * B)
        assert ends.tolist() == [length * b for b in range(B + 1)]
        same((flash_attn.pad_input(tokens, indices, B, length),), (tensor,))


SHAPES = [((0,), 0), ((0, 5), 1), ((5, 0), 1), ((5, 0), 0), ((2, 0, 3), 1), ((2, 0, 3), -1), ((0, 0), 0)]


@pytest.mark.parametrize(("shape", "dim"), SHAPES)
@pytest.mark.parametrize("kind", ["plain", "log", "causal", "mask"])
def test_softmax(shape, dim, kind):
    if kind == "causal" and len(shape) < 2:
        pytest.skip("causality needs two dimensions")
    torchs = F.log_softmax if kind == "log" else F.softmax
    options = {"mask": {"mask": torch.ones(shape, dtype=torch.bool)}}.get(kind, {kind: True})
    options = {} if kind == "plain" else options
    x = randn(*shape)
    same(run(lambda x: fastattn.softmax(x, dim, **options), x), run(lambda x: torchs(x, dim), x))


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("shape", [(0, 5), (0, 5, 3), (2, 5, 0)])
def test_cross_entropy(shape, reduction):
    logits, target = randn(*shape), torch.zeros((shape[0], *shape[2:]), dtype=torch.long)

    def call(function):
        return lambda x: function(x, target, reduction=reduction)

    same(run(call(fastattn.cross_entropy), logits), run(call(F.cross_entropy), logits))


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("shape", [(0, 4), (2, 0, 4), (0, 3, 4), (2, 0), (0,)], ids=str)
def test_linear_cross_entropy(shape, reduction):
    hidden, weight, bias = randn(*shape), randn(7, shape[-1]), randn(7)
    target = torch.zeros(shape[:-1], dtype=torch.long)

    def ours(h, w, b):
        return fastattn.linear_cross_entropy(h, w, target, bias=b, reduction=reduction)

    def theirs(h, w, b):
        logits = F.linear(h.reshape(target.numel(), shape[-1]), w, b)
        loss = F.cross_entropy(logits, target.flatten(), reduction=reduction)
        return loss.view(target.shape) if reduction == "none" else loss

    same(run(ours, hidden, weight, bias), run(theirs, hidden, weight, bias))
