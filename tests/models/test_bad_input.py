"""Hostile values for every field of a config, every argument of a model and of generate, and damaged folders."""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from fastattn.generation.sampling import draw, shares
from fastattn.models import GPT, GPTConfig

SIZES: dict[str, Any] = {"vocab_size": 11, "n_positions": 16, "n_embd": 8, "n_layer": 1, "n_head": 2}
NAN, INF, HUGE = math.nan, math.inf, 10**30
HOSTILE: dict[str, Any] = {
    "None": None,
    "True": True,
    "False": False,
    "-1": -1,
    "0": 0,
    "1.5": 1.5,
    "-0.5": -0.5,
    "nan": NAN,
    "inf": INF,
    "-inf": -INF,
    "huge": HUGE,
    "text": "x",
    "number in text": "3",
    "bytes": b"3",
    "list": [],
    "list of text": ["3"],
    "list of bool": [True],
    "dict": {},
    "tensor": torch.ones(2),
    "object": object(),
}
# The hostile values that a field of the config takes because they mean something there; all others are refused.
FLOATS = {"1.5", "huge"}
OPTIONAL = {"None"}
TAKES: dict[str, set[str]] = {
    **{key: set() for key in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head")},
    **dict.fromkeys(("n_inner", "num_kv_heads", "window"), OPTIONAL),
    **dict.fromkeys(("rope_theta", "layer_norm_epsilon", "initializer_range"), FLOATS),
    **{key: {"0"} for key in ("embd_pdrop", "resid_pdrop", "attn_pdrop")},
    **{key: {"True", "False"} for key in ("qk_norm", "bias", "tie_word_embeddings")},
    **dict.fromkeys(("bos_token_id", "pad_token_id"), OPTIONAL | {"0"}),
    "eos_token_id": OPTIONAL | {"0", "list"},
    "positions": set(),
    "norm": set(),
    "activation_function": set(),
    "dropout": OPTIONAL | {"0"},
    "head_dim": OPTIONAL,
    **dict.fromkeys(("rope_scaling", "rope_local_base_freq", "layer_types"), OPTIONAL),
    **dict.fromkeys(
        ("query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping"), OPTIONAL | FLOATS
    ),
    **{
        key: {"True", "False"}
        for key in ("scale_embedding", "sandwich_norms", "gated_mlp", "train_pad_embedding")
    },
    **{key: {"True", "False"} for key in ("post_norm", "lm_transform", "add_cross_attention")},
    **{key: {"0"} for key in ("type_vocab_size", "position_offset")},
    "lm_activation": OPTIONAL,
    "norm_unit_offset": {"False"},
    **dict.fromkeys(("attention_bias", "attention_out_bias", "mlp_bias"), OPTIONAL | {"True", "False"}),
    "model_type": OPTIONAL | {"text", "number in text"},
}


def make(**options: Any) -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(**{**SIZES, **options})).eval()


def fields_of_config() -> list[str]:
    return list(inspect.signature(GPTConfig).parameters)


@pytest.mark.parametrize("field", fields_of_config())
@pytest.mark.parametrize("kind", HOSTILE)
def test_a_config_refuses_by_name_what_means_nothing(field: str, kind: str) -> None:
    if kind in TAKES[field]:
        GPTConfig(**{**SIZES, field: HOSTILE[kind]})
        return
    with pytest.raises(ValueError, match=rf"^{field}\b.*(got|needs)"):
        GPTConfig(**{**SIZES, field: HOSTILE[kind]})


def test_a_config_turns_numpy_s_numbers_into_plain_ones() -> None:
    config = GPTConfig(
        vocab_size=np.int64(11), n_embd=768, dropout=np.float32(0.25), eos_token_id=[np.int32(3)]
    )
    assert json.loads(json.dumps(config.to_dict()))["vocab_size"] == 11
    assert (type(config.vocab_size), type(config.attn_pdrop), config.eos_token_id) == (int, float, [3])


def test_a_head_dim_that_attention_cannot_run_is_refused_with_the_config() -> None:
    with pytest.raises(ValueError, match=r"n_head: got 1, .* = 257, needs a head dim of at most 256"):
        GPTConfig(n_embd=257, n_head=1)


@pytest.mark.parametrize("name", ["gpt5", None, ["nano"], 3])
def test_an_unknown_preset_of_any_type_is_refused(name: Any) -> None:
    with pytest.raises(ValueError, match="preset: got"):
        GPTConfig.preset(name)


