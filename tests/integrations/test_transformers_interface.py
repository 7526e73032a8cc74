"""fastattn as transformers' attention function: its arguments, refusals, registration and choice."""

import json

import pytest
import torch
import transformers as hf
from torch import nn
from transformers import masking_utils
from transformers_calls import call, structure
from transformers_models import MODELS, VOCAB
from transformers_rule import (
    assert_results_within_rule,
    eager_results,
)

import fastattn
from fastattn.integrations import transformers as integration
from fastattn.integrations.structured_mask import StructuredMask


def test_the_attention_function_by_itself():
    (out, weights), a = call(use_cache=True, layer_idx=3, output_router_logits=False, deterministic=False)
    expected = fastattn.attention(a["query"], a["key"], a["value"], causal=True, scale=0.3)
    assert torch.equal(out, expected.transpose(1, 2))
    assert out.shape == (2, 5, 4, 6)
    assert out.is_contiguous()
    assert weights is None
    (out, _), a = call(module_is_causal=True, is_causal=False)
    assert torch.equal(out, fastattn.attention(a["query"], a["key"], a["value"], scale=0.3).transpose(1, 2))
    (out, _), a = call(query=torch.randn(1, 4, 5, 8), is_causal=False)
    shared = a["query"].expand(2, -1, -1, -1)
    assert torch.equal(out, fastattn.attention(shared, a["key"], a["value"], scale=0.3).transpose(1, 2))


def test_the_attention_function_as_models_call_it():
    """Five positional arguments; a single query sees the whole cache; dropout; keywords it has no use for."""
    module = nn.Module()
    module.is_causal = True
    q, k, v = torch.randn(2, 4, 1, 8), torch.randn(2, 4, 7, 8), torch.randn(2, 4, 7, 8)
    out, _ = integration.attention_forward(
        module, q, k, v, None, position_ids=torch.full((2, 1), 6), encoder_hidden_states=None, use_cache=True
    )
    assert torch.equal(out, fastattn.attention(q, k, v).transpose(1, 2))
    torch.manual_seed(5)
    out, _ = integration.attention_forward(module, q, k, v, None, dropout=0.5)
    torch.manual_seed(5)
    assert torch.equal(out, fastattn.attention(q, k, v, dropout_p=0.5).transpose(1, 2))


def test_without_a_mask_it_counts_from_the_first_key():
    """A static cache at prefill: more places than queries, and no mask."""
    (out, _), a = call(key=torch.randn(2, 2, 8, 8), value=torch.randn(2, 2, 8, 6))
    expected = fastattn.attention(
        a["query"], a["key"][:, :, :5], a["value"][:, :, :5], causal=True, scale=0.3
    )
    torch.testing.assert_close(out, expected.transpose(1, 2))


def test_without_a_mask_the_window_that_came_beside_it_counts():
    (out, _), a = call(sliding_window=2)
    expected = fastattn.attention(a["query"], a["key"], a["value"], causal=True, window=(1, 0), scale=0.3)
    torch.testing.assert_close(out, expected.transpose(1, 2))
    (out, _), a = call(sliding_window=2, is_causal=False)
    expected = fastattn.attention(a["query"], a["key"], a["value"], window=(1, 1), scale=0.3)
    torch.testing.assert_close(out, expected.transpose(1, 2))


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"cache": object()}, ValueError, "cache"),
        ({"indices": torch.zeros(1)}, ValueError, "indices"),
        ({"block_indices": torch.zeros(1)}, ValueError, "block_indices"),
        ({"sinks": torch.zeros(1)}, ValueError, "sinks"),
        ({"attention_mask": torch.ones(2, 5, dtype=torch.bool)}, ValueError, "attention_mask"),
        ({"attention_mask": "mask"}, ValueError, "attention_mask"),
        ({"attention_mask": torch.ones(2, 1, 5, 5, dtype=torch.int64)}, TypeError, "attention_mask"),
        ({"attention_mask": torch.ones(2, 1, 5, 6, dtype=torch.bool)}, ValueError, "mask"),
        ({"attention_mask": StructuredMask((2, 1, 5, 6), "cpu")}, ValueError, "attention_mask"),
        (
            {"cu_seq_lens_q": torch.tensor([0, 5]), "cu_seq_lens_k": torch.tensor([0, 5])},
            ValueError,
            "cu_seq_lens_q",
        ),
        ({"s_aux": torch.zeros(3)}, ValueError, "sinks"),
    ],
)
def test_refused(change, error, match):
    with pytest.raises(error, match=match):
        call(**change)


