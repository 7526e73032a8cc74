"""transformers models give on fastattn what they give on eager attention: logits, gradients, generated tokens."""

import copy
import itertools
import json
from importlib.util import find_spec

import pytest
import torch
import transformers as hf
from torch import nn
from transformers import masking_utils
from transformers_models import BATCH, LENGTH, MODELS, VOCAB, padding_mask
from transformers_rule import (
    assert_call_within_rule,
    assert_model_within_rule,
    assert_results_within_rule,
    eager_results,
    float64_throughout,
    loss_and_grads,
)

import fastattn
from fastattn.integrations import transformers as integration
from fastattn.integrations.structured_mask import StructuredMask
from fastattn.integrations.transformers_masks import structured_mask

integration.register()

PADDED = [
    (name, side)
    for name, example in MODELS.items()
    for side in ("none", "left", "right")
    if side == "none" or example.kind != "image"
]
GENERATING = [
    (name, side)
    for name, side in PADDED
    if MODELS[name].kind in ("causal", "seq2seq") or (MODELS[name].kind == "audio" and side == "none")
]


@pytest.mark.parametrize(("name", "padding"), PADDED)
def test_logits_and_all_gradients(name, padding):
    example = MODELS[name]
    assert_model_within_rule(example.make(), "fastattn", *example.inputs(padding))


def generate(model, implementation, prompt, **options):
    model.set_attn_implementation(implementation)
    options = {
        "max_new_tokens": 20,
        "min_new_tokens": 20,
        "do_sample": False,
        "no_repeat_ngram_size": 2,
    } | options
    with torch.no_grad():
        return model.generate(**prompt, pad_token_id=0, **options)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize(("name", "padding"), GENERATING)
def test_twenty_greedy_tokens(name, padding, cache):
    model, prompt = MODELS[name].make(), MODELS[name].prompt(padding)
    expected = generate(model, "eager", prompt, cache_implementation=cache)
    assert expected.unique().numel() > 4
    assert torch.equal(generate(model, "fastattn", prompt, cache_implementation=cache), expected)


@pytest.mark.parametrize("kind", ["Dynamic", "Static"])
def test_the_caches_of_windowed_layers_slide(kind):
    """What the twenty tokens above go through: one layer's cache forgets what lies before its window."""
    model, prompt = MODELS["gemma3"].make(), MODELS["gemma3"].prompt("left")
    done = generate(
        model, "fastattn", prompt, cache_implementation=kind.lower(), return_dict_in_generate=True
    )
    names = [type(layer).__name__ for layer in done.past_key_values.layers]
    assert names == [f"{kind}SlidingWindowLayer", f"{kind}Layer"]
    assert done.past_key_values.layers[0].keys.shape[2] < LENGTH


@pytest.mark.parametrize("name", ["llama", "gemma3", "t5"])
@pytest.mark.parametrize(
    "options",
    [{"num_beams": 3}, {"num_beams": 3, "cache_implementation": "static"}, {"use_cache": False}],
    ids=["beams", "beams, static", "no cache"],
)
def test_other_ways_to_generate(name, options):
    model, prompt = MODELS[name].make(), MODELS[name].prompt("left")
    expected = generate(model, "eager", prompt, **options)
    assert torch.equal(generate(model, "fastattn", prompt, **options), expected)


def test_drafted_tokens_are_checked_several_at_once(calls):
    model, prompt = MODELS["llama"].make(), {"input_ids": MODELS["llama"].prompt("none")["input_ids"][:1]}
    prompt["input_ids"] = prompt["input_ids"].repeat(1, 2)
    expected = generate(model, "eager", prompt, no_repeat_ngram_size=0)
    actual = generate(model, "fastattn", prompt, no_repeat_ngram_size=0, prompt_lookup_num_tokens=2)
    assert torch.equal(actual, expected)
    assert any(options["causal"] is True for options in calls)  # several queries at the end of a cache


NEEDS_TRITON = pytest.mark.skipif(find_spec("triton") is None, reason="needs triton")