PROMPT = torch.tensor([[1, 2, 3], [4, 5, 6]])
# Argument of generate -> hostile values that it takes, as above. Whether the others raise TypeError or ValueError
# follows from what is wrong with them.
GENERATE_TAKES: dict[str, set[str]] = {
    "input_ids": set(),
    "attention_mask": OPTIONAL,
    "max_new_tokens": {"0"},  # 20 tokens, the default, are too many here
    "do_sample": OPTIONAL | {"True", "False"},
    "temperature": OPTIONAL | {"1.5", "huge"},
    "top_k": OPTIONAL | {"0"},
    "top_p": OPTIONAL,
    "min_p": OPTIONAL | {"0"},
    "repetition_penalty": OPTIONAL | {"1.5", "huge"},
    "presence_penalty": OPTIONAL | {"0", "-1", "1.5", "-0.5", "huge"},
    "no_repeat_ngram_size": OPTIONAL | {"0"},
    "min_new_tokens": OPTIONAL | {"0"},
    "num_beams": OPTIONAL,
    "length_penalty": OPTIONAL | {"0", "-1", "1.5", "-0.5"},
    "early_stopping": OPTIONAL | {"True", "False"},
    "num_return_sequences": OPTIONAL,
    "stop_strings": OPTIONAL | {"text", "number in text", "list", "list of text"},
    "tokenizer": OPTIONAL,
    "logits_processor": OPTIONAL | {"list"},
    "prompt_lookup_num_tokens": OPTIONAL | {"0"},
    "prefill_chunk_size": OPTIONAL,
    "eos_token_id": OPTIONAL | {"0", "list"},
    "pad_token_id": OPTIONAL | {"0"},
    "seed": OPTIONAL | {"0", "-1"},
    "generator": OPTIONAL,
    "use_cache": {"True", "False"},
    "batch_invariant": {"True", "False"},
}


class Letters:
    """Decodes an id to a letter."""

    def decode(self, ids: list[int], *, skip_special_tokens: bool = True) -> str:
        return "".join(chr(ord("a") + i) for i in ids)


