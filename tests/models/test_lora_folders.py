"""PEFT's folders of adapters both ways: patterns, options and tensors that are refused, models they name."""

import copy
import json

import pytest
import safetensors.torch
import torch
from lora_models import IDS, LLAMA, filled, make, run
from small_models import BERT, GPT2

from fastattn.models import GPT, Bert, BertConfig, BertForSequenceClassification, load
from fastattn.models.lora import adapters_of, attach, merge
from fastattn.models.peft import load_adapter, save_adapter


@pytest.mark.parametrize("kind", ["gpt", "llama", "bert", "mixed"])
def test_adapter_folders_round_trip(kind, tmp_path):
    model = filled(attach(make(kind), r=3, alpha=5, dropout=0.1, rslora=True))
    save_adapter(model, tmp_path / "adapter")
    assert {p.name for p in (tmp_path / "adapter").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    again = load_adapter(make(kind), tmp_path / "adapter")
    assert torch.equal(run(again), run(model))
    assert {(a.r, a.alpha, a.dropout.p, a.rslora) for a in adapters_of(again)} == {(3, 5, 0.1, True)}
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["fan_in_fan_out"] == (kind == "gpt")
    tensors = safetensors.torch.load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    torch.save(tensors, tmp_path / "adapter" / "adapter_model.bin")  # as older versions of PEFT
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    assert torch.equal(run(load_adapter(make(kind), tmp_path / "adapter")), run(model))
    merge(again, *(() if kind != "mixed" else (torch.randn(1, 4, 8),)))


@pytest.mark.parametrize("saved", [False, True])
@pytest.mark.parametrize("kind", ["gpt", "bert"])
def test_a_quantized_model_takes_no_adapters(kind, saved, tmp_path):
    """Its layers are others, and adapters would be left out without notice."""
    save_adapter(filled(attach(make(kind))), tmp_path / "adapter")
    model, base = make(kind), tmp_path / "base"
    model.save_pretrained(base, quantize="int8" if saved else None)
    small = load(base, quantize=None if saved else "int8")
    for put in (attach, lambda small: load_adapter(small, tmp_path / "adapter")):
        with pytest.raises(
            ValueError, match=r"^model: .*is quantized to 8 bits, needs model\.quantize\(None\)"
        ):
            put(small)
    assert not any(True for _ in adapters_of(small))
    small.quantize(None)
    adapted = attach(small, targets=["c_attn"] if kind == "gpt" else ["query"])
    assert len(list(adapters_of(adapted))) == 2
    with pytest.raises(ValueError, match=r"^kind: "):
        adapted.quantize("int8")


def change(folder, **entries):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


def test_ranks_and_alphas_by_pattern(tmp_path):
    model = filled(attach(make("gpt"), r=2, alpha=4, targets=["c_attn", "c_fc"]))
    save_adapter(model, tmp_path)
    tensors = safetensors.torch.load_file(tmp_path / "adapter_model.safetensors")
    tensors = {
        n: torch.cat([t, t], 0 if "lora_A" in n else 1) if "c_fc" in n else t for n, t in tensors.items()
    }
    safetensors.torch.save_file(tensors, tmp_path / "adapter_model.safetensors")
    change(tmp_path, rank_pattern={"c_fc": 4}, alpha_pattern={r"h\.1\.mlp\.c_fc": 8})
    read = {a.block.name: a for a in adapters_of(load_adapter(make("gpt"), tmp_path))}
    assert {(a.r, a.alpha) for n, a in read.items() if "c_attn" in n} == {(2, 4)}
    assert [
        (read[f"transformer.h.{i}.mlp.c_fc"].r, read[f"transformer.h.{i}.mlp.c_fc"].scale) for i in range(2)
    ] == [
        (4, 1.0),
        (4, 2.0),
    ]
    mixed = load_adapter(make("gpt"), tmp_path)
    save_adapter(mixed, tmp_path / "again")
    assert torch.equal(run(load_adapter(make("gpt"), tmp_path / "again")), run(mixed))


REFUSED = {
    "peft_type": "LOHA",
    "bias": "all",
    "use_dora": True,
    "lora_bias": True,
    "modules_to_save": ["classifier"],
    "layer_replication": [[0, 1]],
    "trainable_token_indices": [1],
    "target_parameters": ["x"],
    "use_qalora": True,
    "alora_invocation_tokens": [1],
    "init_lora_weights": "pissa",
    "loftq_config": {"bits": 4},
    "unknown_option": 1,
    "r": 0,
    "lora_alpha": "x",
    "lora_dropout": 2,
    "use_rslora": 1,
    "rank_pattern": [1],
}


@pytest.mark.parametrize("option", REFUSED)
def test_options_that_are_not_computed_are_refused_by_name(option, tmp_path):
    save_adapter(attach(make("gpt")), tmp_path)
    change(tmp_path, **{option: REFUSED[option]})
    model = make("gpt")
    with pytest.raises(ValueError, match=rf"adapter_config\.json: {option}: got"):
        load_adapter(model, tmp_path)
    assert list(adapters_of(model)) == []


def test_options_of_newer_versions_that_are_not_set_are_passed_over(tmp_path):
    save_adapter(filled(attach(make("gpt"))), tmp_path)
    expected = run(load_adapter(make("gpt"), tmp_path))
    for value in (None, False, [], {}):
        change(tmp_path, an_option_to_come=value)
        assert torch.equal(run(load_adapter(make("gpt"), tmp_path)), expected)
    for value in (True, 0, [1], {"a": None}, "", "x"):
        change(tmp_path, an_option_to_come=value)
        with pytest.raises(ValueError, match=r"an_option_to_come: got .*, which is no option of LoRA"):
            load_adapter(make("gpt"), tmp_path)


def test_adapter_tensors_that_do_not_fit_are_listed(tmp_path):
    save_adapter(attach(make("gpt"), r=2), tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(path)
    front = "base_model.model.transformer.h.0."
    del tensors[f"{front}attn.c_attn.lora_B.weight"]
    tensors[f"{front}mlp.c_fc.lora_A.weight"] = torch.zeros(3, 32)
    tensors[f"{front}mlp.c_proj.lora_A.weight"][0, 0] = float("nan")
    tensors["base_model.model.transformer.wte.lora_embedding_A"] = torch.zeros(2, 61)
    tensors["base_model.model.transformer.h.7.mlp.c_fc.lora_A.weight"] = torch.zeros(2, 32)
    safetensors.torch.save_file(tensors, path)
    with pytest.raises(ValueError, match="does not fit") as caught:
        load_adapter(make("gpt"), tmp_path)
    for part in (
        "h.0.attn.c_attn.lora_B.weight is missing",
        "h.0.mlp.c_fc.lora_A.weight is torch.float32 (3, 32), needs (2, 32)",
        "h.0.mlp.c_proj.lora_A.weight is not finite",
        "wte.lora_embedding_A belongs to no linear layer of GPT",
        "h.7.mlp.c_fc.lora_A.weight belongs to no linear layer",
    ):
        assert part in str(caught.value), part
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors is damaged"):
        load_adapter(make("gpt"), tmp_path)
    path.unlink()
    with pytest.raises(ValueError, match="has neither adapter_model"):
        load_adapter(make("gpt"), tmp_path)
    with pytest.raises(ValueError, match="model: has no adapters"):
        save_adapter(make("gpt"), tmp_path)


def test_a_bare_encoder_takes_the_adapter_of_a_model_with_a_head(tmp_path):
    model = filled(attach(make("bert"), r=2, targets=["query", "value"]))
    save_adapter(model, tmp_path)
    bare = Bert(BertConfig(**BERT)).eval()
    load_adapter(bare, tmp_path)
    assert len(list(adapters_of(bare))) == 4


def test_a_folder_of_an_adapter_loads_with_the_model_it_names(tmp_path):
    make("gpt").save_pretrained(tmp_path / "base")
    model = filled(attach(load(tmp_path / "base"), r=2))
    save_adapter(model, tmp_path / "adapter")
    assert torch.equal(run(load(tmp_path / "adapter")), run(model))
    with pytest.raises(ValueError, match="quantize: got 'int8', which does not go with an adapter"):
        load(tmp_path / "adapter", quantize="int8")
    for base in (None, "", str(tmp_path / "adapter")):
        change(tmp_path / "adapter", base_model_name_or_path=base)
        with pytest.raises(ValueError, match=r"adapter_config\.json: base_model_name_or_path: got"):
            load(tmp_path / "adapter")


@pytest.mark.downloads
@pytest.mark.parametrize("kind", ["gpt", "llama", "bert"])
@pytest.mark.parametrize("rslora", [False, True])
def test_peft_computes_the_same_from_our_folder_and_we_from_its(kind, rslora, tmp_path):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    if kind == "gpt":
        theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2))
        targets, cls = ["c_attn", "c_fc", "c_proj"], GPT
    elif kind == "llama":
        theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA))
        targets, cls = ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"], GPT
    else:
        theirs = transformers.BertForSequenceClassification(transformers.BertConfig(**BERT))
        targets, cls = ["query", "key", "value", "output.dense"], BertForSequenceClassification
    theirs.double().eval().save_pretrained(tmp_path / "base")
    ours = cls.from_pretrained(tmp_path / "base")
    # transformers' norms and angles are float32 in a float64 Llama
    apart = 10 * float((run(ours) - theirs(IDS).logits).abs().max())
    ours = filled(attach(ours, r=3, alpha=6, targets=targets, rslora=rslora))
    save_adapter(ours, tmp_path / "ours")
    adapted = peft.PeftModel.from_pretrained(copy.deepcopy(theirs), tmp_path / "ours").eval()
    torch.testing.assert_close(adapted(IDS).logits, run(ours), rtol=0, atol=1e-9 + apart)
    assert (adapted(IDS).logits - theirs(IDS).logits).abs().max() > 0.3

    config = peft.LoraConfig(
        r=4, lora_alpha=3, use_rslora=rslora, target_modules=targets, init_lora_weights=False,
        rank_pattern=dict.fromkeys(("c_fc", "query", "v_proj"), 2),
        alpha_pattern=dict.fromkeys(("c_fc", "query", "up_proj"), 7), fan_in_fan_out=kind == "gpt",
    )  # fmt: skip
    adapted = peft.get_peft_model(copy.deepcopy(theirs), config).eval()
    adapted.save_pretrained(tmp_path / "theirs")
    ours = load_adapter(cls.from_pretrained(tmp_path / "base"), tmp_path / "theirs")
    torch.testing.assert_close(run(ours), adapted(IDS).logits, rtol=0, atol=1e-9 + apart)
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(run(merge(ours)), merged(IDS).logits, rtol=0, atol=1e-9 + apart)
    for dora in ({"use_dora": True}, {"modules_to_save": ["wte"]}, {"bias": "all"}):
        peft.get_peft_model(
            copy.deepcopy(theirs), peft.LoraConfig(target_modules=targets[:1], **dora)
        ).save_pretrained(tmp_path / "other")
        with pytest.raises(ValueError, match=rf"{next(iter(dora))}: got"):
            load_adapter(cls.from_pretrained(tmp_path / "base"), tmp_path / "other")