@NEEDS_TRITON
@pytest.mark.parametrize(
    ("name", "padding"),
    [
        ("gpt2", "none"),
        ("mistral", "left"),
        ("gemma2", "right"),
        ("gpt_oss", "right"),
        ("t5", "none"),
    ],
)
def test_triton_runs_models_too(name, padding):
    example = MODELS[name]
    arguments, valid = example.inputs(padding)
    arguments, valid = {n: t[1:2] for n, t in arguments.items()}, valid[1:2]  # interpreted: one row is plenty
    assert_model_within_rule(example.make(), "fastattn_triton", arguments, valid)


@NEEDS_TRITON
def test_triton_generates_too():
    model, prompt = MODELS["gemma3"].make(), MODELS["gemma3"].prompt("left")
    prompt = {name: t[1:2] for name, t in prompt.items()}
    few = {"max_new_tokens": 3, "min_new_tokens": 3}
    expected = generate(model, "eager", prompt, **few)
    assert torch.equal(generate(model, "fastattn_triton", prompt, **few), expected)


@pytest.fixture
def calls(monkeypatch):
    """The options of every attention call."""
    seen = []
    monkeypatch.setattr(
        integration, "attention", lambda *a, **k: seen.append(k) or fastattn.attention(*a, **k)
    )
    return seen


def structure(options):
    """What of a mask a kernel was given, by name."""
    return {
        n
        for n in ("causal", "window", "mask", "bias", "segment_ids", "key_lengths")
        if options.get(n) is not None and options[n] is not False
    }


def run(name, implementation="fastattn", padding="none", **more):
    model = MODELS[name].make()
    model.set_attn_implementation(implementation)
    arguments, valid = MODELS[name].inputs(padding)
    return model(**arguments, **more).logits[valid]


@pytest.mark.parametrize(
    ("name", "padding", "expected"),
    [
        ("llama", "none", [{"causal"}, {"causal"}]),
        ("llama", "right", [{"causal", "key_lengths"}] * 2),
        ("llama", "left", [{"causal", "segment_ids"}] * 2),
        ("mistral", "none", [{"causal", "window"}] * 2),
        ("gemma3", "right", [{"causal", "window", "key_lengths"}, {"causal", "key_lengths"}]),
        ("bert", "none", [set(), set()]),
        ("bert", "right", [{"key_lengths"}] * 2),
        ("modernbert", "none", [set(), {"window"}]),
        ("t5", "none", [{"bias"}] * 2 + [{"causal", "bias"}, {"bias"}] * 2),
    ],
)
def test_structure_reaches_the_kernel(calls, name, padding, expected):
    run(name, padding=padding)
    assert [structure(options) for options in calls] == expected


def test_a_window_that_reaches_everything_is_none(calls):
    model = hf.MistralForCausalLM(MODELS["mistral"].build().config).eval()
    model.config.sliding_window = LENGTH
    model.set_attn_implementation("fastattn")
    model(**MODELS["mistral"].inputs()[0])
    assert [structure(options) for options in calls] == [{"causal"}] * 2


PATTERNS = {
    "causal": masking_utils.causal_mask_function,
    "bidirectional": masking_utils.bidirectional_mask_function,
    "window": masking_utils.sliding_window_causal_mask_function(3),
    "window of one": masking_utils.sliding_window_causal_mask_function(1),
    "two-sided": masking_utils.sliding_window_bidirectional_mask_function(2),
    "both windows": masking_utils.and_masks(
        masking_utils.sliding_window_causal_mask_function(4),
        masking_utils.sliding_window_causal_mask_function(3),
    ),
}
PACKED = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4, 0], [0, 1, 2, 3, 4, 5, 6, 0, 1], list(range(9))])
STRUCTURED = {"causal", "bidirectional", "window", "window of one", "two-sided", "both windows"}


