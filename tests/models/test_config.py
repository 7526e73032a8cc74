"""GPTConfig: what it derives, what it refuses, and that every preset makes a model."""

import dataclasses
import json

import pytest
import torch

from fastattn.models import GPT, GPTConfig
from fastattn.models.config import PRESETS
from fastattn.models.presets import DECODERS

ROTARY = {"positions": "rotary"}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def test_defaults_are_gpt2_small():
    transformers = pytest.importorskip("transformers")
    ours, theirs = GPTConfig(), transformers.GPT2Config()
    for name in (
        "vocab_size",
        "n_positions",
        "n_embd",
        "n_layer",
        "n_head",
        "n_inner",
        "activation_function",
    ):
        assert getattr(ours, name) == getattr(theirs, name)
    assert ours.layer_norm_epsilon == theirs.layer_norm_epsilon
    assert ours.initializer_range == theirs.initializer_range


def test_derived_sizes():
    config = GPTConfig(n_embd=96, n_head=6, num_kv_heads=2)
    assert (config.head_dim, config.kv_heads, config.mlp_dim) == (16, 2, 384)
    assert GPTConfig(n_inner=100).mlp_dim == 100
    assert GPTConfig().kv_heads == 12


def test_a_head_dim_of_its_own_stays_and_a_derived_one_follows():
    derived, own = GPTConfig(n_embd=96, n_head=6), GPTConfig(n_embd=96, n_head=6, head_dim=32)
    assert (derived.head_dim, own.head_dim) == (16, 32)
    assert dataclasses.replace(derived, n_head=3).head_dim == 32
    assert dataclasses.replace(own, n_head=3).head_dim == 32
    assert (derived.to_dict()["head_dim"], own.to_dict()["head_dim"]) == (None, 32)
    for config in (derived, own):
        assert GPTConfig(**json.loads(json.dumps(config.to_dict()))) == config


def test_biases_follow_the_wider_option():
    assert GPTConfig().biases == (True, True, True)
    assert GPTConfig(bias=False).biases == (False, False, False)
    assert GPTConfig(bias=False, attention_bias=True).biases == (True, True, False)
    assert GPTConfig(attention_out_bias=False, mlp_bias=False).biases == (True, False, False)


def test_windows_by_layer():
    kinds = ["sliding_attention", "full_attention"]
    assert GPTConfig(n_layer=2).kinds == ("full_attention",) * 2
    assert GPTConfig(n_layer=2, window=5).kinds == ("sliding_attention",) * 2
    config = GPTConfig(n_layer=2, window=5, layer_types=kinds)
    assert config.kinds == tuple(kinds)
    assert [block.attn.window for block in GPT(config).h] == [(4, 0), None]


def test_a_preset_with_fewer_layers_has_the_first_ones():
    assert GPTConfig.preset("gemma-3-1b", n_layer=7).kinds == ("sliding_attention",) * 5 + (
        "full_attention",
        "sliding_attention",
    )
    with pytest.raises(ValueError, match="layer_types: got 26 layers, needs n_layer=30"):
        GPTConfig.preset("gemma-3-1b", n_layer=30)
    with pytest.raises(ValueError, match="n_layer: got 0"):
        GPTConfig.preset("gemma-3-1b", n_layer=0)


def test_dropout_sets_all_three_and_is_not_stored():
    config = GPTConfig(dropout=0.25)
    assert (config.embd_pdrop, config.resid_pdrop, config.attn_pdrop) == (0.25, 0.25, 0.25)
    assert "dropout" not in config.to_dict()
    assert dataclasses.replace(config, n_layer=3).attn_pdrop == 0.25
    assert GPTConfig(**config.to_dict()) == config


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_makes_a_model(name):
    with torch.device("meta"):
        model = GPT(GPTConfig.preset(name, dropout=0.1))
    assert model.config.resid_pdrop == 0.1
    assert sum(p.numel() for p in model.parameters()) == DECODERS[name].parameters


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"n_embd": 30, "n_head": 4}, "n_head"),
        ({"n_head": 12, "num_kv_heads": 5}, "num_kv_heads"),
        ({"n_layer": 0}, "n_layer"),
        ({"vocab_size": -1}, "vocab_size"),
        ({"n_embd": 1.5}, "n_embd"),
        ({"window": 0}, "window"),
        ({"positions": "relative"}, "positions"),
        ({"positions": "rotary", "n_embd": 36}, "positions"),
        ({"activation_function": "swish"}, "activation_function"),
        ({"dropout": 1.0}, "pdrop"),
        ({"attn_pdrop": -0.1}, "attn_pdrop"),
        ({"rope_theta": 0.0}, "rope_theta"),
        ({"layer_norm_epsilon": -1.0}, "layer_norm_epsilon"),
        ({"initializer_range": -1.0}, "initializer_range"),
        ({"norm_unit_offset": True}, "norm_unit_offset: got True, needs norm='rmsnorm'"),
        (
            {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
            "rope_scaling: .*needs positions='rotary'",
        ),
        (
            {**ROTARY, "rope_scaling": {"rope_type": "longrope"}},
            r"rope_scaling\['rope_type'\]: got 'longrope'",
        ),
        ({**ROTARY, "rope_scaling": {"rope_type": "linear"}}, "rope_scaling: got no 'factor'"),
        ({**ROTARY, "rope_scaling": {"rope_type": "linear", "factor": 2, "beta_fast": 1}}, "got 'beta_fast'"),
        ({**ROTARY, "rope_scaling": {**LLAMA3, "high_freq_factor": 1.0}}, "needs more than low_freq_factor"),
        (
            {**ROTARY, "head_dim": 2, "rope_scaling": {"rope_type": "dynamic", "factor": 2}},
            "head dim above 2",
        ),
        ({**ROTARY, "rope_local_base_freq": 10.0}, "rope_local_base_freq: .*layer_types"),
        ({**ROTARY, "head_dim": 3}, "positions: rotary needs an even head dim, got head_dim=3"),
        ({"head_dim": 257}, "head_dim: got 257, needs a head dim of at most 256"),
        (
            {"n_layer": 2, "window": 3, "layer_types": ["full_attention"]},
            "layer_types: got 1 layers, needs n_layer=2",
        ),
        (
            {"n_layer": 1, "layer_types": ["sliding_attention"]},
            "layer_types: sliding attention needs a window",
        ),
        ({"n_layer": 1, "layer_types": ["local"]}, r"layer_types\[0\]: got 'local'"),
    ],
)
def test_bad_values_are_refused_by_name(options, name):
    with pytest.raises(ValueError, match=name):
        GPTConfig(**options)


def test_an_unknown_preset_lists_the_known():
    with pytest.raises(ValueError, match="gpt2-xl"):
        GPTConfig.preset("gpt5")
