"""Attention weights for the page: those that the model returns, whatever its head, in multiples of 1 / 65535."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from generative_cases import make_tokenizer, model_of
from training_cases import save_encoder

from fastattn import models
from fastattn.data.encoding import InputTokenizer
from fastattn.serve.maps import MAX_TOKENS, attention_maps


def weights_of(found: dict[str, Any]) -> np.ndarray:
    whole = np.frombuffer(base64.b64decode(found["weights"]), "<u2")
    return whole.reshape(found["shape"])


def test_a_decoder_s_weights() -> None:
    tokenizer = make_tokenizer()
    model = model_of(tokenizer)
    found = attention_maps(model, tokenizer, "A cat sat.")
    ids = tokenizer.encode("A cat sat.")
    assert "".join(found["tokens"]) == "A cat sat."
    assert (found["cut"], found["shape"]) == (0, [len(model.h), model.config.n_head, len(ids), len(ids)])
    expected = torch.cat(model(torch.tensor([ids]), output_attentions=True).attentions).detach()
    assert np.array_equal(weights_of(found), (expected * 65535).round().numpy())
    assert not model.training


def test_a_long_text_is_cut_and_counted() -> None:
    tokenizer = make_tokenizer()
    model = model_of(tokenizer, n_positions=256)
    text = "x" * (MAX_TOKENS + 5)
    found = attention_maps(model, tokenizer, text)
    assert len(found["tokens"]) == MAX_TOKENS
    assert found["cut"] == len(tokenizer.encode(text)) - MAX_TOKENS > 0


def test_a_text_beyond_the_positions_is_cut_where_they_end() -> None:
    tokenizer = make_tokenizer()
    found = attention_maps(model_of(tokenizer, n_positions=32), tokenizer, "x" * 50)
    assert (len(found["tokens"]), found["cut"]) == (32, len(tokenizer.encode("x" * 50)) - 32)


@pytest.mark.parametrize("cls", [models.Bert, models.BertForEmbedding, models.BertForTokenClassification])
@pytest.mark.parametrize("pair", [None, "anna works"])
def test_an_encoder_s_weights(cls: Any, pair: str | None, tmp_path: Path) -> None:
    head = "ForTokenClassification" if cls is models.BertForTokenClassification else "Model"
    folder = save_encoder(tmp_path / "encoder", head)
    model = cls.from_pretrained(folder)
    tokenizer = InputTokenizer.from_pretrained(folder)
    found = attention_maps(model, tokenizer, "anna lives in paris", pair)
    (row,) = tokenizer.encode(["anna lives in paris" if pair is None else ("anna lives in paris", pair)])
    assert len(found["tokens"]) == len(row.ids)
    bert = model if cls is models.Bert else model.bert
    ids, types = torch.tensor([row.ids]), torch.tensor([row.types])
    expected = torch.cat(bert.eval()(ids, None, types, output_attentions=True).attentions).detach()
    assert np.array_equal(weights_of(found), (expected * 65535).round().numpy())


def test_what_has_no_map_is_refused() -> None:
    tokenizer = make_tokenizer()
    model = model_of(tokenizer)
    with pytest.raises(ValueError, match="text: holds no token"):
        attention_maps(model, tokenizer, "")
    with pytest.raises(ValueError, match="text_pair: a decoder reads one text"):
        attention_maps(model, tokenizer, "a", "b")