@pytest.mark.parametrize(
    "argument", [n for n in inspect.signature(GPT.generate).parameters if n not in ("model", "self")]
)
@pytest.mark.parametrize("kind", HOSTILE)
def test_generate_refuses_by_name_what_means_nothing(argument: str, kind: str) -> None:
    model = make()
    needs: dict[str, Any] = {"do_sample": True}
    if argument in ("do_sample", "max_new_tokens", "num_beams"):
        needs = {}
    elif argument in ("length_penalty", "early_stopping"):
        needs = {"num_beams": 2}
    elif argument == "stop_strings":
        needs = {"tokenizer": Letters(), "pad_token_id": 0}
    options = {"input_ids": PROMPT, "max_new_tokens": 2, **needs, argument: HOSTILE[kind]}
    if kind in GENERATE_TAKES[argument]:
        out = model.generate(**options)
        assert out.shape[0] == 2
        assert bool(((out >= 0) & (out < SIZES["vocab_size"])).all())
        return
    with pytest.raises((TypeError, ValueError), match=rf"^{argument}: "):
        model.generate(**options)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"input_ids": PROMPT.tolist()}, "input_ids: got list, needs a torch.Tensor"),
        ({"input_ids": PROMPT.float()}, "input_ids: got torch.float32 of shape .*, needs int64 or int32"),
        ({"input_ids": PROMPT.bool()}, "input_ids: got torch.bool"),
        ({"input_ids": PROMPT.float(), "max_new_tokens": 0}, "input_ids: got torch.float32"),
        ({"input_ids": PROMPT + 9}, r"input_ids: got 10 to 15, needs 0 to 10"),
        ({"attention_mask": [[1, 1, 1]] * 2}, "attention_mask: got list"),
        ({"max_new_tokens": 1.5}, "max_new_tokens: got 1.5, needs an integer"),
        ({"max_new_tokens": "3"}, "max_new_tokens: got '3', needs an integer"),
        ({"temperature": "hot", "do_sample": True}, "temperature: got 'hot', needs a number"),
        ({"top_k": 2.5, "do_sample": True}, "top_k: got 2.5, needs an integer"),
        ({"top_p": "0.9", "do_sample": True}, "top_p: got '0.9', needs a number"),
        ({"seed": 2**64, "do_sample": True}, "seed: got 18446744073709551616, needs a 64-bit"),
        ({"do_sample": "no"}, "do_sample: got 'no', needs True or False"),
        ({"eos_token_id": 11}, r"eos_token_id: got 11, needs 0 to 10 \(vocab_size - 1\)"),
        ({"eos_token_id": [1, -1]}, "eos_token_id: got -1, needs 0 to 10"),
        ({"eos_token_id": torch.tensor([1, 99])}, "eos_token_id: got 99"),
        ({"eos_token_id": [1.0]}, "eos_token_id: got 1.0, needs a token id"),
        ({"pad_token_id": 11}, "pad_token_id: got 11"),
    ],
)
def test_generate_says_what_it_got_and_needs(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises((TypeError, ValueError), match=complaint):
        make().generate(**{"input_ids": PROMPT, "max_new_tokens": 2, **options})


@pytest.mark.parametrize(
    "ends", [3, [3], (3,), torch.tensor(3), torch.tensor([3]), np.int64(3), np.array([3])]
)
def test_end_tokens_are_taken_in_every_form(ends: Any) -> None:
    model = make(positions="rotary")
    expected = model.generate(PROMPT, max_new_tokens=20, eos_token_id=3, pad_token_id=0)
    assert torch.equal(model.generate(PROMPT, max_new_tokens=20, eos_token_id=ends, pad_token_id=0), expected)


def test_ids_of_a_config_beyond_its_vocabulary_are_never_written() -> None:
    """GPT-2's default ids in a small model end nothing, and do not pad either."""
    model = make(eos_token_id=50256, pad_token_id=50256)
    assert model.generate(PROMPT, max_new_tokens=5).shape == (2, 8)
    for rows, options in ((2, {}), (2, {"num_beams": 2}), (1, {"num_beams": 2, "num_return_sequences": 2})):
        with pytest.raises(ValueError, match="pad_token_id of the config: got 50256, needs 0 to 10"):
            model.generate(PROMPT[:rows], max_new_tokens=5, eos_token_id=3, **options)
    for beams in (1, 2):  # one row is not padded
        options = {"max_new_tokens": 5, "eos_token_id": 3, "num_beams": beams}
        made = model.generate(PROMPT[:1], **options)
        assert torch.equal(made, model.generate(PROMPT[:1], **options, pad_token_id=0))


@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_weights_that_are_not_finite_are_named_and_no_token_is_drawn(value: float, do_sample: bool) -> None:
    model = make()
    with torch.no_grad():
        model.ln_f.weight[0] = value
    with pytest.raises(ValueError, match="model: its logits for token 0 after the prompt are not finite"):
        model.generate(PROMPT, max_new_tokens=2, do_sample=do_sample)


@pytest.mark.parametrize("options", [{"temperature": 5e-324}, {"temperature": 1e-40}, {"top_p": 5e-324}])
def test_the_coldest_and_narrowest_sampling_is_greedy(options: dict[str, float]) -> None:
    logits = 30 * torch.randn(50, 61)
    settings: dict[str, Any] = {"temperature": 1.0, "top_k": None, "top_p": None, "min_p": None, **options}
    assert torch.equal(draw(shares(logits, **settings), torch.rand(50, 1).double()), logits.argmax(-1))


# Argument of GPT.forward -> hostile values that it takes.
FORWARD_TAKES: dict[str, set[str]] = {
    **dict.fromkeys(("attention_mask", "labels", "position_ids", "segment_ids"), OPTIONAL),
    "input_ids": set(),
    "cache": OPTIONAL,
    "logits_to_keep": {"0"},
    "return_logits": OPTIONAL | {"True", "False"},
    **{key: {"True", "False"} for key in ("output_hidden_states", "output_attentions", "labels_aligned")},
    "memory": OPTIONAL,
}


@pytest.mark.parametrize("argument", [n for n in inspect.signature(GPT.forward).parameters if n != "self"])
@pytest.mark.parametrize("kind", HOSTILE)
def test_a_model_refuses_by_name_what_means_nothing(argument: str, kind: str) -> None:
    call = {"input_ids": PROMPT, argument: HOSTILE[kind]}
    if kind in FORWARD_TAKES[argument]:
        make()(**call)
        return
    with pytest.raises((TypeError, ValueError), match=rf"^{argument}: "):
        make()(**call)


@pytest.mark.parametrize(
    ("labels", "complaint"),
    [
        (PROMPT + 11, "labels: got 13 to 17, needs 0 to 10"),
        (PROMPT - 7, "labels: got -5 to -1, needs 0 to 10"),
        (PROMPT.float(), "labels: got torch.float32"),
        (PROMPT.bool(), "labels: got torch.bool"),
    ],
)
def test_labels_outside_the_vocabulary_are_refused(labels: torch.Tensor, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        make()(PROMPT, labels=labels)


def test_labels_that_do_not_count_may_be_anything() -> None:
    model = make()
    expected = model(PROMPT, labels=PROMPT).loss
    labels = PROMPT.clone()
    labels[:, 0] = 999  # a row's first label is never a target
    assert model(PROMPT, labels=labels).loss == expected
    assert model(PROMPT, labels=PROMPT.int()).loss == expected
    segments = torch.tensor([[0, 0, -1], [0, 0, -1]])
    labels[:, 2] = 999  # padding
    assert model(PROMPT, labels=labels, segment_ids=segments).loss.isfinite()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make(positions="rotary").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def edit_json(path: Path, **changes: Any) -> None:
    entries = json.loads(path.read_text())
    entries.update(changes)
    path.write_text(json.dumps({name: value for name, value in entries.items() if value is not ...}))


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def to_pickle(folder: Path) -> Path:
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    return folder / "pytorch_model.bin"


def to_index(folder: Path, entries: Any) -> None:
    shutil.move(folder / "model.safetensors", folder / "part.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(entries))


DAMAGES: dict[str, tuple[Any, str]] = {  # what is done to a folder -> what the message holds besides the folder
    "cut weights": (lambda f: cut(f / "model.safetensors", 500), r"model\.safetensors is damaged"),
    "empty weights": (lambda f: cut(f / "model.safetensors", 0), r"model\.safetensors is damaged"),
    "cut header": (lambda f: cut(f / "model.safetensors", 5), r"model\.safetensors is damaged"),
    "garbage": (lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 999), r"model\.safetensors is damaged"),
    "cut pickle": (lambda f: cut(to_pickle(f), 500), r"pytorch_model\.bin is damaged"),
    "empty pickle": (lambda f: cut(to_pickle(f), 0), r"pytorch_model\.bin is damaged"),
    "garbage pickle": (lambda f: to_pickle(f).write_bytes(b"no pickle"), r"pytorch_model\.bin is damaged"),
    "pickled list": (lambda f: torch.save([1], to_pickle(f)), r"pytorch_model\.bin holds something else"),
    "pickled numbers": (lambda f: torch.save({"a": 1}, to_pickle(f)), r"pytorch_model\.bin holds something else"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), r"has neither model\.safetensors"),
    "index without map": (lambda f: to_index(f, {}), r"index\.json needs a weight_map.*got none"),
    "index of a list": (lambda f: to_index(f, []), r"index\.json must hold a JSON object, it holds a list"),
    "index of numbers": (lambda f: to_index(f, {"weight_map": {"a": 1}}), r"index\.json needs a weight_map"),
    "index of a missing file": (
        lambda f: to_index(f, {"weight_map": {"a": "gone.safetensors"}}),
        r"index\.json names the file 'gone\.safetensors'",
    ),
    "index of a file elsewhere": (
        lambda f: to_index(f, {"weight_map": {"a": "../model/part.safetensors"}}),
        r"index\.json names the file '\.\./model",
    ),
    "no config": (lambda f: (f / "config.json").unlink(), r"has no config\.json"),
    "cut config": (lambda f: cut(f / "config.json", 40), r"config\.json is not valid JSON"),
    "empty config": (lambda f: cut(f / "config.json", 0), r"config\.json is not valid JSON"),
    "binary config": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe"), r"config\.json is not valid JSON"),
    "nested config": (lambda f: (f / "config.json").write_text("[" * 99999), r"config\.json is not valid JSON"),
    "null config": (lambda f: (f / "config.json").write_text("null"), r"must hold a JSON object, it holds a NoneType"),
    "text config": (lambda f: (f / "config.json").write_text('"x"'), r"must hold a JSON object, it holds a str"),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_folder_is_refused_with_the_file(kind: str, folder: Path) -> None:
    damage, complaint = DAMAGES[kind]
    damage(folder)
    with pytest.raises(ValueError, match=complaint) as caught:
        GPT.from_pretrained(folder)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(GPTConfig)])
