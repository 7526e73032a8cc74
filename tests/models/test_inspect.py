"""Attribution of a classifier's logit to tokens: it adds up, is the integral of the gradients, and padding has none."""

from __future__ import annotations

import json
import re
import sys
from typing import Any

import numpy as np
import pytest
import torch
from encoder_models import batch, ours_of, theirs
from pages import all_blocks
from torch import Tensor

from fastattn.models import GPT, Bert, BertForMaskedLM, BertForSequenceClassification, GPTConfig
from fastattn.models.bert_config import BertConfig
from fastattn.models.inspect import attribute

SMALL = BertConfig(
    vocab_size=20,
    hidden_size=8,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=8,
    num_labels=3,
)


SINGLE = torch.finfo(torch.float32).eps  # captum has the weights of the quadrature in float32


def classifier(family: str) -> Any:
    model = theirs(family, "ForSequenceClassification", num_labels=3)
    return ours_of(model, BertForSequenceClassification).double()


def integral(model: Any, ids: Tensor, target: int, n_steps: int) -> Tensor:
    """Integrated gradients (S,) of one sequence without padding, the sum written out."""
    embeds = model.bert.embeddings.word_embeddings(ids).detach()[None]
    points, weights = np.polynomial.legendre.leggauss(n_steps)
    positions = model.bert._positions(ids[None], 1, len(ids), device=ids.device)
    total = torch.zeros_like(embeds)
    for point, weight in zip((points + 1) / 2, weights / 2):
        scaled = (embeds * point).requires_grad_()
        logits = model(inputs_embeds=scaled, position_ids=positions).logits
        total += weight * torch.autograd.grad(logits[0, target], scaled)[0]
    return (total * embeds).sum(-1)[0]


@pytest.mark.downloads
@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "electra", "modernbert"])
def test_scores_add_up_and_are_the_integral(family: str) -> None:
    pytest.importorskip("captum")
    model = classifier(family)
    pad = model.config.pad_token_id or 0
    ids, mask = batch(pad)
    found = attribute(model, ids, mask, n_steps=64)
    finer = attribute(model, ids, mask, n_steps=128)
    with torch.no_grad():
        golden = model(ids, mask).logits
    assert found.target.tolist() == golden.argmax(-1).tolist()
    torch.testing.assert_close(found.logit, golden.max(-1).values)
    assert (found.scores[mask == 0] == 0).all()
    assert (found.scores[mask != 0] != 0).all()
    # the error of a quadrature is at most twice its change when its points double, once it converges
    change = (found.scores - finer.scores).abs().sum(-1)
    missing = (found.scores.sum(-1) - (found.logit - found.baseline)).abs()
    rounding = SINGLE * found.scores.abs().sum(-1)
    assert (missing <= 2 * change + rounding).all(), (missing, change)
    for row, length in enumerate(mask.sum(1).tolist()):
        alone = integral(model, ids[row, :length], int(found.target[row]), 64)
        torch.testing.assert_close(found.scores[row, :length], alone, rtol=64 * SINGLE, atol=SINGLE)
    garbage = torch.where(mask == 0, (ids + 7) % 61, ids)
    again = attribute(model, garbage, mask, n_steps=64, target=found.target)
    torch.testing.assert_close(again.scores, found.scores)


@pytest.mark.downloads
def test_the_model_is_left_as_it_was() -> None:
    pytest.importorskip("captum")
    model = classifier("bert").train()
    ids, mask = batch(0)
    attribute(model, ids, mask, target=1, n_steps=4)
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.downloads
def test_the_example_of_the_documentation_runs(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("captum")
    (block,) = [block for block in all_blocks() if "import attribute" in block.code]
    exec(compile(block.code, block.name, "exec"), {"__name__": "__main__"})
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize(
    ("options", "error", "complaint"),
    [
        ({"n_steps": 0}, ValueError, "n_steps: got 0, needs a positive integer"),
        ({"batch_size": 1.5}, ValueError, "batch_size: got 1.5, needs a positive integer"),
        ({"input_ids": [[1]]}, TypeError, "input_ids: got"),
        ({"model": BertForMaskedLM(SMALL)}, TypeError, "model: got BertForMaskedLM, needs"),
        ({"target": 3}, ValueError, "target: got 3, needs classes from 0 to 2"),
        ({"target": -1}, ValueError, "target: got -1, needs classes from 0 to 2"),
        ({"target": "x"}, TypeError, "target: got str, needs an integer"),
        ({"target": torch.zeros(2)}, ValueError, r"target: got torch.float32 of shape \(2,\)"),
    ],
)
def test_bad_input_is_named(options: dict[str, Any], error: type[Exception], complaint: str) -> None:
    good = {"model": BertForSequenceClassification(SMALL), "input_ids": torch.ones(1, 4, dtype=torch.long)}
    with pytest.raises(error, match=complaint):
        attribute(**{**good, **options})


def test_without_captum_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "captum.attr", None)
    monkeypatch.setitem(sys.modules, "captum", None)
    with pytest.raises(ImportError, match=r"needs captum: pip install 'fastattn\[inspect\]'"):
        attribute(BertForSequenceClassification(SMALL), torch.ones(1, 4, dtype=torch.long))


@pytest.mark.downloads
@pytest.mark.parametrize("view", ["head_view", "model_view"])
@pytest.mark.parametrize("kind", ["decoder", "encoder"])
def test_bertviz_takes_attentions_as_they_are(kind: str, view: str) -> None:
    bertviz = pytest.importorskip("bertviz")
    torch.manual_seed(0)
    small = GPT(GPTConfig(vocab_size=50, n_embd=32, n_layer=2, n_head=4))
    model = (small if kind == "decoder" else Bert(SMALL)).eval()
    output = model(torch.randint(1, 20, (1, 3)), output_attentions=True)
    page = getattr(bertviz, view)(output.attentions, ["the", "cat", "sat"], html_action="return").data
    shown = json.loads(re.search(r'"attn": (\[\[\[\[.*?\]\]\]\])', page).group(1))
    drawn = torch.stack([layer[0] for layer in output.attentions])  # (L, H, S, S)
    assert torch.equal(torch.tensor(shown), drawn)
