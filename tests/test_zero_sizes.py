"""Nothing in, nothing out: every public call with an empty batch and empty lengths, as torch where torch runs it."""

import copy
import itertools
import re
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastattn
from fastattn import reference
from fastattn.integrations import flash_attn
from fastattn.integrations.export import plain_torch
from fastattn.models import GPT, GPTConfig

EMBED, HEADS, KV_HEADS, DIM = 24, 4, 2, 8
SIZES = [(0, 3, 5), (2, 0, 5), (2, 3, 0), (0, 0, 5), (2, 0, 0), (0, 3, 0), (0, 0, 0)]  # (B, L, S)
by_sizes = pytest.mark.parametrize("sizes", SIZES, ids=lambda s: "B{} L{} S{}".format(*s))


def randn(*shape, grad=True):
    return torch.randn(shape, dtype=torch.float64, requires_grad=grad)


def backward(results, leaves):
    """The gradients of everything finite in the results; None where a leaf takes no part."""
    total = sum((r[r.isfinite()].sum() for r in results if isinstance(r, Tensor)), torch.zeros(()))
    if not total.requires_grad:
        return [None] * len(leaves)
    return torch.autograd.grad(total, leaves, allow_unused=True)


def same(actual, expected):
    """Equal shapes and values; an absent gradient is one of zeros."""
    assert len(actual) == len(expected)
    for ours, theirs in zip(actual, expected):
        if ours is None or theirs is None:
            present = theirs if ours is None else ours
            assert present is None or not present.any()
        else:
            torch.testing.assert_close(ours, theirs, equal_nan=True)


def run(call, *tensors):
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    results = call(*leaves)
    results = results if isinstance(results, tuple) else (results,)
    return [*results, *backward(results, leaves)]


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


CONSTRUCTIONS = {
    "plain": {},
    "bias_kv": {"add_bias_kv": True},
    "zero_attn": {"add_zero_attn": True},
    "everything": {"kdim": 10, "vdim": 11, "add_bias_kv": True, "add_zero_attn": True},
}
MASKS = {
    "no mask": lambda B, L, S: {},
    "attn_mask": lambda B, L, S: {"attn_mask": torch.zeros(L, S, dtype=torch.bool)},
    "float by head": lambda B, L, S: {"attn_mask": torch.zeros(B * HEADS, L, S, dtype=torch.float64)},
    "padding": lambda B, L, S: {"key_padding_mask": torch.zeros(B, S, dtype=torch.bool)},
    "both": lambda B, L, S: {
        "attn_mask": torch.zeros(L, S, dtype=torch.float64),
        "key_padding_mask": torch.zeros(B, S, dtype=torch.float64),
    },
}


def tried(call):
    """A result, or None where torch's own code cannot tell a size of -1 or stacks nothing."""
    known = r"unspecified dimension size -1|expects a non-empty TensorList|select\(\): index -1 out of range"
    try:
        return call()
    except (RuntimeError, IndexError) as error:
        if not re.search(known, str(error)):
            raise
        return None