def masks_of(pattern, seqlen_q, past, total, padding, offset_tensor=False):
    """(ours, transformers' dense bool mask) for queries after `past` tokens of a cache of `total` places."""
    places = {
        "batch_size": BATCH, "q_length": seqlen_q, "kv_length": total, "mask_function": pattern, "kv_offset": 0,
        "q_offset": torch.tensor([past]) if offset_tensor else past,
        "attention_mask": padding, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False,
        "use_vmap": False, "device": torch.device("cpu"), "dtype": torch.float32, "config": None,
    }  # fmt: skip
    return structured_mask(**places), masking_utils.sdpa_mask(**places)


@pytest.mark.parametrize("name", PATTERNS)
def test_a_structured_mask_is_transformers_mask(name):
    kinds = set()
    for (seqlen_q, past, extra), side, as_tensor in itertools.product(
        [(9, 0, 0), (4, 5, 0), (1, 8, 0), (6, 0, 3), (1, 5, 3), (3, 4, 2)],
        ("none", "left", "right"),
        (False, True),
    ):
        padding = None if side == "none" else padding_mask(side)[:, : seqlen_q + past]
        ours, dense = masks_of(PATTERNS[name], seqlen_q, past, seqlen_q + past + extra, padding, as_tensor)
        assert torch.equal(ours.dense() if isinstance(ours, StructuredMask) else ours, dense)
        assert tuple(ours.shape) == tuple(dense.shape)
        kinds.add(type(ours))
        if extra == 0:
            assert isinstance(ours, StructuredMask)
    assert StructuredMask in kinds


def test_packed_documents_are_segments():
    for pattern in (PATTERNS["causal"], PATTERNS["window"]):
        ids = masking_utils.find_packed_sequence_indices(PACKED)
        within = masking_utils.remap_positions_for_packed_sequence(pattern, PACKED)
        packed = masking_utils.and_masks(within, masking_utils.packed_sequence_mask_function(ids))
        ours, dense = masks_of(packed, LENGTH, 0, LENGTH, None)
        assert isinstance(ours, StructuredMask)
        assert ours.segment_ids is not None
        assert torch.equal(ours.dense(), dense)


@pytest.mark.parametrize(
    "pattern",
    [
        masking_utils.chunked_causal_mask_function(3, torch.zeros(BATCH, dtype=torch.int64)),
        masking_utils.or_masks(
            PATTERNS["causal"], masking_utils.blockwise_overlay(torch.zeros(BATCH, 9, dtype=torch.int64))
        ),
        masking_utils.and_masks(PATTERNS["causal"], lambda b, h, q, k: (q + k) % 2 == 0),
        masking_utils.remap_positions_for_packed_sequence(PATTERNS["causal"], PACKED),
    ],
)
def test_other_masks_become_dense(pattern):
    ours, dense = masks_of(pattern, LENGTH, 0, LENGTH, None)
    assert isinstance(ours, torch.Tensor)
    assert torch.equal(ours, dense)


def test_a_structured_mask_is_a_tensor_to_others():
    mask, dense = masks_of(PATTERNS["window"], 4, 5, 9, padding_mask("left"))
    assert mask.dtype == torch.bool
    assert mask.ndim == mask.dim() == 4
    assert torch.equal(mask[:, :, 1:], dense[:, :, 1:])
    assert torch.equal(mask & dense, dense)
    assert torch.equal(~mask | dense, torch.ones_like(dense))
    assert torch.equal(torch.cat([mask, dense], -1), torch.cat([dense, dense], -1))
    assert torch.equal(torch.where(mask, 0.0, -1.0), torch.where(dense, 0.0, -1.0))
    assert torch.equal(mask.to(torch.float32), dense.float())
    assert isinstance(mask.to("cpu"), StructuredMask)
    assert mask.contiguous() is mask
    assert torch.equal(copy.deepcopy(mask).dense(), dense)
    assert not hasattr(mask, "nothing_of_that_name")


