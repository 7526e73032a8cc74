"""The last layer of an encoder runs for the tokens that a head reads, with the results of a layer that runs for all."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastattn.models import (
    BertConfig,
    BertForEmbedding,
    BertForMaskedLM,
    BertForPreTraining,
    BertForSequenceClassification,
)
from fastattn.models.encoder import Bert

LENGTHS = (5, 1, 7, 3)
S = 8
FAMILIES = {
    "bert": {},
    "pre_norm": {
        "model_type": "modernbert", "positions": "rotary", "pre_norm": True, "type_vocab_size": 0, "gated_mlp": True,
    },
}  # fmt: skip


def config(family: str = "bert", **options: Any) -> BertConfig:
    sizes = {
        "vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
        "max_position_embeddings": 16, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
    }  # fmt: skip
    return BertConfig(**{**sizes, **FAMILIES[family], "num_labels": 3, **options})


def inputs(lengths: tuple[int, ...] | None = LENGTHS) -> dict[str, Tensor]:
    torch.manual_seed(1)
    ids = torch.randint(1, 40, (len(LENGTHS), S))
    if lengths is None:
        return {"input_ids": ids}
    return {"input_ids": ids, "attention_mask": (torch.arange(S) < torch.tensor(lengths)[:, None]).long()}


def labels_of(kind: type, lengths: tuple[int, ...] | None) -> dict[str, Tensor]:
    if kind is BertForSequenceClassification:
        return {"labels": torch.tensor([0, 2, 1, 1])}
    if kind is BertForEmbedding:
        return {}
    words = torch.full((len(LENGTHS), S), -100)
    words[0, 0], words[0, 3], words[2, 1], words[2, 5], words[3, 2] = (
        7,
        9,
        11,
        2,
        3,
    )  # the first is also a first token
    return {"labels": words} | (
        {"next_sentence_label": torch.tensor([0, 1, 1, 0])} if kind is BertForPreTraining else {}
    )


def made(kind: type, family: str) -> Any:
    torch.manual_seed(0)
    options: dict[str, Any] = {"pooling": "cls"} if kind is BertForEmbedding else {}
    return kind(config(family), **options).double().train()


def run(model: Any, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """Loss, results and gradients, by name."""
    model.zero_grad()
    output = model(**given)
    results = {k: v for k, v in output._asdict().items() if isinstance(v, Tensor)}
    loss = results["loss"] if "loss" in results else (results["embeddings"].sin() * 3).sum()
    loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters()}
    assert all(g is not None for g in gradients.values()), [n for n, g in gradients.items() if g is None]
    return {k: v.detach() for k, v in results.items()} | gradients


def rows_seen(monkeypatch: pytest.MonkeyPatch, model: Any) -> list[int]:
    """Rows that the last layer's MLP takes, call by call; without a hook."""
    seen = []
    mlp = model.bert.layers[-1].mlp
    forward = mlp.forward

    def counting(x: Tensor) -> Tensor:
        seen.append(x.shape[0])
        return forward(x)

    monkeypatch.setattr(mlp, "forward", counting)
    return seen


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("lengths", [LENGTHS, None], ids=["padded", "dense"])
@pytest.mark.parametrize(
    ("kind", "read"),
    [
        (BertForSequenceClassification, 4),
        (BertForEmbedding, 4),
        (BertForMaskedLM, 5),
        (BertForPreTraining, 9),
    ],
)
def test_results_and_gradients_are_those_of_the_whole_layer(
    monkeypatch: pytest.MonkeyPatch, kind: type, read: int, lengths: tuple[int, ...] | None, family: str
) -> None:
    given = inputs(lengths) | labels_of(kind, lengths)
    model = made(kind, family)
    seen = rows_seen(monkeypatch, model)
    found = run(model, given)
    assert seen == [read]
    monkeypatch.setattr(Bert, "_may_read_some", lambda *_: False)
    expected = run(model, given)
    assert seen == [read, sum(LENGTHS) if lengths else len(LENGTHS) * S]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "options",
    [{"output_hidden_states": True}, {"output_attentions": True}, {"hook": True}, {"window": True}],
    ids=lambda options: next(iter(options)),
)
def test_the_whole_layer_runs_where_its_results_are_seen(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, bool]
) -> None:
    model = made(BertForSequenceClassification, "bert")
    states: list[Tensor] = []
    if options.pop("hook", False):
        model.bert.layers[-1].mlp.c_fc.register_forward_hook(lambda _, __, out: states.append(out))
    if options.pop("window", False):
        model.bert.layers[-1].attn.window = (1, 1)
    seen = rows_seen(monkeypatch, model)
    output = model(**inputs(), **options)
    assert seen == [sum(LENGTHS)]
    assert all(state.shape[0] == sum(LENGTHS) for state in states)
    if options:
        torch.testing.assert_close(output.logits, model(**inputs()).logits, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("lengths", [(5, 0, 7, 3), (1, 1, 1, 1), (0, 0, 0, 0)], ids=str)
def test_empty_and_single_token_texts(lengths: tuple[int, ...]) -> None:
    model = made(BertForSequenceClassification, "bert").eval()
    logits = model(**inputs(lengths)).logits
    expected = model(**inputs(lengths), output_hidden_states=True).logits
    torch.testing.assert_close(logits, expected, rtol=1e-12, atol=1e-12)
    assert model(torch.zeros(0, S, dtype=torch.int64)).logits.shape == (0, 3)


def test_words_without_labels_have_no_loss() -> None:
    given = inputs()
    for kind in (BertForMaskedLM, BertForPreTraining):
        loss = made(kind, "bert")(**given, labels=torch.full_like(given["input_ids"], -100)).loss
        assert loss.isnan()


def test_compiled_programs_keep_their_shapes() -> None:
    """One program serves every mask; what it gives is what the eager model gives."""
    model = made(BertForSequenceClassification, "bert").eval()
    compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=True)
    for lengths in (LENGTHS, (2, 2, 2, 2)):
        torch.testing.assert_close(
            compiled(**inputs(lengths)).logits, model(**inputs(lengths)).logits, rtol=1e-12, atol=1e-12
        )
