"""Every decoder family beside transformers' model of the same weights: logits, gradients, ids, folders both ways."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from decoder_families import (
    FAMILIES,
    ORIGINAL,
    in_their_names,
    make_both,
    make_theirs,
    parameters_of,
    tokens,
)
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from fastattn.models import GPT, GPTConfig, load
from fastattn.models.checkpoint import DECODERS, family_for
from fastattn.models.checkpoint.decoders import LLAMA_LINE
from fastattn.models.checkpoint.dialects import meaning
from fastattn.models.presets import DECODERS as PRESETS
from fastattn.nn import linear as linear_module
from numerics import assert_each_within_rule, assert_within_rule

transformers = pytest.importorskip("transformers")
from transformers_rule import float64_throughout  # noqa: E402  which imports transformers

every_family = pytest.mark.parametrize("name", FAMILIES)
SCALED = ("linear", "dynamic", "yarn", "yarn, its own numbers", "llama3")


@pytest.fixture
def both(name: str, tmp_path: Path) -> tuple[Any, GPT]:
    """transformers' model and ours, of the same weights."""
    return make_both(name, tmp_path / "theirs")


def double(theirs: Any) -> Any:
    """A copy in float64, which rope scalings that keep state have not seen a call of."""
    return copy.deepcopy(theirs).double()


@every_family
@pytest.mark.parametrize("length", [9, 3 * ORIGINAL])
def test_logits_are_theirs(name: str, length: int, both: tuple[Any, GPT]) -> None:
    theirs, ours = both
    ids = tokens(2, length)
    with torch.no_grad():
        with float64_throughout():
            golden = {"logits": double(theirs)(ids).logits}
        plain = copy.deepcopy(theirs)
        assert_each_within_rule(
            {"logits": ours(ids).logits},
            lambda: {"logits": plain(ids).logits},
            golden,
            name,
            torch.float32,
        )


@every_family
def test_logits_in_bfloat16_are_within_the_rule(name: str, both: tuple[Any, GPT]) -> None:
    theirs, ours = both
    ids = tokens(2, ORIGINAL + 3)
    half, wide = copy.deepcopy(theirs).bfloat16(), copy.deepcopy(theirs).bfloat16().double()
    with torch.no_grad():
        with float64_throughout():
            golden = wide(ids).logits
        assert_within_rule(ours.bfloat16()(ids).logits, half(ids).logits, golden, name, torch.bfloat16)


@every_family
def test_hidden_states_and_attention_weights_are_theirs(name: str, both: tuple[Any, GPT]) -> None:
    theirs, ours = both
    ids = tokens(2, 9)
    options = {"output_hidden_states": True, "output_attentions": True}

    def inside(model: Any) -> dict[str, Tensor]:
        out = model(ids, **options)
        parts = {f"hidden {i}": x for i, x in enumerate(out.hidden_states)}
        return parts | {f"weights {i}": x for i, x in enumerate(out.attentions)}

    with torch.no_grad():
        with float64_throughout():
            golden = inside(double(theirs))
        assert len(golden) == 2 * len(ours.h) + 1
        assert_each_within_rule(inside(ours), lambda: inside(theirs), golden, name, torch.float32)
        assert ours(ids).hidden_states is None
        assert ours(ids).attentions is None


def gradients(model: Any, ids: Tensor) -> dict[str, Tensor]:
    """Of the mean loss, by our names or theirs."""
    named = parameters_of(model)
    loss = model(ids, labels=ids).loss
    return dict(zip(named, torch.autograd.grad(loss, list(named.values()))))


@every_family
@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_one_step_of_training_is_theirs(
    name: str, fused: bool, both: tuple[Any, GPT], monkeypatch: pytest.MonkeyPatch
) -> None:
    """fused: products by oneDNN, whose backward makes norms and activations again."""
    theirs, ours = both
    ids = tokens(2, ORIGINAL + 3)
    ids[:, 4:7] = theirs.config.pad_token_id  # read as a token, which trains its embedding in GPT-2 alone
    with float64_throughout():
        golden = gradients(double(theirs).train(), ids)
    ours.train()
    if fused:
        monkeypatch.setattr(linear_module, "ONEDNN_MIN_WEIGHTS", 1)
    actual = in_their_names(ours, gradients(ours, ids))
    monkeypatch.undo()
    assert_each_within_rule(
        actual, lambda: gradients(copy.deepcopy(theirs).train(), ids), golden, name, torch.float32
    )
    before = {n: p.detach().clone() for n, p in parameters_of(theirs).items()}
    for parameter in ours.parameters():
        parameter.grad = None
    ours(ids, labels=ids).loss.backward()
    torch.optim.SGD(ours.parameters(), lr=0.5).step()
    stepped = in_their_names(ours, {n: p.detach() for n, p in parameters_of(ours).items()})
    assert_each_within_rule(
        {n: w.double() for n, w in stepped.items()},
        lambda: {n: before[n] - 0.5 * g for n, g in gradients(copy.deepcopy(theirs).train(), ids).items()},
        {n: before[n].double() - 0.5 * g for n, g in golden.items()},
        f"{name}, stepped",
        torch.float32,
    )