def test_documents_of_differing_lengths_need_plain_attention():
    one_row = {n: torch.randn(1, 2, 5, 8) for n in ("query", "key", "value")}
    ends = {"cu_seq_lens_q": torch.tensor([0, 2, 5]), "cu_seq_lens_k": torch.tensor([0, 3, 5])}
    with pytest.raises(ValueError, match="cu_seq_lens_k"):
        call(**one_row, **ends)
    (out, _), _ = call(**one_row, **ends, is_causal=False)
    q, k, v = one_row.values()
    parts = [
        fastattn.attention(q[:, :, a:b], k[:, :, c:d], v[:, :, c:d], scale=0.3)
        for a, b, c, d in ((0, 2, 0, 3), (2, 5, 3, 5))
    ]
    torch.testing.assert_close(out, torch.cat(parts, 2).transpose(1, 2))


def test_registering_again_changes_nothing():
    def registered():
        return (
            dict(hf.AttentionInterface._global_mapping),
            dict(masking_utils.AttentionMaskInterface._global_mapping),
        )

    before = registered()
    integration.register()
    assert registered() == before
    names = {"fastattn", "fastattn_torch", "fastattn_triton"}
    assert all(names <= mapping.keys() for mapping in before)
    assert not any(word in name for name in names for word in ("flash", "sdpa", "flex"))


def test_an_interface_of_another_make_is_refused(monkeypatch):
    monkeypatch.setattr(masking_utils, "sdpa_mask", lambda batch_size, cache_position, kv_length: None)
    with pytest.raises(ImportError, match="transformers"):
        integration.register()


def test_the_choice_is_not_written_to_the_config(tmp_path):
    model = MODELS["llama"].make()
    fastattn.swap_attention(model)
    model.save_pretrained(tmp_path)
    assert "fastattn" not in json.dumps(json.loads((tmp_path / "config.json").read_text()))
    again = hf.LlamaForCausalLM.from_pretrained(tmp_path, attn_implementation="fastattn")
    assert again.config._attn_implementation == "fastattn"


def test_the_parts_of_a_model_can_be_chosen_one_by_one(calls):
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    text = hf.CLIPTextConfig(**small, vocab_size=VOCAB, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    vision = hf.CLIPVisionConfig(**small, image_size=16, patch_size=8)
    model = hf.CLIPModel(hf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).eval()
    inputs = {"input_ids": torch.randint(3, VOCAB, (2, 5)), "pixel_values": torch.randn(2, 3, 16, 16)}
    inputs["input_ids"][:, -1] = 2

    def similarities(model):
        pixels = inputs["pixel_values"].to(model.dtype)
        return {"logits": model(**inputs | {"pixel_values": pixels}).logits_per_image}

    plain, golden = eager_results(model, similarities)
    model.set_attn_implementation({"text_config": "fastattn", "vision_config": "sdpa"})
    assert_results_within_rule(similarities(model), plain, golden)
    assert [structure(options) for options in calls] == [{"causal"}]
    report = fastattn.swap_attention(model)
    assert len(report.already) == len(report.swapped) == 1
    assert_results_within_rule(similarities(model), plain, golden)
    fastattn.restore_attention(model)
    implementations = (model.config.text_config, model.config.vision_config)
    assert [config._attn_implementation for config in implementations] == ["fastattn", "sdpa"]


def test_weights_asked_for_by_the_config_are_refused_by_transformers():
    model = MODELS["bert"].make()
    model.set_attn_implementation("fastattn")
    with pytest.raises(ValueError, match="output_attentions"):
        model.config.output_attentions = True


def test_continuous_batching_is_refused_by_transformers():
    model = MODELS["llama"].make()
    model.set_attn_implementation("fastattn")
    with pytest.raises(ValueError, match="fastattn"):
        model.generate_batch([[3, 4, 5]], hf.GenerationConfig(max_new_tokens=2))
