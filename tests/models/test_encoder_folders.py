"""Folders of encoders: read and written value by value, with everything that does not fit refused or named."""

import dataclasses
import json
import math
import re
from pathlib import Path

import encoder_models as tiny
import pytest
import torch
from safetensors.torch import load_file, save_file

import fastattn.models as models
from fastattn.models import Bert, BertConfig, BertForMaskedLM, BertForSequenceClassification
from fastattn.models.checkpoint.encoder_names import KINDS
from fastattn.models.checkpoint.encoders import ENCODERS, FAMILIES_OF, read_config
from fastattn.models.presets import ENCODERS as PRESETS
from fastattn.models.presets import FAMILY_FIELDS

transformers = pytest.importorskip("transformers")
every_pair = pytest.mark.parametrize(("family", "head"), tiny.PAIRS, ids=["-".join(p) for p in tiny.PAIRS])


@every_pair
def test_a_round_trip_keeps_every_value_and_transformers_loads_it(family, head, tmp_path):
    theirs = tiny.theirs(family, head)
    theirs.save_pretrained(tmp_path / "theirs")
    before = load_file(tmp_path / "theirs" / "model.safetensors")
    ours = tiny.our_class(family, head).from_pretrained(tmp_path / "theirs")
    assert ours.load_report == models.checkpoint.LoadReport((), ())
    ours.save_pretrained(tmp_path / "ours")
    after = load_file(tmp_path / "ours" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    again, info = type(theirs).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert theirs.state_dict().keys() == again.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(theirs.state_dict().values(), again.state_dict().values()))
    known = {k: v for k, v in theirs.config.to_dict().items() if not k.startswith("_")}
    assert known == {k: v for k, v in again.config.to_dict().items() if not k.startswith("_")}


@every_pair
def test_each_parameter_came_from_the_file(family, head, tmp_path):
    theirs = tiny.theirs(family, head)
    theirs.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    path = tmp_path / "model.safetensors"
    for index, name in enumerate(sorted(tensors)):  # numbers that no other tensor has
        tensors[name] = torch.arange(tensors[name].numel()).view(tensors[name].shape) + 10_000.0 * index
    save_file(tensors, path, metadata={"format": "pt"})
    ours = tiny.our_class(family, head).from_pretrained(tmp_path)
    found = torch.cat([parameter.detach().flatten() for parameter in ours.parameters()])
    given = torch.cat([tensor.flatten() for tensor in tensors.values()])
    assert torch.equal(found.sort().values, given.sort().values)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_head_that_the_folder_lacks_is_new_and_named(family, tmp_path):
    tiny.theirs(family, "ForMaskedLM").save_pretrained(tmp_path)
    for head, output in (
        ("ForSequenceClassification", "classifier"), ("ForTokenClassification", "classifier"),
        ("ForQuestionAnswering", "qa_outputs"),
    ):  # fmt: skip
        ours = tiny.HEADS[head].from_pretrained(
            tmp_path, **({"num_labels": 5} if output == "classifier" else {})
        )
        report = ours.load_report
        assert {f"{output}.weight", f"{output}.bias"} <= set(report.new)
        assert all(name.startswith((output, "head.")) for name in report.new)
        assert (len(getattr(ours, output).bias) == 5) == (output == "classifier")
        assert (
            family == "modernbert" or report.dropped
        )  # which keeps the dense layer, and drops a bias at most
        assert all(parameter.isfinite().all() for parameter in ours.parameters())
        assert not getattr(ours, output).bias.any()
        weight = getattr(ours, output).weight
        assert weight.std() < 2 * ours.config.initializer_range
    tiny.theirs(family, "Model").save_pretrained(tmp_path / "bare")
    with pytest.raises(ValueError, match=r"missing: .*head\.dense\.weight"):
        BertForMaskedLM.from_pretrained(tmp_path / "bare")


