"""Names of parameters: every class reads all of a file or says what it left, and refusals list everything at once."""

import json
import warnings
from dataclasses import replace

import pytest
import safetensors.torch
import torch
from torch import nn

from fastattn.models import GPT, Bert, BertForEmbedding, BertForSequenceClassification, GPTConfig, load
from fastattn.models.checkpoint import (
    ENCODER_DECODERS,
    FAMILIES,
    Family,
    Part,
    Tensors,
    family_for,
    load_weights,
)
from fastattn.models.checkpoint.keys import check_keys
from fastattn.models.checkpoint.names import join, placed, to_file
from fastattn.models.families import MODELS
from fastattn.nn.uninitialised import Uninitialised

LLAMA_LIKE = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
BERT_LIKE = {k: v for k, v in LLAMA_LIKE.items() if k not in ("num_key_value_heads", "head_dim")}
BERT_LIKE["pad_token_id"] = 0
TINY = {  # entries of config.json; those not here have Llama's keys
    "gpt2": {"vocab_size": 61, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4},
    "distilbert": {"vocab_size": 61, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48},
    **dict.fromkeys(("bert", "roberta", "electra", "modernbert"), BERT_LIKE),
}
TINY["fastattn-gpt"] = {**TINY["gpt2"], "positions": "alibi", "qk_norm": True, "num_kv_heads": 2}
PAIRS = [
    pytest.param(cls, family, id=f"{cls.__name__}-{family.architectures[0]}")
    for cls in (*MODELS, BertForEmbedding)
    for family in cls.families
]


def tiny(cls, family):
    """A small model of a class in the format of a family."""
    torch.manual_seed(0)
    return cls(family.read_config(tiny_entries(family))).eval()


def tiny_entries(family):
    entries = {"model_type": family.model_type, "architectures": list(family.architectures)}
    if family not in ENCODER_DECODERS:
        return entries | TINY.get(family.model_type, LLAMA_LIKE)
    rows = family.write_config.keywords
    parts = {name: tiny_entries(rows[name]) for name in ("encoder", "decoder")}
    parts["decoder"] |= {"is_decoder": True, "add_cross_attention": True}
    if rows["decoder"].model_type == "bert":
        parts["decoder"]["tie_word_embeddings"] = rows["decoder"].write_config.keywords["tied"]
    return entries | parts


def distinct(folder):
    """Give every element of a folder's weights another value; the values by name."""
    path = folder / "model.safetensors"
    tensors, start = safetensors.torch.load_file(path), 2
    for name, tensor in tensors.items():
        values = torch.arange(start, start + tensor.numel(), dtype=torch.float32)
        assert values[-1] < 2**24
        tensors[name] = values.view(tensor.shape)
        start += tensor.numel()
    safetensors.torch.save_file(tensors, path)
    return tensors


def flat(tensors):
    return torch.cat([tensor.flatten() for tensor in tensors]).sort().values


@pytest.mark.parametrize(("cls", "family"), PAIRS)
def test_every_parameter_of_every_class_comes_from_the_file(cls, family, tmp_path):
    tiny(cls, family).save_pretrained(tmp_path)
    file = distinct(tmp_path)
    model = cls.from_pretrained(tmp_path)
    assert model.load_report.new == ()
    assert model.load_report.dropped == ()
    state = {id(t): t.detach() for t in model.state_dict(keep_vars=True).values()}
    assert torch.equal(flat(state.values()), flat(file.values()))
    model.save_pretrained(tmp_path / "again")
    again = safetensors.torch.load_file(tmp_path / "again" / "model.safetensors")
    assert again.keys() == file.keys()
    assert all(torch.equal(again[name], file[name]) for name in file)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config == json.loads((tmp_path / "again" / "config.json").read_text())
    if cls is not BertForEmbedding:
        assert type(load(tmp_path)) is cls
    assert type(load(tmp_path)) in (*MODELS, BertForEmbedding)


def trunks():
    """Classes with a head, and the family whose bare model's folder they start from."""
    for cls in MODELS:
        for family in cls.families:
            bare = [f for f in Bert.families if f.model_type == family.model_type]
            if cls is not Bert and bare and cls.new_heads:
                yield pytest.param(cls, bare[0], id=f"{cls.__name__}-{family.model_type}")


