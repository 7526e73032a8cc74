"""LoRA: adapters on any linear layer against the formula, and merges that are compared."""

import copy
import math

import pytest
import torch
from lora_models import IDS, filled, make, run
from torch import nn

from fastattn.models.lora import Adapter, adapters_of, attach, blocks_of, detach, merge


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


def test_generation_with_adapters_is_that_of_the_merged_model():
    model = filled(attach(make("gpt").double(), r=3))
    tokens = model.generate(IDS, max_new_tokens=8)
    assert torch.equal(merge(model).generate(IDS, max_new_tokens=8), tokens)
