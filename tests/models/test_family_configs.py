"""config.json of every decoder family: presets, what is refused by its key, older files, and what is left out."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from decoder_families import (
    in_their_names,
    make_theirs,
    parameters_of,
)

from fastattn.models import GPT, GPTConfig
from fastattn.models.checkpoint import DECODERS, family_for
from fastattn.models.checkpoint.decoders import LLAMA_LINE
from fastattn.models.checkpoint.dialects import meaning
from fastattn.models.presets import DECODERS as PRESETS

transformers = pytest.importorskip("transformers")

PUBLISHED = [name for name, preset in PRESETS.items() if "model_type" in preset.fields]


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_preset_is_the_published_model(name: str) -> None:
    """Its parameters are as many as published, its family can say it, and transformers' model of what that says has
    tensors of the same shapes."""
    config, preset = GPTConfig.preset(name), PRESETS[name]
    with torch.device("meta"):
        ours = GPT(config)
    assert sum(p.numel() for p in ours.parameters()) == preset.parameters
    family = family_for(config, DECODERS)
    assert family.model_type == preset.fields["model_type"]
    entries = {"model_type": family.model_type, **family.write_config(config)}
    assert meaning(family.read_config(entries)) == meaning(config)
    theirs = transformers.AutoConfig.for_model(**entries)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(theirs)
    shapes = {n: tuple(t.shape) for n, t in model.named_parameters()}
    assert {n: tuple(t.shape) for n, t in in_their_names(ours, parameters_of(ours)).items()} == shapes


def entries_of(name: str, **changes: Any) -> dict[str, Any]:
    """transformers' config.json of a family, with changes."""
    entries = make_theirs(name).config.to_dict()
    return {key: value for key, value in {**entries, **changes}.items() if value is not ...}


def read(entries: dict[str, Any]) -> GPTConfig:
    """What the family of a config.json makes of it."""
    return next(f for f in DECODERS if f.model_type == entries["model_type"]).read_config(entries)


