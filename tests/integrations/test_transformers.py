"""transformers models give on fastattn what they give on eager attention: logits, gradients, tokens."""

import copy
from importlib.util import find_spec

import pytest
import torch
from torch import nn
from transformers_calls import generate, run
from transformers_models import LENGTH, MODELS
from transformers_rule import (
    assert_model_within_rule,
    assert_results_within_rule,
    eager_results,
    float64_throughout,
    loss_and_grads,
)

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
