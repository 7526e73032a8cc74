"""Attention weights of a text, as the page at `/` draws them."""

from __future__ import annotations

import base64
from typing import Any

import torch

from fastattn.data import DataError, Tokenizer
from fastattn.data.encoding import InputTokenizer
from fastattn.models import GPT, Bert
from fastattn.nn.modes import evaluating
from fastattn.tasks.batches import max_tokens

MAX_TOKENS = 128  # of a map; the size of the answer grows with the square


def attention_maps(
    model: Any, tokenizer: Tokenizer | InputTokenizer, text: str, text_pair: str | None = None
) -> dict[str, Any]:
    """The attention weights of every layer and head over the tokens of a text.

    Args:
        model: a GPT or an encoder, with or without a head.
        tokenizer: the model's; an InputTokenizer for an encoder.
        text, text_pair: one text, or a pair for an encoder.

    Returns:
        tokens: S texts, at most 128 tokens, and no more than the model reads.
        cut: tokens that did not fit.
        shape: [layers, heads, S, S], rows for queries.
        weights: base64 of little-endian 16-bit integers in that shape; 65535 stands for 1.

    Raises:
        DataError: the text holds no token, or a decoder got a pair.
        RuntimeError: the weights are not finite.
    """
    device = next(model.parameters()).device
    options: dict[str, Any] = {"output_attentions": True}
    if isinstance(model, GPT):
        if text_pair is not None:
            raise DataError("text_pair: a decoder reads one text")
        assert isinstance(tokenizer, Tokenizer)
        every = tokenizer.encode(text)
        most = min(MAX_TOKENS, model.max_positions or MAX_TOKENS)
        ids, cut = every[:most], max(0, len(every) - most)
        tokens = [tokenizer.decode([i], skip_special_tokens=False) for i in ids]
    else:
        assert isinstance(tokenizer, InputTokenizer)
        most = min(MAX_TOKENS, max_tokens(model, tokenizer))
        (row,) = tokenizer.encode([text if text_pair is None else (text, text_pair)], most)
        ids, cut = row.ids, row.cut
        tokens = [tokenizer.core.id_to_token(i) or "" for i in ids]
        model = (
            model if isinstance(model, Bert) else model.bert
        )  # weights are the encoder's, whatever the head
        if model.config.type_vocab_size > 1:
            options["token_type_ids"] = torch.tensor([row.types], device=device)
    if not ids:
        raise DataError("text: holds no token")
    with torch.inference_mode(), evaluating(model):
        attentions = model(torch.tensor([ids], device=device), **options).attentions
    weights = torch.cat([layer.float().cpu() for layer in attentions])  # (layers, heads, S, S)
    if not weights.isfinite().all():
        raise RuntimeError("model: its attention weights are not finite; look for NaN in its parameters")
    whole = (weights * 65535).round().to(torch.int32).numpy().astype("<u2")
    return {
        "tokens": tokens,
        "cut": cut,
        "shape": list(weights.shape),
        "weights": base64.b64encode(whole.tobytes()).decode("ascii"),
    }
