"""Nothing in, nothing out: modules and models with an empty batch and empty lengths, as torch's."""

import copy
import itertools
import re
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from zero_sizes import DIM, EMBED, HEADS, KV_HEADS, backward, by_sizes, randn, run, same

import fastattn
from fastattn import models
from fastattn.models import GPT, BertConfig, GPTConfig

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


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize(("batch", "length"), [(0, 5), (2, 0), (0, 0)])
@pytest.mark.parametrize("preset", ["bert-base-uncased", "modernbert-base"])
@pytest.mark.parametrize("name", sorted(n for n in dir(models) if n.startswith("Bert") and n != "BertConfig"))
def test_encoders(name, preset, batch, length, mask):
    changes = {
        "num_hidden_layers": 1,
        "pad_token_id": 0,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "intermediate_size": 32,
    }
    if preset == "modernbert-base":
        changes["layer_types"] = ["full_attention"]
    config = BertConfig.preset(preset, vocab_size=11, num_labels=3, **changes)
    ids = torch.zeros(batch, length, dtype=torch.long)
    poolings = ("mean", "cls", "max") if name == "BertForEmbedding" else ("",)
    for pooling in poolings:
        model = getattr(models, name)(config, **({"pooling": pooling} if pooling else {}))
        out = model(ids, attention_mask=torch.ones_like(ids) if mask else None)
        results = [value for value in out if isinstance(value, torch.Tensor)]
        assert results
        assert all(value.shape[0] == batch and value.isfinite().all() for value in results)
        if any(value.requires_grad for value in results):
            sum(value.sum() for value in results).backward()