@pytest.mark.parametrize(("cls", "family"), list(trunks()))
def test_a_head_that_a_file_lacks_is_named_and_initialised(cls, family, tmp_path, caplog):
    tiny(Bert, family).save_pretrained(tmp_path)
    file = distinct(tmp_path)
    model = cls.from_pretrained(tmp_path)
    new = set(model.load_report.new)
    assert new
    assert any(sorted(new)[0] in record.message for record in caplog.records)
    values = flat(file.values())
    for name, parameter in model.named_parameters():
        found = torch.isin(parameter.detach(), values)
        assert not found.any() or name not in new, name
        assert found.all() or name in new, name
        assert parameter.isfinite().all()
    dropped = (
        flat(file[name] for name in model.load_report.dropped) if model.load_report.dropped else values[:0]
    )
    kept = flat(p.detach() for name, p in model.named_parameters() if name not in new)
    assert torch.equal(flat([kept, dropped]), values)


def test_heads_of_the_family_are_dropped_and_listed(tmp_path):
    family = BertForSequenceClassification.families[0]
    tiny(BertForSequenceClassification, family).save_pretrained(tmp_path)
    model = Bert.from_pretrained(tmp_path)
    assert set(model.load_report.dropped) == {"classifier.weight", "classifier.bias"}


class Two(nn.Module):
    """A packed projection and a tied pair."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(3, 7, bias=False)
        self.plain = nn.Linear(3, 2)
        self.embed, self.head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight


TWO = Family(
    model_type="two",
    architectures=("Two",),
    prefix="m.",
    parts=(
        Part("qkv.weight", ("m.q.weight", "m.k.weight", "m.v.weight"), sizes=lambda config: (3, 2, 2)),
        Part("plain.weight", ("m.plain.kernel",), transposed=True),
        Part("plain.bias", ("m.plain.bias",)),
        Part("embed.weight", ("m.embed.weight",)),
        Part("head.weight", ("head.weight",)),
    ),
    dropped=("mask",),
    aliases=((".gamma", ".kernel"),),
    read_config=dict,
    write_config=dict,
)


def two_tensors():
    torch.manual_seed(1)
    return {
        "m.q.weight": torch.randn(3, 3),
        "m.k.weight": torch.randn(2, 3),
        "m.v.weight": torch.randn(2, 3),
        "m.plain.kernel": torch.randn(3, 2),
        "m.plain.bias": torch.randn(2),
        "m.embed.weight": torch.randn(5, 3),
    }


def read_two(tensors, **options):
    with torch.device("meta"), Uninitialised():
        model = Two()
    return model, load_weights(model, None, TWO, Tensors.of("here", tensors), **options)


def test_parts_are_joined_transposed_and_tied():
    tensors = two_tensors()
    model, report = read_two({**tensors, "mask": torch.ones(2, dtype=torch.bool)})
    assert torch.equal(model.qkv.weight, torch.cat([tensors[f"m.{x}.weight"] for x in "qkv"]))
    assert torch.equal(model.plain.weight, tensors["m.plain.kernel"].t())
    assert model.plain.weight.is_contiguous()
    assert model.head.weight is model.embed.weight
    assert report.dropped == ("mask",)
    written = to_file({n: p.detach() for n, p in model.named_parameters()}, None, TWO)
    assert written.keys() == tensors.keys()
    assert all(torch.equal(written[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("shape", [(0, 5), (1, 7), (7, 1), (3, 64), (64, 65), (130, 257), (600, 70)])
def test_transposed_tensors_of_any_size(shape, dtype):
    """Whole strips of a row and what is left of it, of one tensor and of several, also in another dtype."""
    made = [torch.randint(-9, 9, shape).to(dtype) for _ in range(2)]
    part = Part("x", ("a", "b"), transposed=True)
    for wanted in (None, torch.float32):
        for pieces in (made[:1], made):
            found = join(pieces, part, wanted)
            expected = torch.cat([piece.t() for piece in pieces])
            expected = expected if wanted is None or not dtype.is_floating_point else expected.to(wanted)
            assert found.dtype == expected.dtype
            assert found.is_contiguous()
            assert torch.equal(found, expected)


@pytest.mark.parametrize("names", ["bare", "aliased", "tied elsewhere", "tied twice"])
def test_other_spellings_of_names(names):
    tensors = two_tensors()
    if names == "bare":
        tensors = {name.removeprefix("m."): t for name, t in tensors.items()}
    elif names == "aliased":
        tensors["m.plain.gamma"] = tensors.pop("m.plain.kernel")
    elif names == "tied elsewhere":
        tensors["head.weight"] = tensors.pop("m.embed.weight")
    else:
        tensors["head.weight"] = tensors["m.embed.weight"].clone()
    model, report = read_two(tensors)
    expected, _ = read_two(two_tensors())
    assert report.dropped == ()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters(), strict=True))


def test_everything_that_does_not_fit_is_listed_at_once():
    tensors = two_tensors()
    del tensors["m.k.weight"], tensors["m.plain.bias"]
    tensors["m.plain.kernel"] = torch.zeros(2, 3)
    tensors["m.embed.weight"] = torch.zeros(5, 3, dtype=torch.int64)
    tensors["stray"] = torch.zeros(1)
    tensors["m.stray.two"] = torch.zeros(1)
    with pytest.raises(ValueError, match="here do not fit its config") as caught:
        read_two(tensors)
    message = str(caught.value)
    for part in (
        r"m.k.weight",
        "plain.bias",
        "m.plain.kernel has shape (2, 3), needs (3, 2)",
        "hold embed.weight in torch.int64, needs a float",
        "stray, m.stray.two",
    ):
        assert part in message, part


def test_two_spellings_of_one_tensor_and_untied_values_are_refused():
    tensors = two_tensors()
    with pytest.raises(ValueError, match=r"m\.plain.bias are the same tensor"):
        read_two({**tensors, "plain.bias": torch.zeros(2)})
    with pytest.raises(ValueError, match=r"head\.weight and embed\.weight differ, which the config ties"):
        read_two({**tensors, "head.weight": torch.zeros(5, 3)})


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_that_are_not_finite_are_refused_and_listed(bad, dtype):
    tensors = {name: t.to(dtype) for name, t in two_tensors().items()}
    tensors["m.k.weight"][1, 1] = bad
    tensors["m.plain.bias"][0] = bad
    with pytest.raises(ValueError, match=r"not finite \(NaN or infinity\) in qkv\.weight, plain\.bias"):
        read_two(tensors)


def test_finite_weights_whose_sum_overflows_load():
    tensors = two_tensors()
    tensors["m.embed.weight"] = torch.full((5, 3), 3e38)
    assert read_two(tensors)[0].embed.weight.max() == torch.tensor(3e38)


def test_new_and_fresh_parameters():
    tensors = two_tensors()
    del tensors["m.plain.kernel"], tensors["m.plain.bias"]
    model, report = read_two(tensors, new=("plain.*",))
    assert set(report.new) == {"plain.weight", "plain.bias"}
    assert not model.plain.bias.any()
    assert 0 < model.plain.weight.std() < 1
    tensors["m.plain.bias"] = torch.ones(2)
    with pytest.raises(ValueError, match=r"missing: plain\.weight"):  # a part of a head is a damaged head
        read_two(tensors, new=("plain.*",))
    model, report = read_two(two_tensors(), fresh=("plain.*",))
    assert set(report.new) == {"plain.weight", "plain.bias"}
    assert set(report.dropped) == {"m.plain.kernel", "m.plain.bias"}
    with pytest.raises(ValueError, match=r"new: got 'plan\.\*', which names no parameter of Two"):
        read_two(two_tensors(), fresh=("plan.*",))


def test_a_parameter_without_a_row_is_a_mistake_of_the_table():
    with pytest.raises(RuntimeError, match=r"no row of its table names other\.weight"):
        placed(TWO, ["qkv.weight", "other.weight"])


def test_one_tensor_in_our_order_and_dtype_is_not_copied():
    part = Part("x", ("x",))
    x = torch.randn(4, 3)
    assert join([x], part).data_ptr() == x.data_ptr()
    assert join([x], part, torch.float32).data_ptr() == x.data_ptr()
    assert join([x], part, torch.bfloat16).dtype == torch.bfloat16
    counts = torch.arange(3)
    assert join([counts], part, torch.bfloat16).dtype == torch.int64
    assert join([torch.tensor(2.0)], part, torch.float64) == 2


def test_names_of_families_are_unique():
    def parts_of(family):  # an encoder-decoder has a row for each pair of types
        rows = family.write_config.keywords.values() if family in ENCODER_DECODERS else ()
        return tuple((row.model_type, row.parts) for row in rows)

    rows = [  # an encoder's untied output has a row of its own beside the tied one's
        (cls.__name__, f.model_type, name, f.parts, parts_of(f))
        for cls in MODELS
        for f in cls.families
        for name in f.architectures
    ]
    assert len(set(rows)) == len(rows)
    assert {f.model_type for cls in MODELS for f in cls.families} == {f.model_type for f in FAMILIES}


def test_the_family_of_a_config_is_the_first_that_can_say_it():
    config = GPTConfig(**TINY["gpt2"])
    assert family_for(config, GPT.families).model_type == "gpt2"
    assert family_for(replace(config, positions="rotary"), GPT.families).model_type == "fastattn-gpt"
    with pytest.raises(ValueError, match=r"config: no model type supports this config: gpt2: positions"):
        family_for(replace(config, positions="rotary"), GPT.families[:1])


def test_keys_of_config_json_are_sorted():
    check_keys({"a": 1, "use_cache": True, "_name_or_path": "x", "b": 2}, honoured=["a"], defaults={"b": 2})
    with pytest.raises(ValueError, match=r"b: got 3, only 2 is supported; c: got 0, which is no key"):
        check_keys({"a": 1, "b": 3, "c": 0}, honoured=["a"], defaults={"b": 2})
    notes = {"language": "english", "name": "Roberta", "unsloth_fixed": True, "unsloth_version": "2025.1"}
    notes |= {"sbert_ce_default_activation_function": "torch.nn.modules.linear.Identity"}
    check_keys({**notes, "sentence_transformers": {"version": "4.1.0"}}, honoured=[])
    for key, value in (("is_decoder", True), ("quantization_config", {}), ("auto_map", {"AutoModel": "x"})):
        with pytest.raises(ValueError, match=key):
            check_keys({key: value}, honoured=[])


@pytest.mark.parametrize("kind", ["bert", "roberta", "modernbert", "gpt2", "llama", "gemma3_text"])
def test_a_key_that_is_null_is_not_set_in_any_family(kind):
    """transformers reads null as false, so it is as good as no key where leaving the key out means a false value."""
    families = {family.model_type: family for family in (*Bert.families, *GPT.families)}
    read = families[kind].read_config
    plain = read({"model_type": kind})
    nulls = {"a_new_key": None, "is_decoder": None, "pruned_heads": None, "quantization_config": None}
    assert read({"model_type": kind, **nulls}) == plain
    kept_keys = {"bert": "position_embedding_type", "gpt2": "scale_attn_weights"}
    if kind in kept_keys:
        with pytest.raises(ValueError, match=f"^{kept_keys[kind]}: got None"):
            read({"model_type": kind, kept_keys[kind]: None})


MIXTURES = ("mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v3", "gpt_oss", "dbrx", "olmoe", "llama4")


@pytest.mark.parametrize("kind", [*MIXTURES, "t5", None, 3])
def test_other_model_types_are_refused_by_name_before_a_weight_is_read(kind, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind, "architectures": ["Other"]}))
    with pytest.raises(ValueError, match=rf"config\.json: model_type: got {kind!r}"):
        load(tmp_path)


def test_architectures_decide_and_the_model_type_stands_in(tmp_path):
    family = next(f for f in Bert.families if f.model_type == "bert")
    tiny(BertForSequenceClassification, family).save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert type(load(tmp_path)) is BertForSequenceClassification
    entries = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**entries, "architectures": ["BertForRiddles"]}))
    with pytest.warns(UserWarning, match=r"'BertForRiddles'.*as Bert, without"):
        assert type(load(tmp_path)) is Bert
    del entries["architectures"]
    (tmp_path / "config.json").write_text(json.dumps(entries))
    assert type(load(tmp_path)) is Bert
