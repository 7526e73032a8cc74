"""Swapping transformers models: found anywhere in a module, copied, saved, and restored as they were."""

import copy

import pytest
import torch
import transformers as hf
from torch import nn
from transformers_models import MODELS, VOCAB
from transformers_rule import (
    assert_results_within_rule,
    eager_results,
)

import fastattn


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.text = MODELS["llama"].make()
        self.other = nn.ModuleList([nn.MultiheadAttention(32, 4, batch_first=True), MODELS["t5"].make()])

    def forward(self, ids):
        x = self.text.model(ids).last_hidden_state
        x = x + self.other[0](x, x, x, need_weights=False)[0]
        return x + self.other[1].encoder(inputs_embeds=x).last_hidden_state


def snapshot(model):
    return {
        name: (type(m), sorted(vars(m)), getattr(m, "config", None) and m.config._attn_implementation)
        for name, m in model.named_modules()
    }


def test_swap_finds_transformers_models_anywhere():
    model = Mixed().eval()
    ids = torch.randint(3, VOCAB, (2, 7))
    plain, golden = eager_results(model, lambda model: {"out": model(ids)})
    before = snapshot(model)
    report = fastattn.swap_attention(model)
    assert set(report.swapped) == {
        "text.model.layers.0.self_attn", "text.model.layers.1.self_attn", "other.0",
        *(f"other.1.{part}.block.{i}.layer.0.SelfAttention" for part in ("encoder", "decoder") for i in (0, 1)),
        *(f"other.1.decoder.block.{i}.layer.1.EncDecAttention" for i in (0, 1)),
    }  # fmt: skip
    assert report.left == report.already == ()
    assert_results_within_rule({"out": model(ids)}, plain, golden)
    once = snapshot(model)
    assert set(fastattn.swap_attention(model).already) == set(report.swapped)
    assert snapshot(model) == once
    fastattn.swap_attention(model, backend="torch")
    assert model.text.config._attn_implementation == "fastattn_torch"
    assert set(fastattn.restore_attention(model)) == set(report.swapped)
    assert snapshot(model) == before
    assert fastattn.restore_attention(model) == ()


def test_a_swapped_model_can_be_copied_and_saved(tmp_path):
    model = MODELS["bert"].make()
    fastattn.swap_attention(model)
    torch.save(model, tmp_path / "model.pt")
    for twin in (copy.deepcopy(model), torch.load(tmp_path / "model.pt", weights_only=False)):
        assert twin.config._attn_implementation == "fastattn"
        assert len(fastattn.restore_attention(twin)) == 2
        assert twin.config._attn_implementation == "sdpa"
    assert model.config._attn_implementation == "fastattn"


def test_what_its_user_chose_since_the_swap_stays():
    model = MODELS["t5"].make()
    fastattn.swap_attention(model)
    model.set_attn_implementation("eager")
    assert fastattn.restore_attention(model) == ()
    assert model.config._attn_implementation == "eager"
    for again in range(2):
        assert len(fastattn.swap_attention(model).swapped) == 6
        if again == 0:
            model.set_attn_implementation("eager")
    fastattn.restore_attention(model)
    assert model.config._attn_implementation == "eager"


def test_what_its_user_chose_stays():
    model = MODELS["llama"].make()
    model.set_attn_implementation("fastattn")
    before = snapshot(model)
    report = fastattn.swap_attention(model, backend="torch")
    assert report.swapped == ()
    assert len(report.already) == 2
    assert fastattn.restore_attention(model) == ()
    assert snapshot(model) == before


def test_a_model_that_does_not_let_its_attention_be_chosen_is_left(monkeypatch):
    model = MODELS["llama"].make()
    monkeypatch.setattr(hf.LlamaForCausalLM, "_can_set_attn_implementation", classmethod(lambda cls: False))
    monkeypatch.setattr(hf.LlamaModel, "_can_set_attn_implementation", classmethod(lambda cls: False))
    before = snapshot(model)
    report = fastattn.swap_attention(model)
    assert report.swapped == ()
    assert [name for name, _ in report.left] == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    assert snapshot(model) == before


def test_training_half_swapped_goes_on_as_it_was():
    runs = []
    for swapped in (False, True):
        model = MODELS["gemma3"].make()
        ids = torch.randint(3, VOCAB, (4, 12), generator=torch.Generator().manual_seed(0))
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        losses = []
        for step in range(9):
            if swapped and step == 3:
                fastattn.swap_attention(model)
            if swapped and step == 6:
                fastattn.restore_attention(model)
            loss = model(ids, labels=ids).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        runs.append(losses)
    assert runs[0][-1] < runs[0][0]
    assert runs[1] == pytest.approx(runs[0], rel=1e-3)