@pytest.mark.parametrize(
    ("name", "changes", "complaint"),
    [
        ("llama", {"hidden_act": "quick_gelu"}, r"^hidden_act \(activation_function\): got 'quick_gelu'"),
        ("llama", {"rope_interleaved": True}, "^rope_interleaved: got True, only False"),
        ("llama", {"partial_rotary_factor": 0.5}, "^partial_rotary_factor: got 0.5, only 1.0"),
        ("llama", {"num_experts": 8}, "^num_experts: got 8, which is no key"),
        ("llama", {"sliding_window": 5}, "^sliding_window: got 5, which is no key"),
        ("llama", {"hidden_size": "many"}, r"^hidden_size \(n_embd\): got 'many'"),
        ("llama", {"is_encoder_decoder": True}, "^is_encoder_decoder: got True"),
        ("llama", {"quantization_config": {"bits": 4}}, "^quantization_config: got"),
        ("llama", {"rope_parameters": {"rope_type": "longrope"}}, "rope_type'.: got 'longrope'"),
        ("llama", {"rope_parameters": {"rope_type": "proportional"}}, "rope_type'.: got 'proportional'"),
        ("llama", {"rope_scaling": {"type": "linear"}}, r"^rope_scaling: got no 'factor'"),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 0}}, r"^rope_scaling\['factor'\]: got 0"),
        ("llama", {"rope_scaling": {"type": "linear", "mrope_section": [1]}}, "'mrope_section', which is not"),
        ("llama", {"rope_parameters": [1]}, r"^rope_parameters: got \[1\], needs a dict"),
        ("llama", {"rope_parameters": {"partial_rotary_factor": 0.25}}, "^partial_rotary_factor: got 0.25"),
        ("mistral", {"layer_types": ["full_attention"] * 3}, "^layer_types: got"),
        ("qwen2", {"use_mrope": True}, "^use_mrope: got True"),
        ("qwen2", {"layer_types": ["sliding_attention"] * 3}, "^layer_types: sliding attention needs a window"),
        ("qwen3", {"layer_types": ["chunked_attention"] * 3}, r"^layer_types\[0\]: got 'chunked_attention'"),
        ("qwen3", {"layer_types": ["full_attention", "sliding_attention"]}, "^layer_types: got 2 layers, needs"),
        ("qwen3", {"layer_types": "full_attention"}, "^layer_types: got 'full_attention', needs a list"),
        ("gemma2", {"use_bidirectional_attention": True}, "^use_bidirectional_attention: got True"),
        ("gemma2", {"sliding_window_pattern": 3}, "^sliding_window_pattern: got 3, only 2"),
        ("gemma3", {"attn_logit_softcapping": 50.0}, "^attn_logit_softcapping: got 50.0, only None"),
        (
            "gemma3",
            {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
            r"'sliding_attention'\]\['rope_type'\]: got 'linear', only 'default'",
        ),
        ("gemma3", {"rope_parameters": {"chunked_attention": {}}}, "got 'chunked_attention', which is not"),
    ],
)  # fmt: skip
def test_what_is_not_computed_is_refused_by_name(name: str, changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        read(entries_of(name, **changes))


HOSTILE: tuple[Any, ...] = (None, True, -1, 0, 1.5, 10**30, "x", [], ["x"], [{}], {}, {"x": 1})


def refusal(entries: dict[str, Any]) -> str:
    """The key that a refusal begins with; empty where the config is taken."""
    try:
        read(entries)
    except ValueError as error:
        return re.split(r"[:\s\[]", str(error))[0]
    return ""


@pytest.mark.parametrize("name", ["llama", "yarn", "llama3", "mistral", "qwen2, windows", "gemma2", "gemma3"])
def test_a_value_of_another_kind_is_taken_or_refused_by_its_key(name: str) -> None:
    whole = entries_of(name)
    for entries in (whole, {key: value for key, value in whole.items() if key != "layer_types"}):
        for key in entries.keys() - {"model_type"}:
            for value in HOSTILE:
                assert refusal({**entries, key: value}) in {"", *whole}, (key, value)
    for key in whole["rope_parameters"]:
        for value in HOSTILE:
            rope = {**whole["rope_parameters"], key: value}
            refused = refusal({**whole, "rope_parameters": rope})
            assert refused.startswith(("rope_", "partial_rotary_factor")) or not refused, (key, value)


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "gemma3", "phi3", "mamba"])
def test_other_model_types_are_refused_before_a_weight_is_read(kind: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    with pytest.raises(ValueError, match=rf"config\.json: model_type: got '{kind}', needs 'gpt2', 'llama'"):
        GPT.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("name", "old"),
    [
        ("llama", {"rope_theta": 70.0, "rope_scaling": None}),
        ("linear", {"rope_theta": 70.0, "rope_scaling": {"type": "linear", "factor": 3.0}}),
        ("yarn", {"rope_theta": 70.0, "rope_scaling": {"rope_type": "yarn", "factor": 3.0, "beta_fast": 20}}),
        ("gemma3", {"rope_theta": 70.0, "rope_local_base_freq": 30.0, "layer_types": ..., "sliding_window_pattern": 2}),
        ("gemma3", {"rope_scaling": {"rope_type": "linear", "factor": 8.0}}),
        ("gemma2", {"layer_types": ..., "hidden_act": "gelu_pytorch_tanh", "cache_implementation": "hybrid"}),
        ("gemma3", {"layer_types": ["full_attention"] * 3}),
        ("gemma3", {"layer_types": ["sliding_attention"] * 3}),
        ("qwen2", {"layer_types": ..., "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2}),
        ("qwen2", {"layer_types": ..., "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0}),
        ("llama", {"pretraining_tp": 2, "pad_token_id": -1, "num_key_value_heads": None, "head_dim": None}),
    ],
)  # fmt: skip
def test_files_of_older_versions_mean_the_same(name: str, old: dict[str, Any], tmp_path: Path) -> None:
    """As what transformers makes of them, which is how its newest version writes them."""
    entries = entries_of(name, rope_parameters=..., transformers_version="4.40.0", **old)
    (tmp_path / "config.json").write_text(json.dumps(entries))
    newest = transformers.AutoConfig.from_pretrained(tmp_path).to_dict()
    assert newest["rope_parameters"]
    assert meaning(read(entries)) == meaning(read(newest))


def test_dropout_of_a_file_is_that_of_attention_in_training() -> None:
    config = read(entries_of("llama", attention_dropout=0.25))
    assert (config.attn_pdrop, config.embd_pdrop, config.resid_pdrop) == (0.25, 0.0, 0.0)


def test_what_a_file_leaves_out_has_the_value_of_transformers_class() -> None:
    for family in LLAMA_LINE:
        entries = {"model_type": family.model_type}
        theirs = transformers.AutoConfig.for_model(**entries).to_dict()
        for shared in ("output_attentions", "output_hidden_states", "transformers_version", "use_cache"):
            theirs.pop(shared)
        assert meaning(read(entries)) == meaning(read(theirs)), family.model_type


def test_a_model_is_saved_as_the_family_it_names_if_that_can_hold_it(tmp_path: Path) -> None:
    config = GPTConfig.preset(
        "mistral-7b", n_embd=16, n_layer=1, n_head=2, num_kv_heads=1, n_inner=8, vocab_size=9
    )
    kinds = {
        "mistral": config,
        "llama": dataclasses.replace(config, window=None, model_type=None),
        "fastattn-gpt": dataclasses.replace(config, positions="alibi"),
        "qwen3": dataclasses.replace(config, window=None, qk_norm=True),
    }
    for kind, each in kinds.items():
        GPT(each).save_pretrained(tmp_path / kind)
        assert json.loads((tmp_path / kind / "config.json").read_text())["model_type"] == kind
        assert meaning(GPT.from_pretrained(tmp_path / kind).config) == meaning(each)


def test_the_page_lists_every_preset_with_an_example_that_runs() -> None:
    page = (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([\w.-]+)` \| ([\d,]+) \| (.+) \| `(GPT\(.+\))` \|$", page, flags=re.M)
    assert [row[:3] for row in rows] == [(n, f"{p.parameters:,}", p.source) for n, p in PRESETS.items()]
    for name, _, _, example in rows:
        with torch.device("meta"):
            model = eval(example)
        assert model.config == GPTConfig.preset(name)
