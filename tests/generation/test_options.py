"""A folder's generation_config stands in for what is not given; options that do not go together are refused first."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from generation_cases import make, prompts, theirs_and_ours, tokenizer

from fastattn.generation import stream_ids
from fastattn.generation.options import NOT_COMPUTED, Options
from fastattn.models import GPT
from fastattn.models.checkpoint.load import generation_of

IDS, MASK = prompts((6, 3))


def with_config(**entries: Any) -> GPT:
    model = make(torch.float64)
    model.generation_config = entries
    return model


CONFIGS: list[
    tuple[dict[str, Any], dict[str, Any]]
] = [  # what a folder says, and the arguments that are as good
    ({"max_new_tokens": 5}, {"max_new_tokens": 5}),
    ({"max_length": 10}, {"max_new_tokens": 4}),
    (
        {"eos_token_id": [7, 9, 11, 30], "pad_token_id": 5},
        {"eos_token_id": [7, 9, 11, 30], "pad_token_id": 5},
    ),
    ({"repetition_penalty": 1.3}, {"repetition_penalty": 1.3}),
    ({"num_beams": 3, "length_penalty": 2.0}, {"num_beams": 3, "length_penalty": 2.0}),
    (
        {"do_sample": True, "temperature": 2.0, "top_k": 20, "top_p": 0.9},
        {"do_sample": True, "temperature": 2.0, "top_k": 20, "top_p": 0.9},
    ),
    ({"temperature": 0.6, "top_p": 0.9, "length_penalty": 2.0}, {}),  # they wait for do_sample and num_beams
    ({"do_sample": True, "top_k": 0}, {"do_sample": True}),
    ({"pad_token_id": -1, "eos_token_id": -1}, {}),
    ({"pad_token_id": -1, "eos_token_id": [-1, 9]}, {"eos_token_id": 9}),
    ({"eos_token_id": 50256, "transformers_version": "5.0", "_from_model_config": True}, {}),
]


@pytest.mark.parametrize(("entries", "arguments"), CONFIGS, ids=lambda value: str(value))
def test_a_config_is_as_good_as_arguments(entries: dict[str, Any], arguments: dict[str, Any]) -> None:
    sampling = {"seed": 0} if arguments.get("do_sample") else {}
    expected = make(torch.float64).generate(IDS, MASK, **arguments, **sampling)
    assert torch.equal(with_config(**entries).generate(IDS, MASK, **sampling), expected)


@pytest.mark.parametrize("longest", [0, 3, 6])
def test_a_prompt_that_fills_max_length_is_refused_as_in_transformers(longest: int) -> None:
    """Nothing was generated, without notice."""
    model = with_config(max_length=longest)
    complaint = rf"^generation_config: max_length: got {longest}, needs more than the 6 tokens of the prompt"
    for beams in (1, 2):
        with pytest.raises(ValueError, match=complaint):
            model.generate(IDS, MASK, num_beams=beams)
    with pytest.raises(ValueError, match=complaint):
        stream_ids(model, IDS[:1], MASK[:1])
    assert model.generate(IDS, MASK, max_new_tokens=2).shape == (2, 8)


def test_arguments_come_before_a_config() -> None:
    model = with_config(do_sample=True, temperature=9.0, max_new_tokens=3, eos_token_id=list(range(61)))
    plain = make(torch.float64).generate(IDS, MASK, max_new_tokens=8)
    assert torch.equal(model.generate(IDS, MASK, max_new_tokens=8, do_sample=False, eos_token_id=[]), plain)


NEUTRAL: list[
    tuple[dict[str, Any], dict[str, Any]]
] = [  # what is given, and what it switches off in a folder
    ({"do_sample": True, "top_k": 0}, {"top_k": 2}),
    ({"do_sample": True, "top_p": 1.0}, {"top_p": 0.1}),
    ({"do_sample": True, "min_p": 0.0}, {"min_p": 0.9}),
    ({"do_sample": True, "temperature": 1.0}, {"temperature": 0.01}),
    ({"do_sample": True, "stop_strings": []}, {"stop_strings": ["0"]}),
    ({"repetition_penalty": 1.0}, {"repetition_penalty": 9.0}),
    ({"prompt_lookup_num_tokens": 0, "use_cache": False}, {"prompt_lookup_num_tokens": 3}),
    ({"do_sample": False, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}, {"do_sample": True}),
    ({"num_beams": 1, "length_penalty": 1.0, "early_stopping": False}, {"num_beams": 3}),
]


@pytest.mark.parametrize(("given", "folder"), NEUTRAL, ids=str)
def test_a_value_without_effect_is_accepted_and_comes_before_a_folder_s(
    given: dict[str, Any], folder: dict[str, Any]
) -> None:
    sampling = {"do_sample": True, "seed": 0} if given.get("do_sample") else {}
    expected = make(torch.float64).generate(IDS, MASK, max_new_tokens=8, **sampling)
    made = with_config(**folder).generate(IDS, MASK, max_new_tokens=8, **{**given, **sampling})
    assert torch.equal(made, expected)


@pytest.mark.parametrize("key", NOT_COMPUTED)
def test_a_config_that_asks_for_what_is_not_computed_is_refused(key: str) -> None:
    with pytest.raises(ValueError, match=rf"^generation_config: {key}=3 is not computed here"):
        with_config(**{key: 3}).generate(IDS, MASK)
    plain = make(torch.float64).generate(IDS, MASK, max_new_tokens=2)
    for harmless in NOT_COMPUTED[key]:
        assert torch.equal(with_config(**{key: harmless}).generate(IDS, MASK, max_new_tokens=2), plain)


def test_a_config_is_checked_as_arguments_are() -> None:
    with pytest.raises(ValueError, match=r"^generation_config: top_p: got 7, needs 0 < top_p <= 1"):
        with_config(do_sample=True, top_p=7).generate(IDS, MASK)


def test_a_folder_s_defaults_are_those_of_transformers(tmp_path: Any) -> None:
    pytest.importorskip("transformers")
    theirs, _ = theirs_and_ours(eos_token_id=None, pad_token_id=5)
    theirs.generation_config.eos_token_id = [7, 11, 30]
    theirs.generation_config.max_new_tokens = 17
    theirs.generation_config.repetition_penalty = 1.1
    theirs.save_pretrained(tmp_path)
    ours = GPT.from_pretrained(tmp_path)
    assert torch.equal(ours.generate(IDS, MASK), theirs.generate(IDS, attention_mask=MASK))


SAMPLE: dict[str, Any] = {"do_sample": True}
TEXT: dict[str, Any] = {"stop_strings": "x", "tokenizer": tokenizer(), "pad_token_id": 1}


def test_options_in_config_json_count_where_a_folder_has_no_generation_config(tmp_path: Any) -> None:
    """Older versions of transformers wrote them there, those of an encoder-decoder in its decoder's entries too."""
    pytest.importorskip("transformers")
    theirs, _ = theirs_and_ours(eos_token_id=None, pad_token_id=5)
    theirs.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").unlink()
    config = tmp_path / "config.json"
    said = {"repetition_penalty": 1.6, "max_length": 15, "num_beams": 1, "no_repeat_ngram_size": 0}
    entries = json.loads(config.read_text())
    config.write_text(json.dumps({**entries, **said}))
    ours = GPT.from_pretrained(tmp_path)
    made = type(theirs).from_pretrained(tmp_path).generate(IDS, attention_mask=MASK)
    assert made.shape[1] == 15
    assert torch.equal(ours.generate(IDS, MASK), made)
    again = tmp_path / "again"
    ours.save_pretrained(again)
    assert torch.equal(GPT.from_pretrained(again).generate(IDS, MASK), made)
    config.write_text(json.dumps({**entries, "max_length": 20, "num_beams": 1}))  # nobody set these
    assert GPT.from_pretrained(tmp_path).generation_config is None
    config.write_text(json.dumps({**entries, "typical_p": 0.5}))
    with pytest.raises(ValueError, match=r"^generation_config: typical_p=0.5 is not computed here"):
        GPT.from_pretrained(tmp_path).generate(IDS, MASK)
    outer = {"decoder": {"num_beams": 3, "length_penalty": 2.0}, "length_penalty": 0.5, "num_beams": 1}
    assert generation_of(tmp_path, outer, None) == {
        "_from_model_config": True, "num_beams": 3, "length_penalty": 0.5
    }  # fmt: skip