def test_another_number_of_labels_needs_a_new_classifier(tmp_path):
    tiny.theirs("bert", "ForSequenceClassification", num_labels=3).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"classifier.weight has shape \(3, 32\), needs \(5, 32\)"):
        BertForSequenceClassification.from_pretrained(tmp_path, num_labels=5)
    ours = BertForSequenceClassification.from_pretrained(tmp_path, num_labels=5, new=("classifier.*",))
    assert set(ours.load_report.new) == {"classifier.weight", "classifier.bias"}
    named = BertForSequenceClassification.from_pretrained(
        tmp_path, id2label={0: "no", 1: "yes"}, new=("classifier.*",)
    )
    assert named.config.labels() == ["no", "yes"]
    assert named.config.num_labels == 2
    named.save_pretrained(tmp_path / "named")
    config = transformers.AutoConfig.from_pretrained(tmp_path / "named")
    assert config.id2label == {0: "no", 1: "yes"}
    assert config.label2id == {"no": 0, "yes": 1}


def test_a_discriminator_becomes_a_classifier_of_tokens(tmp_path):
    tiny.theirs("electra", "ForPreTraining").save_pretrained(tmp_path)
    ours = models.BertForTokenClassification.from_pretrained(tmp_path, num_labels=4)
    assert set(ours.load_report.new) == {"classifier.weight", "classifier.bias"}
    assert all(name.startswith("discriminator_predictions") for name in ours.load_report.dropped)
    ours.save_pretrained(tmp_path / "ours")
    again = transformers.AutoModelForTokenClassification.from_pretrained(tmp_path / "ours")
    ids, mask = tiny.batch(0)
    real = mask.bool()
    expected = again.eval()(ids, attention_mask=mask).logits[real]
    torch.testing.assert_close(ours(ids, mask).logits[real], expected)


def test_old_files_load(tmp_path):
    """Norms called gamma and beta, no prefix, buffers, the output's weight and bias twice, a pickled state_dict."""
    theirs = tiny.theirs("bert", "ForMaskedLM")
    theirs.save_pretrained(tmp_path)
    ids, mask = tiny.batch(0)
    expected = BertForMaskedLM.from_pretrained(tmp_path)(ids, mask).logits.detach().clone()
    state = {name: tensor.clone() for name, tensor in theirs.state_dict().items()}
    for name in list(state):
        if "LayerNorm" in name:
            old = name.replace("weight", "gamma").replace("bias", "beta")
            state[old] = state.pop(name)
        elif name.startswith("bert."):
            state[name.removeprefix("bert.")] = state.pop(name)
    state["embeddings.position_ids"] = torch.arange(40)[None]
    state["cls.seq_relationship.weight"] = torch.zeros(2, 32)
    (tmp_path / "model.safetensors").unlink()
    torch.save(state, tmp_path / "pytorch_model.bin")
    ours = BertForMaskedLM.from_pretrained(tmp_path)
    assert torch.equal(ours(ids, mask).logits, expected)
    assert set(ours.load_report.dropped) == {
        "embeddings.position_ids", "cls.seq_relationship.weight", "cls.predictions.decoder.bias",
    }  # fmt: skip


def test_an_untied_output_uses_its_own_bias(tmp_path):
    theirs = tiny.theirs("bert", "ForMaskedLM", tie_word_embeddings=False).double()
    ours = tiny.ours_of(theirs, BertForMaskedLM)
    ids, mask = tiny.batch(0)
    real = mask.bool()
    expected = theirs(ids, attention_mask=mask).logits[real]
    torch.testing.assert_close(ours(ids, mask).logits[real], expected)
    ours.save_pretrained(tmp_path)
    again = transformers.BertForMaskedLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(again(ids, attention_mask=mask).logits[real], expected)


def test_a_pooler_is_optional(tmp_path):
    tiny.theirs("bert", "ForMaskedLM").save_pretrained(tmp_path)
    bare = Bert.from_pretrained(tmp_path)
    assert bare.pooler is None
    assert not bare.config.pooler
    ids, mask = tiny.batch(0)
    assert bare(ids, mask).pooler_output is None