@by_sizes
@pytest.mark.parametrize("masks", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("construction", CONSTRUCTIONS.values(), ids=CONSTRUCTIONS)
@pytest.mark.parametrize("batch_first", [False, True])
def test_multi_head_attention(sizes, masks, construction, batch_first):
    B, L, S = sizes
    theirs = nn.MultiheadAttention(EMBED, HEADS, batch_first=batch_first, dtype=torch.float64, **construction)
    ours = fastattn.MultiHeadAttention(
        EMBED, HEADS, batch_first=batch_first, dtype=torch.float64, **construction
    )
    ours.load_state_dict(theirs.state_dict())
    widths = zip((L, S, S), (EMBED, theirs.kdim, theirs.vdim))
    tensors = [randn(*((B, n) if batch_first else (n, B)), width) for n, width in widths]
    options = masks(*sizes)
    for need_weights, average in ((False, True), (True, True), (True, False)):
        kwargs = {**options, "need_weights": need_weights, "average_attn_weights": average}
        results = []
        for module in (ours, theirs):
            leaves = [*tensors, *module.parameters()]
            outputs = tried(lambda module=module, kwargs=kwargs: module(*tensors, **kwargs))
            assert outputs is not None or module is theirs
            results.append(None if outputs is None else [*outputs, *backward(outputs, leaves)])
        out, weights = results[0][:2]
        assert out.shape == tensors[0].shape
        keys = S + (theirs.bias_k is not None) + theirs.add_zero_attn
        if need_weights:
            assert weights.shape == ((B, L, keys) if average else (B, HEADS, L, keys))
        if results[1] is not None:
            same(*results)


@pytest.mark.parametrize(("length", "keys"), [(0, 5), (3, 0), (0, 0)])
@pytest.mark.parametrize("need_weights", [True, False])
def test_unbatched_multi_head_attention(length, keys, need_weights):
    theirs = nn.MultiheadAttention(EMBED, HEADS, dtype=torch.float64)
    ours = copy.deepcopy(theirs)
    fastattn.swap_attention(ours)
    tensors = [randn(n, EMBED) for n in (length, keys, keys)]
    results = [
        run(lambda *t, module=module: module(*t, need_weights=need_weights), *tensors)
        for module in (ours, theirs)
    ]
    same(*results)


def test_grouped_heads_with_every_option():
    module = fastattn.MultiHeadAttention(
        EMBED,
        HEADS,
        batch_first=True,
        num_kv_heads=KV_HEADS,
        rotary=True,
        qk_norm=True,
        sinks=True,
        softcap=5.0,
    )
    for batch, length in ((0, 3), (2, 0), (0, 0)):
        x = torch.randn(batch, length, EMBED, requires_grad=True)
        out, weights = module(x, x, x, causal=True)
        assert (out.shape, weights.shape) == (x.shape, (batch, length, length))
        out.sum().backward()
        assert x.grad.shape == x.shape


@by_sizes
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_swapped_encoders_and_decoders(sizes, batch_first, training):
    B, L, S = sizes
    options = {"dropout": 0.0, "batch_first": batch_first, "dtype": torch.float64}
    pairs = []
    for stack, layer in (
        (nn.TransformerEncoder, nn.TransformerEncoderLayer),
        (nn.TransformerDecoder, nn.TransformerDecoderLayer),
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # what keeps a stack from nested tensors
            theirs = stack(layer(EMBED, HEADS, 16, **options), 2).train(training)
        ours = copy.deepcopy(theirs)
        assert fastattn.swap_attention(ours).swapped
        pairs.append((ours, theirs))
    x, memory = (randn(*((B, n) if batch_first else (n, B)), EMBED) for n in (L, S))
    for kind, grad in itertools.product((None, torch.bool, torch.float64), (True, False)):
        encoder_options, decoder_options = {}, {}
        if kind is not None:
            encoder_options = {"src_key_padding_mask": torch.zeros(B, L, dtype=kind)}
            decoder_options = {
                "tgt_mask": torch.zeros(L, L, dtype=kind),
                "memory_key_padding_mask": torch.zeros(B, S, dtype=kind),
            }
        calls = [
            (pairs[0], [x], encoder_options),
            (pairs[1], [x, memory], decoder_options),
        ]
        for modules, tensors, kwargs in calls:
            results = []
            for module in modules:
                leaves = [*tensors, *module.parameters()] if grad else []
                with torch.set_grad_enabled(grad):
                    out = tried(lambda m=module, t=tensors, o=kwargs: m(*t, **o))
                    results.append(None if out is None else [out, *backward((out,), leaves)])
            if results[1] is not None:
                same(*results)
            elif modules is pairs[1]:  # an encoder may fail in torch's code before it reaches a layer
                assert results[0][0].shape == x.shape


@pytest.mark.parametrize("positions", ["learned", "rotary", "alibi"])
@pytest.mark.parametrize(("batch", "length"), [(0, 5), (2, 0), (0, 0)])
def test_gpt(positions, batch, length):
    config = GPTConfig(vocab_size=11, n_positions=16, n_embd=32, n_layer=2, n_head=4, positions=positions)
    model = GPT(config).eval()
    ids = torch.zeros(batch, length, dtype=torch.long)
    for options in (
        {},
        {"labels": ids},
        {"attention_mask": torch.ones_like(ids), "labels": ids},
        {"segment_ids": ids, "labels": ids},
        {"logits_to_keep": 1},
    ):
        out = model(ids, **options)
        kept = min(1, length) if "logits_to_keep" in options else length
        assert out.logits.shape == (batch, kept, 11)
        assert out.last_hidden_state.shape == (batch, length, 32)
        if "labels" in options:
            assert out.loss.isnan()  # the mean of no target, as torch's
        out.logits.sum().backward()
    if length:
        for options in ({}, {"use_cache": False}, {"do_sample": True, "top_k": 2, "seed": 0}):
            assert model.generate(ids, max_new_tokens=3, **options).shape == (batch, length + 3)
        out = model.generate(ids, torch.ones_like(ids), max_new_tokens=3, eos_token_id=1)
        assert out.shape[0] == batch


@by_sizes
def test_the_attention_function_of_transformers(sizes):
    """The models themselves reshape to -1 before they reach it."""
    pytest.importorskip("transformers")
    from fastattn.integrations.transformers import attention_forward
    from fastattn.integrations.transformers_masks import structured_mask

    B, L, S = sizes
    q, k, v = (randn(B, HEADS, n, DIM) for n in (L, S, S))
    expected = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    padding = torch.ones(B, S, dtype=torch.bool)
    for mask in (
        None,
        structured_mask(B, L, S, attention_mask=padding, mask_function=lambda b, h, i, j: i >= 0),
        torch.ones(B, 1, L, S, dtype=torch.bool),
    ):
        out, _ = attention_forward(nn.Module(), q, k, v, mask, is_causal=False)
        same((out,), (expected,))
