"""Folders of tiny models for the tests of serving, and a client of the application without a network."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import task_cases
import torch

from fastattn.data import train_bpe
from fastattn.models import GPT, BertConfig, EncoderDecoder, EncoderDecoderConfig, GPTConfig, bert_decoder

CHAT = (
    "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
TEXTS = [
    "the river runs to the sea \u20ac \u00e9t\u00e9 \U0001f600",
    "a tower in the old town",
    "who lives there?",
] * 4
SIZES: dict[str, Any] = {
    "n_positions": 128,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "initializer_range": 0.3,
}


def save_gpt(folder: Path, *, chat: bool = False, seed: int = 0, **sizes: Any) -> GPT:
    """A GPT with a byte-level tokenizer, so that most of its random tokens are no whole characters."""
    tokenizer = train_bpe(TEXTS, 290)
    tokenizer.chat_template = CHAT if chat else None
    tokenizer.save_pretrained(folder)
    torch.manual_seed(seed)
    ends = {"eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
    model = GPT(GPTConfig(**{**SIZES, "vocab_size": tokenizer.vocab_size, **ends, **sizes})).eval()
    model.save_pretrained(folder)
    return model


def save_encoder_decoder(folder: Path, *, seed: int = 2) -> EncoderDecoder:
    """An encoder-decoder with one byte-level tokenizer for both parts."""
    tokenizer = train_bpe(TEXTS, 290)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=48, max_position_embeddings=40, initializer_range=0.3, pad_token_id=tokenizer.pad_id,
    )  # fmt: skip
    tokens = {"decoder_start_token_id": 5, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
    model = EncoderDecoder(EncoderDecoderConfig(config, bert_decoder(config), **tokens)).eval()
    model.save_pretrained(folder)
    return model


def save_encoder(folder: Path, head: str, **options: Any) -> None:
    """An encoder with a head and its tokenizer."""
    task_cases.save_model(folder, head, vocab_size=35, **options)


@contextmanager
def client_of(models: Any, options: Any = None) -> Iterator[Any]:
    """Starlette's client of the application; its threads run meanwhile, and no page is held afterwards."""
    if not (find_spec("httpx2") or find_spec("httpx")):
        pytest.skip("needs httpx2, for Starlette's test client")
    from starlette.testclient import TestClient

    from fastattn.serve.app import create_app
    from fastattn.serve.served import Decoder

    with TestClient(create_app(models, options), raise_server_exceptions=False) as client:
        yield client
    for model in models.values():
        if isinstance(model, Decoder):
            assert model.engine.stats().get("pages_held", 0) == 0


def events_of(response: Any) -> list[dict[str, Any]]:
    """The objects of a stream, which has to end in [DONE]."""
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = response.text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]