@pytest.mark.parametrize("pass_as", ["position_ids", "position_ids and no cache", "cu_seq_lens"])
def test_packed_documents_do_not_see_each_other(calls, pass_as):
    """With a cache, transformers' own masks forget that position_ids are packed."""
    model = MODELS["llama"].make()
    ids = torch.randint(3, VOCAB, (1, 9))
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4, 0]])
    more = {"position_ids": positions, "use_cache": pass_as != "position_ids and no cache"}
    if pass_as == "cu_seq_lens":
        ends = torch.tensor([0, 3, 8, 9], dtype=torch.int32)
        more |= {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends.clone(), "max_length_q": 5, "max_length_k": 5}
    model.set_attn_implementation("fastattn")
    assert_call_within_rule(
        model,
        lambda model: {"logits": model(ids, **more).logits},
        lambda model: {"logits": torch.cat([model(part).logits for part in ids.split([3, 5, 1], 1)], 1)},
    )
    assert [structure(options) for options in calls] == [{"causal", "segment_ids"}] * 2


def test_positions_of_padding_are_not_packed(calls):
    """`generate` numbers padding from 0 on the right, too."""
    model, (arguments, _) = MODELS["llama"].make(), MODELS["llama"].inputs("right")
    positions = (arguments["attention_mask"].cumsum(-1) - 1).masked_fill(arguments["attention_mask"] == 0, 0)
    model.set_attn_implementation("fastattn")
    assert_call_within_rule(
        model, lambda model: {"logits": model(**arguments, position_ids=positions).logits}
    )
    assert [structure(options) for options in calls] == [{"causal", "key_lengths"}] * 2


def test_positions_that_only_skip_are_not_packed(calls):
    model = MODELS["llama"].make()
    ids, positions = torch.randint(3, VOCAB, (1, 9)), torch.arange(9)[None] * 2
    more = {"attention_mask": torch.ones_like(ids), "position_ids": positions}
    model.set_attn_implementation("fastattn")
    assert_call_within_rule(model, lambda model: {"logits": model(ids, **more).logits})


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3"])
@pytest.mark.parametrize("padding", ["none", "left"])
def test_prefill_in_chunks_aligns_to_the_last_key(calls, name, padding):
    model = MODELS[name].make()
    arguments, valid = MODELS[name].inputs(padding)
    mask = padding_mask(padding).long()

    def in_two_chunks(model):
        first = model(arguments["input_ids"][:, :5], attention_mask=mask[:, :5], use_cache=True)
        second = model(
            arguments["input_ids"][:, 5:], attention_mask=mask, past_key_values=first.past_key_values
        )
        return {"logits": torch.cat([first.logits, second.logits], 1)[valid]}

    model.set_attn_implementation("fastattn")
    assert_call_within_rule(model, in_two_chunks)
    assert all("mask" not in structure(options) for options in calls)
    assert {options["causal"] for options in calls} == {"top_left", True}