@pytest.mark.parametrize("value", [None, "x", [1], {}, -1.5], ids=repr)
def test_a_config_file_with_a_wrong_value_names_file_and_field(field: str, value: Any, folder: Path) -> None:
    if value is None and "None" in TAKES[field]:
        return
    if field == "eos_token_id" and value == [1]:
        return
    edit_json(folder / "config.json", **{field: value})
    with pytest.raises(ValueError, match=rf"config\.json: {field}\b"):
        GPT.from_pretrained(folder)


@pytest.mark.parametrize("field", ["model_type", "vocab_size", "n_positions", "n_embd", "n_layer", "n_head"])
def test_a_config_file_without_a_needed_key_is_refused(field: str, folder: Path) -> None:
    edit_json(folder / "config.json", **{field: ...})
    with pytest.raises(ValueError, match=rf"config\.json: {field}\b"):
        GPT.from_pretrained(folder)


def test_weights_of_another_type_are_refused_by_name(folder: Path) -> None:
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    tensors["transformer.ln_f.weight"] = torch.ones(8, dtype=torch.int64)
    safetensors.torch.save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"hold ln_f\.weight in torch\.int64, needs a float"):
        GPT.from_pretrained(folder)


@pytest.mark.parametrize("name", [None, 3, ["a"], b"a"])
def test_a_pretrained_name_of_another_type_is_refused(name: Any) -> None:
    with pytest.raises(TypeError, match="pretrained model: got"):
        GPT.from_pretrained(name)