REFUSED = {
    "relative positions": (
        "bert", {"position_embedding_type": "relative_key"}, "position_embedding_type: got 'relative_key'",
    ),
    "a decoder": ("bert", {"is_decoder": True}, "is_decoder: got True"),
    "an unknown key": ("roberta", {"num_experts": 8}, "num_experts: got 8"),
    "an unknown activation": ("electra", {"hidden_act": "gelu_10"}, "hidden_act: got 'gelu_10'"),
    "scaled positions": (
        "modernbert",
        {"rope_parameters": {"full_attention": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}},
        "rope_parameters: got",
    ),
    "positions of all layers at once": (
        "modernbert", {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "rope_parameters: got",
    ),
    "positions of unknown layers": (
        "modernbert", {"rope_parameters": {"chunked_attention": {"rope_theta": 1e4}}}, "got 'chunked_attention'",
    ),
    "another type": ("bert", {"model_type": "deberta"}, "model_type: got 'deberta'"),
    "code": ("bert", {"auto_map": {"AutoModel": "x.py--Model"}}, "auto_map: got"),
}  # fmt: skip


@pytest.mark.parametrize(("family", "changes", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_a_config_that_would_change_the_result_is_refused_before_weights_are_read(
    family, changes, message, tmp_path
):
    tiny.theirs(family, "ForMaskedLM").save_pretrained(tmp_path)
    entries = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**entries, **changes}))
    (tmp_path / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ValueError, match=message):
        BertForMaskedLM.from_pretrained(tmp_path)


OTHER_KINDS = (
    None,
    True,
    -1,
    0,
    1.5,
    10**30,
    math.nan,
    "x",
    [],
    ["x"],
    [{}],
    {},
    {"x": 1},
    {"full_attention": {"x": 1}},
)


def refusal(family, entries):
    """The key that a refusal begins with; empty where the config is taken."""
    try:
        read_config(family, entries)
    except ValueError as error:
        return re.split(r"[:\s\[]", str(error))[0]
    return ""


@pytest.mark.parametrize("family", KINDS)
def test_a_value_of_another_kind_is_taken_or_refused_by_its_key(family):
    whole = tiny.theirs(family, "Model").config.to_dict()
    whole |= {"problem_type": None, "num_labels": 2}
    wholes = [whole]
    if family == "modernbert":
        old = {"global_attn_every_n_layers": 3, "global_rope_theta": 1e4, "local_rope_theta": 1e4}
        wholes += [{k: v for k, v in whole.items() if k not in ("layer_types", "rope_parameters")} | old]
    ours = {"rope_theta", "local_rope_theta"}  # within rope_parameters
    for entries in wholes:
        for key in entries.keys() - {"model_type"}:
            for value in OTHER_KINDS:
                assert refusal(family, {**entries, key: value}) in {"", *entries, *ours}, (key, value)


def test_missing_and_left_over_tensors_are_all_listed(tmp_path):
    tiny.theirs("bert", "ForMaskedLM").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["bert.encoder.layer.1.output.dense.weight"]
    tensors["bert.encoder.layer.7.output.dense.weight"] = torch.zeros(1)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"missing: .*layer\.1\.output.*left over: .*layer\.7\.output"):
        BertForMaskedLM.from_pretrained(tmp_path)


def test_modernbert_configs_of_before_rope_parameters(tmp_path):
    theirs = tiny.theirs("modernbert", "Model", num_hidden_layers=3)
    theirs.save_pretrained(tmp_path)
    expected = Bert.from_pretrained(tmp_path).config
    entries = json.loads((tmp_path / "config.json").read_text())
    del entries["rope_parameters"], entries["layer_types"]
    entries |= {"global_rope_theta": 160000.0, "local_rope_theta": 10000.0, "global_attn_every_n_layers": 3}
    (tmp_path / "config.json").write_text(json.dumps(entries))
    assert Bert.from_pretrained(tmp_path).config == expected


def test_what_a_family_cannot_say_is_not_written(tmp_path):
    model = Bert(BertConfig(**tiny.SIZES, pre_norm=True))
    with pytest.raises(ValueError, match="pre_norm: got True, a bert folder needs False"):
        model.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_their_parameters_and_can_be_written(name):
    config = BertConfig.preset(name)
    with torch.device("meta"):
        assert sum(p.numel() for p in Bert(config).parameters()) == PRESETS[name].parameters
    rows = [row for row in FAMILIES_OF["BertForMaskedLM"] if row.model_type == config.model_type]
    entries = rows[0].write_config(config)
    read = rows[0].read_config(json.loads(json.dumps({"model_type": config.model_type, **entries})))
    assert read == BertConfig(**{**config.to_dict(), "embedding_size": read.embedding_size})
    assert read.embedding_dim == config.embedding_dim