@pytest.mark.parametrize("as_float", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_a_mask_of_the_users_own(calls, name, as_float):
    mask = (torch.rand(BATCH, 1, LENGTH, LENGTH) < 0.5) | torch.eye(LENGTH, dtype=torch.bool)
    additive = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    model, (arguments, _) = MODELS[name].make(), MODELS[name].inputs()
    model.set_attn_implementation("fastattn")
    assert_call_within_rule(
        model,
        lambda model: {"logits": model(**arguments, attention_mask=additive if as_float else mask).logits},
        lambda model: {"logits": model(**arguments, attention_mask=additive.to(model.dtype)).logits},
    )
    assert structure(calls[0]) == {"bias" if as_float else "mask"}


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2", "gpt_oss", "whisper", "t5"])
def test_output_attentions_are_the_weights(name):
    model, (arguments, _) = MODELS[name].make(), MODELS[name].inputs()
    kinds = ("attentions", "encoder_attentions", "decoder_attentions", "cross_attentions")

    def weights(model):
        inputs = {n: t.to(model.dtype) if t.is_floating_point() else t for n, t in arguments.items()}
        found = model(**inputs, output_attentions=True)
        return {f"{kind} {i}": w for kind in kinds for i, w in enumerate(found.get(kind) or ())}

    plain, golden = eager_results(model, weights)
    assert golden
    model.set_attn_implementation("fastattn")
    actual = weights(model)
    assert actual.keys() == golden.keys()
    assert_results_within_rule(actual, plain, golden)


def test_rows_that_see_nothing_are_finite():
    model, (arguments, _) = MODELS["llama"].make(), MODELS["llama"].inputs("left")
    model.set_attn_implementation("fastattn")
    logits = model(**arguments).logits
    assert logits.isfinite().all()
    logits.sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
@pytest.mark.parametrize("name", ["llama", "gemma3", "t5", "bart"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(name, reentrant):
    model, (arguments, valid) = MODELS[name].make(), MODELS[name].inputs("left")
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    for attribute in ("dropout", "attention_dropout", "activation_dropout"):
        for module in model.modules():
            if isinstance(getattr(module, attribute, None), float):
                setattr(module, attribute, 0.0)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    assert_model_within_rule(model, "fastattn", arguments, valid)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_.*able:FutureWarning")
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_draws_the_same_dropout_again(reentrant):
    model, (arguments, valid) = MODELS["llama"].make().train(), MODELS["llama"].inputs()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.4
    results = []
    for checkpointed in (False, True, False):
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        else:
            model.gradient_checkpointing_disable()
        torch.manual_seed(len(results) // 2)
        results.append(loss_and_grads(model, "fastattn", arguments, valid))
    plain, again, other_seed = results
    torch.manual_seed(0)
    with float64_throughout():
        golden = loss_and_grads(copy.deepcopy(model).double(), "fastattn", arguments, valid)
    assert_results_within_rule(again, plain, golden)
    assert not torch.allclose(other_seed["logits"], plain["logits"])


@pytest.mark.parametrize("name", ["llama", "gemma2", "bert"])
def test_autocast(name):
    with torch.autocast("cpu", torch.bfloat16):
        actual, expected = run(name, padding="right"), run(name, "eager", padding="right")
    assert actual.dtype == expected.dtype
    exact = run(name, "eager", padding="right")
    assert (actual - exact).norm() <= 2 * (expected - exact).norm()


@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("name", ["gpt2", "gemma3"])
def test_compiles_whole(name, padding):
    model, (arguments, valid) = MODELS[name].make(), MODELS[name].inputs(padding)
    model.config.use_cache = False
    model.set_attn_implementation("fastattn")
    plain, golden = eager_results(model, lambda model: {"logits": model(**arguments).logits[valid]})
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert_results_within_rule({"logits": compiled(**arguments).logits[valid]}, plain, golden)


@pytest.mark.parametrize("padding", ["none", "left"])
def test_a_compiled_decoding_step_is_compiled_once(padding):
    graphs = []
    model, prompt = MODELS["llama"].make(), MODELS["llama"].prompt(padding)
    expected = generate(model, "fastattn", prompt)
    forward = model.forward
    torch._dynamo.reset()
    step = torch.compile(forward, backend=lambda graph, _: graphs.append(graph) or graph, fullgraph=True)
    model.forward = (
        lambda input_ids=None, past_key_values=None, attention_mask=None, position_ids=None, **kwargs: (
            step if input_ids.shape[1] == 1 else forward
        )(
            input_ids=input_ids,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **kwargs,
        )
    )
    actual = generate(model, "fastattn", prompt, cache_implementation="static", disable_compile=True)
    assert torch.equal(actual, expected)
    assert len(graphs) == 1


def call(**change):
    module = nn.Module()
    arguments = {
        "query": torch.randn(2, 4, 5, 8), "key": torch.randn(2, 2, 5, 8), "value": torch.randn(2, 2, 5, 6),
        "attention_mask": None, "scaling": 0.3,
    } | change  # fmt: skip
    module.is_causal = arguments.pop("module_is_causal", True)
    return integration.attention_forward(module, **arguments), arguments


def test_the_attention_function_by_itself():
    (out, weights), a = call(use_cache=True, layer_idx=3, output_router_logits=False, deterministic=False)
    expected = fastattn.attention(a["query"], a["key"], a["value"], causal=True, scale=0.3)
    assert torch.equal(out, expected.transpose(1, 2))
    assert out.shape == (2, 5, 4, 6)
    assert out.is_contiguous()
    assert weights is None
    (out, _), a = call(module_is_causal=True, is_causal=False)
    assert torch.equal(out, fastattn.attention(a["query"], a["key"], a["value"], scale=0.3).transpose(1, 2))
    (out, _), a = call(query=torch.randn(1, 4, 5, 8), is_causal=False)
    shared = a["query"].expand(2, -1, -1, -1)
    assert torch.equal(out, fastattn.attention(shared, a["key"], a["value"], scale=0.3).transpose(1, 2))


def test_the_attention_function_as_models_call_it():
    """Five positional arguments; a single query sees the whole cache; dropout; keywords it has no use for."""
    module = nn.Module()
    module.is_causal = True
    q, k, v = torch.randn(2, 4, 1, 8), torch.randn(2, 4, 7, 8), torch.randn(2, 4, 7, 8)
    out, _ = integration.attention_forward(
        module, q, k, v, None, position_ids=torch.full((2, 1), 6), encoder_hidden_states=None, use_cache=True
    )
    assert torch.equal(out, fastattn.attention(q, k, v).transpose(1, 2))
    torch.manual_seed(5)
    out, _ = integration.attention_forward(module, q, k, v, None, dropout=0.5)
    torch.manual_seed(5)
    assert torch.equal(out, fastattn.attention(q, k, v, dropout_p=0.5).transpose(1, 2))


def test_without_a_mask_it_counts_from_the_first_key():
    """A static cache at prefill: more places than queries, and no mask."""
    (out, _), a = call(key=torch.randn(2, 2, 8, 8), value=torch.randn(2, 2, 8, 6))
    expected = fastattn.attention(
        a["query"], a["key"][:, :, :5], a["value"][:, :, :5], causal=True, scale=0.3
    )
    torch.testing.assert_close(out, expected.transpose(1, 2))


def test_without_a_mask_the_window_that_came_beside_it_counts():
    (out, _), a = call(sliding_window=2)
    expected = fastattn.attention(a["query"], a["key"], a["value"], causal=True, window=(1, 0), scale=0.3)
    torch.testing.assert_close(out, expected.transpose(1, 2))
    (out, _), a = call(sliding_window=2, is_causal=False)
    expected = fastattn.attention(a["query"], a["key"], a["value"], window=(1, 1), scale=0.3)
    torch.testing.assert_close(out, expected.transpose(1, 2))


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"cache": object()}, ValueError, "cache"),
        ({"indices": torch.zeros(1)}, ValueError, "indices"),
        ({"block_indices": torch.zeros(1)}, ValueError, "block_indices"),
        ({"sinks": torch.zeros(1)}, ValueError, "sinks"),
        ({"attention_mask": torch.ones(2, 5, dtype=torch.bool)}, ValueError, "attention_mask"),
        ({"attention_mask": "mask"}, ValueError, "attention_mask"),
        ({"attention_mask": torch.ones(2, 1, 5, 5, dtype=torch.int64)}, TypeError, "attention_mask"),
        ({"attention_mask": torch.ones(2, 1, 5, 6, dtype=torch.bool)}, ValueError, "mask"),
        ({"attention_mask": StructuredMask((2, 1, 5, 6), "cpu")}, ValueError, "attention_mask"),
        (
            {"cu_seq_lens_q": torch.tensor([0, 5]), "cu_seq_lens_k": torch.tensor([0, 5])},
            ValueError,
            "cu_seq_lens_q",
        ),
        ({"s_aux": torch.zeros(3)}, ValueError, "sinks"),
    ],
)
def test_refused(change, error, match):
    with pytest.raises(error, match=match):
        call(**change)


