"""LoRA: adapters on any linear layer against the formula, PEFT's folders both ways, and merges that are compared."""

import copy
import json
import math

import pytest
import safetensors.torch
import torch
from tiny_gpt import SIZES as GPT2
from torch import nn

from fastattn import MultiHeadAttention
from fastattn.models import GPT, Bert, BertConfig, BertForSequenceClassification, GPTConfig, load
from fastattn.models.lora import Adapter, adapters_of, attach, blocks_of, detach, merge
from fastattn.models.peft import load_adapter, save_adapter
from fastattn.nn.linear import Linear

BERT = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}
LLAMA = {**BERT, "num_key_value_heads": 2, "head_dim": 8}
IDS = torch.arange(18).view(2, 9) * 3


class Mixed(nn.Module):
    """Linear layers of every kind, outside any family."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.second = Linear(8, 8, bias=False)
        self.attn = MultiHeadAttention(8, 4, batch_first=True, num_kv_heads=2)
        self.cross = MultiHeadAttention(8, 2, batch_first=True)

    def forward(self, x):
        x = self.second(torch.tanh(self.first(x)))
        x = x + self.attn(x, x, x, need_weights=False)[0]
        return x + self.cross(x, x[:, :3], x[:, :3], need_weights=False)[0]


def make(kind, dtype=torch.float32):
    torch.manual_seed(0)
    if kind == "gpt":
        model = GPT(GPTConfig(**GPT2))
    elif kind == "own":
        model = GPT(GPTConfig(**GPT2, positions="rotary", num_kv_heads=2, qk_norm=True))
    elif kind == "llama":
        family = next(f for f in GPT.families if f.model_type == "llama")
        model = GPT(family.read_config({"model_type": "llama", **LLAMA}))
    elif kind == "bert":
        model = BertForSequenceClassification(BertConfig(**BERT))
    else:
        model = Mixed()
    return model.to(dtype).eval()


def run(model):
    if isinstance(model, Mixed):
        torch.manual_seed(5)
        return model(torch.randn(2, 9, 8).to(next(model.parameters()).dtype))
    return model(IDS).logits


def filled(model, std=0.2):
    """Random adapters, which begin as zeros."""
    torch.manual_seed(1)
    for adapter in adapters_of(model):
        adapter.lora_A.data.normal_(0, std)
        adapter.lora_B.data.normal_(0, std)
    return model


def summed(model, kind):
    """The model with scale * B A added to its weights by hand, in float64."""
    plain = make(kind).to(torch.float64)
    with torch.no_grad():
        for adapter in adapters_of(model):
            block = adapter.block
            product = adapter.lora_B.double() @ adapter.lora_A.double()
            plain.get_parameter(block.ours)[block.start : block.stop] += adapter.scale * product
    return plain


KINDS = ("gpt", "own", "llama", "bert", "mixed")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rslora", [False, True])
def test_adapters_compute_the_formula_on_every_linear_layer(kind, rslora):
    model = make(kind).double()
    before = run(model)
    attach(model, r=3, alpha=6, rslora=rslora, targets="all-linear")
    torch.testing.assert_close(run(model), before, rtol=1e-12, atol=1e-12)  # B is zero
    filled(model)
    assert all(a.scale == (6 / math.sqrt(3) if rslora else 2.0) for a in adapters_of(model))
    expected = run(summed(model, kind))
    assert (expected - before).abs().max() > 0.3
    torch.testing.assert_close(run(model), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_training_moves_adapters_only_and_detaching_leaves_every_bit(kind):
    model = make(kind)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    kinds = [type(module) for module in model.modules()]
    out = run(model)
    attach(model, r=2, alpha=4, dropout=0.1)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all(".lora." in name for name in trained)
    filled(model).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        run(model).square().mean().backward()
        assert all(p.grad is not None and p.grad.any() for n, p in model.named_parameters() if n in trained)
        optimizer.step()
    detach(model.eval())
    assert {name for name, _ in model.named_parameters()} == set(before)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert all(p.requires_grad for p in model.parameters())
    assert torch.equal(run(model), out)
    assert [type(module) for module in model.modules()] == kinds


def test_gradients_are_those_of_the_formula():
    model = filled(attach(make("mixed").double(), r=2, alpha=4))
    run(model).square().sum().backward()
    plain = make("mixed").double()
    leaves = {
        a.block: (a.lora_A.detach().requires_grad_(), a.lora_B.detach().requires_grad_())
        for a in adapters_of(model)
    }
    weights = dict(plain.named_parameters())
    for name in {block.ours for block in leaves}:
        rows = [
            weights[name].detach()[b.start : b.stop] + 2.0 * B @ A
            for b, (A, B) in leaves.items()
            if b.ours == name
        ]
        weights[name] = torch.cat(rows)
    torch.manual_seed(5)
    x = torch.randn(2, 9, 8).double()
    torch.func.functional_call(plain, weights, (x,)).square().sum().backward()
    for adapter in adapters_of(model):
        A, B = leaves[adapter.block]
        torch.testing.assert_close(adapter.lora_A.grad, A.grad, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(adapter.lora_B.grad, B.grad, rtol=1e-9, atol=1e-9)


def test_targets_are_names_of_transformers_or_ours():
    def chosen(kind, targets):
        return {a.block.name for a in adapters_of(attach(make(kind), targets=targets))}

    assert chosen("gpt", ["c_attn"]) == {f"transformer.h.{i}.attn.c_attn" for i in range(2)}
    assert chosen("gpt", "mlp.c_fc") == {f"transformer.h.{i}.mlp.c_fc" for i in range(2)}
    assert chosen("gpt", "attn.in_proj_weight") == {f"transformer.h.{i}.attn.c_attn" for i in range(2)}
    queries = {f"bert.encoder.layer.{i}.attention.self.query" for i in range(2)}
    assert chosen("bert", ["query"]) == queries
    assert queries < chosen("bert", ["attn.qkv"])
    assert chosen("mixed", ["q_proj", "first"]) == {"attn.q_proj", "cross.q_proj", "first"}
    assert chosen("mixed", "attn.v_proj") == {"attn.v_proj"}
    assert "classifier" not in chosen("bert", "all-linear")
    assert chosen("bert", ["classifier"]) == {"classifier"}
    everything = {block.name for block in blocks_of(make("gpt"))}
    assert "lm_head" not in everything  # tied to the embedding
    assert {
        a.block.stop - a.block.start for a in adapters_of(attach(make("own"), targets="in_proj_weight"))
    } == {64}


def test_what_cannot_be_attached_is_refused():
    for options, message in (
        ({"targets": ["nothing"]}, "targets: 'nothing' names no linear layer; there are .*c_attn"),
        ({"targets": ["lm_head"]}, "targets: 'lm_head'"),
        ({"r": 0}, "r: got 0"),
        ({"r": 2.0}, r"r: got 2\.0"),
        ({"alpha": -1}, "alpha: got -1"),
        ({"alpha": math.nan}, "alpha: got nan"),
        ({"dropout": 1.0}, r"dropout: got 1\.0"),
    ):
        with pytest.raises(ValueError, match=message):
            attach(make("gpt"), **options)
    for targets in ([], [3], 3):
        with pytest.raises(TypeError, match="targets: got"):
            attach(make("gpt"), targets=targets)
    model = attach(make("gpt"))
    with pytest.raises(ValueError, match="model: has adapters already"):
        attach(model)
    with pytest.raises(ValueError, match="model: has adapters; save those"):
        model.save_pretrained("never")
    for function in (merge, detach):
        with pytest.raises(ValueError, match="model: has no adapters"):
            function(make("gpt"))
    with pytest.raises(ValueError, match="targets: the model has no linear layer"):
        attach(nn.Conv1d(2, 2, 1))


def test_dropout_is_of_the_input_and_in_training_only():
    model = filled(attach(make("mixed"), r=2, dropout=0.5))
    x = torch.randn(2, 9, 8)
    assert torch.equal(model(x), model(x))
    model.train()
    assert not torch.equal(model(x), model(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_merging_adds_to_the_weights(kind, dtype, tmp_path):
    model = filled(attach(make(kind, dtype), r=3, alpha=6), std=0.1)
    assert {a.lora_A.dtype for a in adapters_of(model)} == {torch.promote_types(dtype, torch.float32)}
    wide = copy.deepcopy(model)
    example = () if kind != "mixed" else (torch.randn(2, 5, 8).to(dtype),)
    expected = {a.block: a.weight() for a in adapters_of(wide)}
    base = make(kind, dtype)
    merged = merge(model, *example)
    assert merged is model
    assert list(adapters_of(model)) == []
    for block, added in expected.items():
        rows = slice(block.start, block.stop)
        exact = base.get_parameter(block.ours)[rows].double() + added
        assert torch.equal(model.get_parameter(block.ours)[rows], exact.to(dtype))
    touched = {block.ours for block in expected}
    assert all(torch.equal(p, base.get_parameter(n)) for n, p in model.named_parameters() if n not in touched)
    if kind != "mixed":
        model.save_pretrained(tmp_path / "merged")
        loaded = type(model).from_pretrained(tmp_path / "merged").state_dict()
        assert all(torch.equal(loaded[name], t) for name, t in model.state_dict().items())


def test_a_merge_that_changes_outputs_is_refused(monkeypatch):
    """An adapter whose forward is not its weight: what a mistake in either would look like."""
    model = filled(attach(make("gpt"), r=3))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    out = run(model)
    real = Adapter.weight
    for factor in (0.0, -1.0, 1.001, float("nan")):
        with monkeypatch.context() as patch:
            patch.setattr(Adapter, "weight", lambda self, factor=factor: real(self) * factor)
            with pytest.raises(
                ValueError, match=r"merge: merged outputs are .* from exact ones, needs at most"
            ):
                merge(model)
        assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
        assert torch.equal(run(model), out)
    merge(model)
    with pytest.raises(ValueError, match="merge: needs an example"):
        merge(attach(make("mixed")))


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
    change(tmp_path, an_option_to_come=None)
    assert torch.equal(run(load_adapter(make("gpt"), tmp_path)), expected)
    for value in (False, 0, {}, "x"):
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


def test_generation_with_adapters_is_that_of_the_merged_model():
    model = filled(attach(make("gpt").double(), r=3))
    tokens = model.generate(IDS, max_new_tokens=8)
    assert torch.equal(merge(model).generate(IDS, max_new_tokens=8), tokens)


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
