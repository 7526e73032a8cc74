"""GPTConfig: what it derives, what it refuses, and that every preset makes a model."""

import dataclasses

import pytest
import torch

from fastattn.models import GPT, GPTConfig
from fastattn.models.config import PRESETS


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
    sizes = {"gpt2-medium": 354_823_168, "gpt2-large": 774_030_080, "gpt2-xl": 1_557_611_200}
    if name in sizes:
        assert sum(p.numel() for p in model.parameters()) == sizes[name]


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"n_embd": 30, "n_head": 4}, "n_head"),
        ({"n_head": 12, "num_kv_heads": 5}, "num_kv_heads"),
        ({"n_layer": 0}, "n_layer"),
        ({"vocab_size": -1}, "vocab_size"),
        ({"n_embd": 1.5}, "n_embd"),
        ({"window": 0}, "window"),
        ({"positions": "sinusoidal"}, "positions"),
        ({"positions": "rotary", "n_embd": 36}, "positions"),
        ({"activation_function": "swish"}, "activation_function"),
        ({"dropout": 1.0}, "pdrop"),
        ({"attn_pdrop": -0.1}, "attn_pdrop"),
        ({"rope_theta": 0.0}, "rope_theta"),
        ({"layer_norm_epsilon": -1.0}, "layer_norm_epsilon"),
        ({"initializer_range": -1.0}, "initializer_range"),
    ],
)
def test_bad_values_are_refused_by_name(options, name):
    with pytest.raises(ValueError, match=name):
        GPTConfig(**options)


def test_an_unknown_preset_lists_the_known():
    with pytest.raises(ValueError, match="gpt2-xl"):
        GPTConfig.preset("gpt5")
