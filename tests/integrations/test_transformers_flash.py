"""transformers' own code for flash-attn, run on fastattn's functions of that interface, gives what eager gives."""

import pytest
import torch
import transformers as hf
from transformers import masking_utils, modeling_flash_attention_utils
from transformers.integrations.flash_attention import flash_attention_forward
from transformers_models import MODELS, VOCAB
from transformers_rule import assert_model_within_rule

from fastattn.integrations import flash_attn

NAME = "by_the_interface"  # transformers reads a meaning into names with "flash"
PADDED = [
    ("qwen3", "none"), ("llama", "none"), ("llama", "left"), ("llama", "right"), ("mistral", "left"),
    ("gemma2", "right"), ("gpt_oss", "left"), ("bert", "right"), ("modernbert", "right"), ("whisper", "none"),
]  # fmt: skip


@pytest.fixture
def integration(monkeypatch):
    """transformers' flash path, with the functions it would import from flash-attn."""
    functions = (
        flash_attn.flash_attn_func,
        flash_attn.flash_attn_varlen_func,
        flash_attn.flash_attn_with_kvcache,
        flash_attn.pad_input,
        flash_attn.unpad_input,
    )
    utils = modeling_flash_attention_utils
    monkeypatch.setattr(utils, "_lazy_imports", lambda *args, **kwargs: functions)
    monkeypatch.setattr(utils, "_loaded_implementation", None)
    hf.AttentionInterface.register(NAME, flash_attention_forward)
    masking_utils.AttentionMaskInterface.register(NAME, masking_utils.flash_attention_mask)
    yield utils
    hf.AttentionInterface._global_mapping.pop(NAME)
    masking_utils.AttentionMaskInterface._global_mapping.pop(NAME)


@pytest.mark.usefixtures("integration")
@pytest.mark.parametrize(("name", "padding"), PADDED)
def test_logits_and_gradients(name, padding):
    assert_model_within_rule(MODELS[name].make(), NAME, *MODELS[name].inputs(padding))


@pytest.mark.usefixtures("integration")
def test_packed_documents():
    model, ids = MODELS["llama"].make(), torch.randint(3, VOCAB, (1, 9))
    model.set_attn_implementation("eager")
    expected = torch.cat([model(part).logits for part in ids.split([3, 5, 1], 1)], 1)
    model.set_attn_implementation(NAME)
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4, 0]])
    torch.testing.assert_close(model(ids, position_ids=positions).logits, expected, rtol=1e-4, atol=1e-5)


def test_what_transformers_looks_for_in_signatures_is_there(integration):
    _, supports = integration.lazy_import_flash_attention(NAME)
    packed, cached = (function.keywords["supports_mapping"] for function in supports)
    shared = {"window_size", "softcap", "s_aux", "block_table"}
    assert all(packed[name] for name in shared | {"dropout_p", "deterministic", "max_seqlen_q"})
    assert all(cached[name] for name in shared | {"cache_seqlens"})