CONFLICTS: list[tuple[dict[str, Any], str]] = [
    ({"top_k": 3, "min_p": 0.1}, "top_k, min_p: shapes sampling"),
    ({"temperature": 0.5}, "temperature: shapes sampling"),
    ({"num_beams": 2, **SAMPLE}, "do_sample, num_beams: do not go together"),
    ({"num_beams": 2, **TEXT}, "stop_strings, num_beams: do not go together"),
    ({"num_beams": 2, "prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens, num_beams: do not"),
    ({"num_beams": 2, "num_return_sequences": 3}, "num_return_sequences: got 3, needs num_beams=2 at most"),
    ({"length_penalty": 2.0}, "length_penalty: scores beams"),
    ({"early_stopping": True}, "early_stopping: scores beams"),
    ({"num_return_sequences": 2}, "num_return_sequences: got 2, needs do_sample=True or num_beams"),
    ({"stop_strings": "x"}, "stop_strings: needs tokenizer="),
    ({"seed": [1, 2, 3], **SAMPLE}, "seed: got 3 seeds, needs one, or one for each of 2 prompts"),
    ({"seed": 1, "generator": torch.Generator(), **SAMPLE}, "seed: give a seed or a generator"),
    ({"prompt_lookup_num_tokens": 3, "use_cache": False}, "prompt_lookup_num_tokens: got use_cache=False"),
    ({"prefill_chunk_size": 3, "use_cache": False}, "prefill_chunk_size: got use_cache=False"),
    ({"batch_invariant": True, "use_cache": False}, "batch_invariant: got True with use_cache=False"),
    (
        {"prompt_lookup_num_tokens": 3, "logits_processor": lambda ids, scores: scores},
        "prompt_lookup_num_tokens, logits_processor: do not go together",
    ),
    ({"early_stopping": "ever", "num_beams": 2}, "early_stopping: got 'ever'"),
    ({"length_penalty": 100.0, "num_beams": 2}, "length_penalty: got 100.0, needs -16 to 16"),
]


@pytest.mark.parametrize(("options", "complaint"), CONFLICTS, ids=[complaint for _, complaint in CONFLICTS])
def test_options_that_do_not_go_together_are_refused_by_name_before_any_work(
    options: dict[str, Any], complaint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(GPT, "decoder", lambda *args, **options: pytest.fail("worked"))
    monkeypatch.setattr(GPT, "forward", lambda *args, **options: pytest.fail("worked"))
    with pytest.raises((TypeError, ValueError), match=f"^{complaint}"):
        make().generate(IDS, MASK, **options)


WAYS: list[tuple[dict[str, Any], bool]] = [
    *(({name: value}, True) for name, value in (("use_cache", False), ("num_beams", 2), ("prefill_chunk_size", 2))),
    *(({name: value}, False) for name, value in (("use_cache", False), ("num_beams", 2), ("prefill_chunk_size", 2))),
    *(({name: value}, False) for name, value in (("prompt_lookup_num_tokens", 3), ("batch_invariant", True))),
    ({}, False),
]  # fmt: skip


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("options", "replaced"), WAYS, ids=str)
def test_padding_to_a_fixed_width_takes_no_learned_positions(
    side: str, options: dict[str, Any], replaced: bool
) -> None:
    model = make(torch.float64, n_positions=16)
    ids, mask = prompts((5, 3), side)
    if replaced:  # no decoder: the model's step
        model.lm_head.register_forward_hook(lambda *args: None)
    expected = model.generate(ids, mask, max_new_tokens=12, **options)[:, 5:]
    pad = (9, 0) if side == "left" else (0, 9)
    wide, wide_mask = F.pad(ids, pad), F.pad(mask, pad)
    assert torch.equal(model.generate(wide, wide_mask, max_new_tokens=12, **options)[:, 14:], expected)
    model.generation_config = {"max_length": 17}
    assert torch.equal(model.generate(wide, wide_mask, **options)[:, 14:], expected)
    with pytest.raises(ValueError, match=r"^max_new_tokens: a prompt of 5 and 13 more tokens do not fit"):
        model.generate(wide, wide_mask, max_new_tokens=13, **options)


@pytest.mark.parametrize("name", ["eos_token_id", "pad_token_id"])
@pytest.mark.parametrize("value", ["abc", 1.5, {}, ["x"], [[1]]], ids=str)
@pytest.mark.parametrize("beams", [1, 2])
def test_token_ids_of_a_folder_are_checked(name: str, value: Any, beams: int) -> None:
    model = make()
    model.generation_config = {name: value, **({"eos_token_id": 1} if name == "pad_token_id" else {})}
    with pytest.raises(ValueError, match=f"^generation_config: {name}: got "):
        model.generate(IDS, MASK, num_beams=beams)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.bool, torch.float32], ids=str)
@pytest.mark.parametrize("beams", [1, 2])
def test_ids_of_a_dtype_that_embeddings_do_not_take_are_refused(dtype: torch.dtype, beams: int) -> None:
    with pytest.raises(ValueError, match=rf"^input_ids: got {dtype} of shape .*, needs int64 or int32"):
        make().generate(IDS.to(dtype), MASK, num_beams=beams)


def test_every_option_of_generate_is_one_of_options() -> None:
    import inspect
    from dataclasses import fields

    from fastattn.generation import generate

    arguments = list(inspect.signature(generate).parameters)[3:]
    assert arguments == [field.name for field in fields(Options)]