def test_documents_of_differing_lengths_need_plain_attention():
    one_row = {n: torch.randn(1, 2, 5, 8) for n in ("query", "key", "value")}
    ends = {"cu_seq_lens_q": torch.tensor([0, 2, 5]), "cu_seq_lens_k": torch.tensor([0, 3, 5])}
    with pytest.raises(ValueError, match="cu_seq_lens_k"):
        call(**one_row, **ends)
    (out, _), _ = call(**one_row, **ends, is_causal=False)
    q, k, v = one_row.values()
    parts = [
        fastattn.attention(q[:, :, a:b], k[:, :, c:d], v[:, :, c:d], scale=0.3)
        for a, b, c, d in ((0, 2, 0, 3), (2, 5, 3, 5))
    ]
    torch.testing.assert_close(out, torch.cat(parts, 2).transpose(1, 2))


def test_registering_again_changes_nothing():
    def registered():
        return (
            dict(hf.AttentionInterface._global_mapping),
            dict(masking_utils.AttentionMaskInterface._global_mapping),
        )

    before = registered()
    integration.register()
    assert registered() == before
    names = {"fastattn", "fastattn_torch", "fastattn_triton"}
    assert all(names <= mapping.keys() for mapping in before)
    assert not any(word in name for name in names for word in ("flash", "sdpa", "flex"))


