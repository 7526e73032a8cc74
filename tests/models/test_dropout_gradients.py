"""Gradients of models in training with dropout against central differences: a backward pass drops what its forward
dropped, in every layer, padded or packed, over one sequence length or many."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastattn.models import (
    GPT,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    EncoderDecoder,
    EncoderDecoderConfig,
    GPTConfig,
    bert_decoder,
)

P, STEP = 0.2, 1e-4
LENGTHS = (3, 17, 9, 1, 12)
WIDTH = max(LENGTHS)
IDS = torch.randint(5, 40, (len(LENGTHS), WIDTH), generator=torch.Generator().manual_seed(0))
REAL = torch.arange(WIDTH) < torch.tensor(LENGTHS)[:, None]


def decoder(**options: Any) -> GPT:
    config = GPTConfig(
        vocab_size=40, n_positions=64, n_embd=32, n_layer=2, n_head=4, attn_pdrop=P, resid_pdrop=P, embd_pdrop=P,
        **options,
    )  # fmt: skip
    return GPT(config)


def encoder_config() -> BertConfig:
    return BertConfig(
        vocab_size=40, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        hidden_dropout_prob=P, attention_probs_dropout_prob=P, max_position_embeddings=64,
    )  # fmt: skip


def translator() -> EncoderDecoder:
    encoder = encoder_config()
    config = EncoderDecoderConfig(
        encoder, bert_decoder(encoder), decoder_start_token_id=2, pad_token_id=0, eos_token_id=3
    )
    return EncoderDecoder(config)


def of_decoder(model: nn.Module, **given: Any) -> Tensor:
    return model(IDS, labels=IDS.masked_fill(~REAL, -100), **given).loss


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], Tensor]]] = {
    "decoder": (decoder, lambda m: m(IDS, labels=IDS).loss),
    "decoder, padded": (decoder, lambda m: of_decoder(m, attention_mask=REAL.long())),
    "decoder, padded on the left": (
        decoder, lambda m: m(IDS.flip(1), labels=IDS.flip(1), attention_mask=REAL.flip(1).long()).loss,
    ),
    "decoder, with logits": (
        decoder, lambda m: of_decoder(m, attention_mask=REAL.long(), return_logits=True),
    ),
    "decoder, packed": (decoder, lambda m: m(IDS, labels=IDS, segment_ids=IDS.sort(1).values // 9).loss),
    "decoder, shared key heads": (
        lambda: decoder(num_kv_heads=2, positions="rotary"), lambda m: of_decoder(m, attention_mask=REAL.long()),
    ),
    "encoder, words": (
        lambda: BertForMaskedLM(encoder_config()), lambda m: of_decoder(m, attention_mask=REAL.long()),
    ),
    "encoder, classes": (
        lambda: BertForSequenceClassification(encoder_config()),
        lambda m: m(IDS, attention_mask=REAL.long(), labels=torch.tensor([0, 1, 1, 0, 1])).loss,
    ),
    "encoder-decoder": (
        translator, lambda m: m(input_ids=IDS.flip(0), attention_mask=REAL.flip(0).long(),
                                labels=IDS.masked_fill(~REAL, -100)).loss,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_against_central_differences(name: str) -> None:
    make, run = CASES[name]
    torch.manual_seed(0)
    model = make().double().train()

    def loss() -> Tensor:
        torch.manual_seed(1)  # the same weights and features are dropped
        found = run(model)
        assert found.dtype == torch.float64
        return found

    parameters = [p for p in model.parameters() if p.requires_grad]
    grads = torch.autograd.grad(loss(), parameters, materialize_grads=True, allow_unused=True)
    ways = [torch.randn_like(p) * p.detach().abs().mean() for p in parameters]
    slope = sum(float((g * way).sum()) for g, way in zip(grads, ways))

    def moved(by: float) -> float:
        with torch.no_grad():
            for p, way in zip(parameters, ways):
                p.add_(way, alpha=by)
        found = float(loss().detach())
        with torch.no_grad():
            for p, way in zip(parameters, ways):
                p.sub_(way, alpha=by)
        return found

    # Richardson's: the error of differences at two steps falls with the fourth power of the step
    near, far = ((moved(h) - moved(-h)) / (2 * h) for h in (STEP, 2 * STEP))
    assert (4 * near - far) / 3 == pytest.approx(slope, rel=1e-7, abs=1e-9)