@every_family
def test_greedy_ids_are_theirs(name: str, both: tuple[Any, GPT]) -> None:
    """Past the original length too. Dynamic scaling goes by the longest row of a batch in transformers, by each row's
    own length here, which for rows of one length is the same."""
    theirs, ours = both
    ids, mask = tokens(3, 10), torch.ones(3, 10, dtype=torch.int64)
    if name != "dynamic":
        ids[0, :4] = mask[0, :4] = 0
        ids[2, :9] = mask[2, :9] = 0
    options: dict[str, Any] = {"max_new_tokens": 2 * ORIGINAL, "eos_token_id": None}
    expected = theirs.generate(ids, attention_mask=mask, do_sample=False, **options)
    actual = ours.generate(ids, mask, max_new_tokens=2 * ORIGINAL, eos_token_id=[])
    assert torch.equal(actual, expected)
    assert len(set(actual[:, 10:].flatten().tolist())) > 4  # not one token over and over


@every_family
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_as_if_alone(name: str, side: str, both: tuple[Any, GPT]) -> None:
    """Beyond the original length, where dynamic scaling depends on how many tokens a row has."""
    ours = both[1].double()
    lengths, width = (ORIGINAL + 5, 7), ORIGINAL + 9
    ids, mask = torch.zeros(2, width, dtype=torch.int64), torch.zeros(2, width, dtype=torch.int64)
    for row, n in enumerate(lengths):
        part = slice(width - n, width) if side == "left" else slice(0, n)
        ids[row, part], mask[row, part] = tokens(n), 1
    with torch.no_grad():
        padded = ours(ids, mask).logits
        for row in range(2):
            real = mask[row].bool()
            torch.testing.assert_close(padded[row, real], ours(ids[row, real][None]).logits[0])


@every_family
def test_packed_documents_are_as_if_alone(name: str, both: tuple[Any, GPT]) -> None:
    ours = both[1].double()
    documents = [tokens(1, n) for n in (4, ORIGINAL + 6, 1)]
    segments = torch.cat([torch.full((1, d.shape[1]), i) for i, d in enumerate(documents)], 1)
    with torch.no_grad():
        packed = ours(torch.cat(documents, 1), segment_ids=segments).logits
        alone = torch.cat([ours(document).logits for document in documents], 1)
    torch.testing.assert_close(packed, alone)


@every_family
def test_a_folder_goes_both_ways_value_by_value(name: str, both: tuple[Any, GPT], tmp_path: Path) -> None:
    theirs, ours = both
    ours.save_pretrained(tmp_path / "ours")
    again, report = type(theirs).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report.values())
    assert again.config.model_type == theirs.config.model_type
    state = again.state_dict()
    assert state.keys() == theirs.state_dict().keys()
    assert all(torch.equal(state[n], tensor) for n, tensor in theirs.state_dict().items())
    said, kept = again.config.to_dict(), theirs.config.to_dict()
    for key in ("transformers_version", "_name_or_path", "architectures", "dtype", "max_window_layers"):
        said.pop(key, None), kept.pop(key, None)  # layer_types says what the last one did
    assert said == kept
    back = GPT.from_pretrained(tmp_path / "ours")
    assert back.config == ours.config
    assert all(torch.equal(a, b) for a, b in zip(back.state_dict().values(), ours.state_dict().values()))
    auto = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert type(auto) is type(theirs)
    by_load = load(tmp_path / "ours")
    assert type(by_load) is GPT
    assert by_load.config == ours.config


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("gemma3", 3),
        *(
            pytest.param(name, 20, marks=pytest.mark.exhaustive)
            for name in ("gpt2", "llama", "gemma3", "dynamic")
        ),
    ],
)
def test_compiles_once_for_all_lengths(name: str, count: int, both: tuple[Any, GPT]) -> None:
    ours = both[1].double()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(ours, backend=counter, fullgraph=True, dynamic=True)
    counts = []
    for length in range(ORIGINAL - 1, ORIGINAL - 1 + count):
        ids = tokens(2, length)
        with torch.no_grad():
            torch.testing.assert_close(compiled(ids).logits, ours(ids).logits)
        counts.append(counter.frame_count)
    torch.compiler.reset()
    assert counts == [counts[0]] * count  # the first call alone compiles


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