def test_an_interface_of_another_make_is_refused(monkeypatch):
    monkeypatch.setattr(masking_utils, "sdpa_mask", lambda batch_size, cache_position, kv_length: None)
    with pytest.raises(ImportError, match="transformers"):
        integration.register()


def test_the_choice_is_not_written_to_the_config(tmp_path):
    model = MODELS["llama"].make()
    fastattn.swap_attention(model)
    model.save_pretrained(tmp_path)
    assert "fastattn" not in json.dumps(json.loads((tmp_path / "config.json").read_text()))
    again = hf.LlamaForCausalLM.from_pretrained(tmp_path, attn_implementation="fastattn")
    assert again.config._attn_implementation == "fastattn"


def test_the_parts_of_a_model_can_be_chosen_one_by_one(calls):
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    text = hf.CLIPTextConfig(**small, vocab_size=VOCAB, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    vision = hf.CLIPVisionConfig(**small, image_size=16, patch_size=8)
    model = hf.CLIPModel(hf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).eval()
    inputs = {"input_ids": torch.randint(3, VOCAB, (2, 5)), "pixel_values": torch.randn(2, 3, 16, 16)}
    inputs["input_ids"][:, -1] = 2

    def similarities(model):
        pixels = inputs["pixel_values"].to(model.dtype)
        return {"logits": model(**inputs | {"pixel_values": pixels}).logits_per_image}

    plain, golden = eager_results(model, similarities)
    model.set_attn_implementation({"text_config": "fastattn", "vision_config": "sdpa"})
    assert_results_within_rule(similarities(model), plain, golden)
    assert [structure(options) for options in calls] == [{"causal"}]
    report = fastattn.swap_attention(model)
    assert len(report.already) == len(report.swapped) == 1
    assert_results_within_rule(similarities(model), plain, golden)
    fastattn.restore_attention(model)
    implementations = (model.config.text_config, model.config.vision_config)
    assert [config._attn_implementation for config in implementations] == ["fastattn", "sdpa"]


def test_weights_asked_for_by_the_config_are_refused_by_transformers():
    model = MODELS["bert"].make()
    model.set_attn_implementation("fastattn")
    with pytest.raises(ValueError, match="output_attentions"):
        model.config.output_attentions = True


def test_continuous_batching_is_refused_by_transformers():
    model = MODELS["llama"].make()
    model.set_attn_implementation("fastattn")
    with pytest.raises(ValueError, match="fastattn"):
        model.generate_batch([[3, 4, 5]], hf.GenerationConfig(max_new_tokens=2))


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.text = MODELS["llama"].make()
        self.other = nn.ModuleList([nn.MultiheadAttention(32, 4, batch_first=True), MODELS["t5"].make()])

    def forward(self, ids):
        x = self.text.model(ids).last_hidden_state
        x = x + self.other[0](x, x, x, need_weights=False)[0]
        return x + self.other[1].encoder(inputs_embeds=x).last_hidden_state


def snapshot(model):
    return {
        name: (type(m), sorted(vars(m)), getattr(m, "config", None) and m.config._attn_implementation)
        for name, m in model.named_modules()
    }


def test_swap_finds_transformers_models_anywhere():
    model = Mixed().eval()
    ids = torch.randint(3, VOCAB, (2, 7))
    plain, golden = eager_results(model, lambda model: {"out": model(ids)})
    before = snapshot(model)
    report = fastattn.swap_attention(model)
    assert set(report.swapped) == {
        "text.model.layers.0.self_attn", "text.model.layers.1.self_attn", "other.0",
        *(f"other.1.{part}.block.{i}.layer.0.SelfAttention" for part in ("encoder", "decoder") for i in (0, 1)),
        *(f"other.1.decoder.block.{i}.layer.1.EncDecAttention" for i in (0, 1)),
    }  # fmt: skip
    assert report.left == report.already == ()
    assert_results_within_rule({"out": model(ids)}, plain, golden)
    once = snapshot(model)
    assert set(fastattn.swap_attention(model).already) == set(report.swapped)
    assert snapshot(model) == once
    fastattn.swap_attention(model, backend="torch")
    assert model.text.config._attn_implementation == "fastattn_torch"
    assert set(fastattn.restore_attention(model)) == set(report.swapped)
    assert snapshot(model) == before
    assert fastattn.restore_attention(model) == ()


def test_a_swapped_model_can_be_copied_and_saved(tmp_path):
    model = MODELS["bert"].make()
    fastattn.swap_attention(model)
    torch.save(model, tmp_path / "model.pt")
    for twin in (copy.deepcopy(model), torch.load(tmp_path / "model.pt", weights_only=False)):
        assert twin.config._attn_implementation == "fastattn"
        assert len(fastattn.restore_attention(twin)) == 2
        assert twin.config._attn_implementation == "sdpa"
    assert model.config._attn_implementation == "fastattn"


def test_what_its_user_chose_since_the_swap_stays():
    model = MODELS["t5"].make()
    fastattn.swap_attention(model)
    model.set_attn_implementation("eager")
    assert fastattn.restore_attention(model) == ()
    assert model.config._attn_implementation == "eager"
    for again in range(2):
        assert len(fastattn.swap_attention(model).swapped) == 6
        if again == 0:
            model.set_attn_implementation("eager")
    fastattn.restore_attention(model)
    assert model.config._attn_implementation == "eager"


def test_what_its_user_chose_stays():
    model = MODELS["llama"].make()
    model.set_attn_implementation("fastattn")
    before = snapshot(model)
    report = fastattn.swap_attention(model, backend="torch")
    assert report.swapped == ()
    assert len(report.already) == 2
    assert fastattn.restore_attention(model) == ()
    assert snapshot(model) == before


def test_a_model_that_does_not_let_its_attention_be_chosen_is_left(monkeypatch):
    model = MODELS["llama"].make()
    monkeypatch.setattr(hf.LlamaForCausalLM, "_can_set_attn_implementation", classmethod(lambda cls: False))
    monkeypatch.setattr(hf.LlamaModel, "_can_set_attn_implementation", classmethod(lambda cls: False))
    before = snapshot(model)
    report = fastattn.swap_attention(model)
    assert report.swapped == ()
    assert [name for name, _ in report.left] == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    assert snapshot(model) == before


def test_training_half_swapped_goes_on_as_it_was():
    runs = []
    for swapped in (False, True):
        model = MODELS["gemma3"].make()
        ids = torch.randint(3, VOCAB, (4, 12), generator=torch.Generator().manual_seed(0))
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        losses = []
        for step in range(9):
            if swapped and step == 3:
                fastattn.swap_attention(model)
            if swapped and step == 6:
                fastattn.restore_attention(model)
            loss = model(ids, labels=ids).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        runs.append(losses)
    assert runs[0][-1] < runs[0][0]
    assert runs[1] == pytest.approx(runs[0], rel=1e-3)
