"""A saved folder in lm-eval's own adapter of transformers: the same attention, the same likelihoods."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from fastattn.data import train_bpe
from fastattn.integrations.transformers import register
from fastattn.models import GPT, GPTConfig
from fastattn.tasks.perplexity import evaluate_documents

TEXTS = ("A cat sat on the mat and looked at the dog. " * 3, "Or not to be.")


@pytest.mark.downloads
def test_a_folder_runs_in_lm_evals_adapter(tmp_path: Path) -> None:
    """Needs lm_eval and accelerate."""
    tokenizer = train_bpe(TEXTS, 300)
    torch.manual_seed(0)
    sizes = {"n_positions": 64, "n_embd": 64, "n_layer": 2, "n_head": 4, "initializer_range": 0.2}
    tokens = {"bos_token_id": tokenizer.eos_id, "eos_token_id": tokenizer.eos_id}
    model = GPT(GPTConfig(vocab_size=tokenizer.vocab_size, **sizes, **tokens)).eval()
    model.save_pretrained(tmp_path, tokenizer=tokenizer)

    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    register()
    adapter = HFLM(
        pretrained=str(tmp_path), attn_implementation="fastattn", device="cpu", dtype="float32", batch_size=2
    )
    assert adapter.model.config._attn_implementation == "fastattn"
    requests = [
        Instance(request_type="loglikelihood_rolling", doc={}, arguments=(text,), idx=i)
        for i, text in enumerate(TEXTS)
    ]
    found = adapter.loglikelihood_rolling(requests, disable_tqdm=True)
    size = sum(len(text.encode()) for text in TEXTS)
    report = evaluate_documents(model, tokenizer, TEXTS, max_length=64)
    bound = 64 * torch.finfo(torch.float32).eps
    assert -sum(found) / math.log(2) / size == pytest.approx(report.metrics["bits_per_byte"], rel=bound)