def test_every_family_has_every_head_that_transformers_has():
    assert set(KINDS) == set(FAMILY_FIELDS)
    written = {row.architectures[0] for row in ENCODERS}
    for family, (begins, _) in tiny.FAMILIES.items():
        for head in tiny.HEADS:
            there = hasattr(transformers, begins + head)
            assert (begins + head in written) == there, f"{family} {head}"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 30}, "num_attention_heads: got 4, which does not divide"),
        ({"layer_types": ["full_attention"]}, "layer_types: got 1, needs one for each"),
        ({"layer_types": ["full", "full", "full"]}, r"layer_types\[0\]: got 'full'"),
        ({"num_labels": 0}, "num_labels: got 0"),
        ({"id2label": {0: "a", 2: "b"}}, "id2label: got"),
        ({"id2label": {0: "a"}, "num_labels": 2}, "num_labels: got 2, but id2label names 1"),
        ({"problem_type": "ranking"}, "problem_type: got 'ranking'"),
        ({"hidden_dropout_prob": 1.5}, "hidden_dropout_prob: got 1.5"),
        ({"pad_token_id": 61}, "pad_token_id: got 61, needs less than vocab_size=61"),
        (
            {"positions": "rotary", "hidden_size": 36, "num_attention_heads": 12},
            "positions: rotary needs an even",
        ),
        ({"model_type": "gpt2"}, "model_type: got 'gpt2'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_configs_are_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        BertConfig(**{**tiny.SIZES, **changes})
    with pytest.raises(ValueError, match="preset: got 'bert-huge'"):
        BertConfig.preset("bert-huge")


def test_a_preset_with_fewer_layers_has_the_first_ones():
    full, local = "full_attention", "sliding_attention"
    few = BertConfig.preset("modernbert-base", num_hidden_layers=5)
    assert few.kinds_of_layers == (full, local, local, full, local)
    with pytest.raises(ValueError, match="layer_types: got 22, needs one for each of num_hidden_layers=30"):
        BertConfig.preset("modernbert-base", num_hidden_layers=30)


def test_the_page_lists_every_preset_with_an_example_that_runs():
    page = (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([^`]+)` \| ([\d,]+) \| (.+?) \| `(Bert.*)` \|$", page, re.MULTILINE)
    assert [row[:3] for row in rows] == [(n, f"{p.parameters:,}", p.source) for n, p in PRESETS.items()]
    for name, _, _, example in rows:
        with torch.device("meta"):
            model = eval(example, {"Bert": Bert, "BertConfig": BertConfig})
        assert model.config == BertConfig.preset(name)


HOSTILE = (
    None, True, False, -1, 0, 1.5, -0.5, math.nan, math.inf, -math.inf, 10**30, "x", "3", b"3", [], ["3"], [True],
    {}, torch.ones(2), object(),
)  # fmt: skip


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(BertConfig)])
def test_a_config_refuses_by_name_what_means_nothing_and_keeps_plain_types(field):
    refused = []
    for value in HOSTILE:
        try:
            config = BertConfig(**{**tiny.SIZES, field: value})
        except ValueError as error:
            refused.append(str(error))
        else:
            json.dumps(config.to_dict(), allow_nan=False)
    assert [message for message in refused if not re.match(rf"{field}\b.*(got|needs)", message)] == []
    assert len(refused) >= 13  # a flag takes two of them, an optional number four at most


@pytest.mark.parametrize("new", [True, "classifier.*", (1,)])
def test_patterns_of_new_parameters_are_checked(tmp_path: Path, new: object) -> None:
    with pytest.raises(TypeError, match=r"new: got .*, needs a sequence of patterns"):
        BertForSequenceClassification.from_pretrained(tmp_path, new=new)
