"""Padding of a decoder batch: no loss, gradient or hidden state depends on it, and none is computed without logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from encoder_decoder_models import PAIRS, SOURCE_VOCAB, VOCAB, make_both
from small_models import KINDS, make_gpt
from small_models import VOCAB as GPT_VOCAB
from torch import Tensor

from fastattn.models import GPT

LENGTHS = (9, 4, 7)
DYNAMIC = {"positions": "rotary", "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}, "n_positions": 5}
ALL = {**KINDS, "dynamic": DYNAMIC}
every_kind = pytest.mark.parametrize("options", ALL.values(), ids=ALL.keys())
every_side = pytest.mark.parametrize("side", ["left", "right"])


def padded(side: str) -> tuple[Tensor, Tensor, Tensor]:
    """ids, mask and labels, (3, 9) each; targets of padding are ignored, also the one before the first token."""
    torch.manual_seed(1)
    ids, columns = torch.randint(GPT_VOCAB, (3, 9)), torch.arange(9)
    lengths = torch.tensor(LENGTHS)[:, None]
    mask = (columns < lengths if side == "right" else columns >= 9 - lengths).long()
    first = (mask.cumsum(1) == 1) & (mask == 1)
    return ids, mask, ids.masked_fill((mask == 0) | first, -100)


def gradients(model: torch.nn.Module, loss: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*model.named_parameters())
    return {
        name: grad
        for name, grad in zip(names, torch.autograd.grad(loss, parameters, allow_unused=True))
        if grad is not None
    }


def rows_computed(model: GPT) -> list[int]:
    """How many tokens each block is given, filled by later calls."""
    seen: list[int] = []
    for block in model.h:
        block.mlp.register_forward_pre_hook(lambda module, args: seen.append(args[0].flatten(0, -2).shape[0]))
    return seen


@every_side
@every_kind
def test_loss_and_gradients_are_those_with_logits(options: dict[str, Any], side: str) -> None:
    model = make_gpt(**options).train()
    ids, mask, labels = padded(side)
    seen = rows_computed(model)
    lean = model(ids, mask, labels, output_hidden_states=True)
    assert seen == [sum(LENGTHS)] * len(model.h)
    whole = model(ids, mask, labels, output_hidden_states=True, return_logits=True)
    assert seen[len(model.h) :] == [27] * len(model.h)
    torch.testing.assert_close(lean.loss, whole.loss)
    expected, found = gradients(model, whole.loss), gradients(model, lean.loss)
    assert expected.keys() == found.keys()
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad)
    assert len(lean.hidden_states) == len(whole.hidden_states)
    for a, b in zip(
        (lean.last_hidden_state, *lean.hidden_states), (whole.last_hidden_state, *whole.hidden_states)
    ):
        torch.testing.assert_close(a[mask.bool()], b[mask.bool()])
        assert not a[mask == 0].any()


@every_kind
def test_what_padding_holds_changes_no_bit(options: dict[str, Any]) -> None:
    model = make_gpt(**options).train()
    ids, mask, labels = padded("right")
    results = []
    for given in (ids, ids.masked_fill(mask == 0, 3)):
        loss = model(given, mask, labels).loss
        results.append({"loss": loss.detach(), **gradients(model, loss)})
    for name, value in results[0].items():
        assert torch.equal(results[1][name], value), name


def test_dropout_of_packed_sequences_trains() -> None:
    model = make_gpt(torch.float32, attn_pdrop=0.3, resid_pdrop=0.1, embd_pdrop=0.1).train()
    ids, mask, labels = padded("right")
    torch.manual_seed(0)
    losses = torch.stack([model(ids, mask, labels).loss.detach() for _ in range(400)])
    assert losses.std() > 0
    torch.manual_seed(0)
    others = torch.stack([model(ids, mask, labels, return_logits=True).loss.detach() for _ in range(400)])
    # the means of two samples of one distribution
    bound = 4 * (losses.var() / 400 + others.var() / 400).sqrt()
    assert (losses.mean() - others.mean()).abs() < bound


def test_a_row_may_be_longer_than_the_positions() -> None:
    model = make_gpt(n_positions=10).train()
    ids, mask, labels = padded("right")
    seen = rows_computed(model)
    model(ids, mask, labels).loss.backward()
    assert seen[0] == sum(LENGTHS) > 10
    with pytest.raises(ValueError, match="n_positions"):
        model(ids.repeat(1, 2), labels=ids.repeat(1, 2))
    with pytest.raises(ValueError, match="position_ids: got 0 to 10"):
        model(ids, position_ids=torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 10]))


@pytest.mark.parametrize("shape", [(9,), (3, 9)])
@every_kind
def test_given_positions(options: dict[str, Any], shape: tuple[int, ...]) -> None:
    model = make_gpt(**{**options, "n_positions": max(options.get("n_positions", 0), 12)}).train()
    if "rope_scaling" in options:  # past its original length too
        model = make_gpt(**options).train()
    ids, mask, labels = padded("right")
    positions = (torch.arange(9) + 2).expand(shape)
    lean, whole = (
        model(ids, mask, labels, position_ids=positions, return_logits=keep) for keep in (None, True)
    )
    torch.testing.assert_close(lean.loss, whole.loss)


def test_without_labels_hidden_states_are_those_with_logits() -> None:
    model = make_gpt()
    ids, mask, _ = padded("left")
    lean, whole = (model(ids, mask, return_logits=keep).last_hidden_state for keep in (False, True))
    assert torch.equal(lean, whole)


PADDED = {
    "a label of padding": lambda ids, mask, labels: (ids, mask, ids),
    "padding between tokens": lambda ids, mask, labels: (ids, mask.index_fill(1, torch.tensor(2), 0), labels),
    "no token at all": lambda ids, mask, labels: (ids, mask * 0, labels),
    "no padding": lambda ids, mask, labels: (ids, mask * 0 + 1, ids),
}


@pytest.mark.parametrize("name", PADDED)
def test_other_batches_are_computed_padded(name: str) -> None:
    model = make_gpt(positions="alibi").train()
    ids, mask, labels = PADDED[name](*padded("right"))
    seen = rows_computed(model)
    lean, whole = (model(ids, mask, labels, return_logits=keep).loss for keep in (None, True))
    assert seen == [27] * 4
    torch.testing.assert_close(lean, whole, equal_nan=True)


def test_a_compiled_program_does_not_read_the_mask() -> None:
    model = make_gpt(torch.float32).train()
    ids, mask, labels = padded("right")
    expected = model(ids, mask, labels).loss
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(ids, mask, labels).loss, expected)


@every_side
@pytest.mark.parametrize("source_padding", [False, True])
@pytest.mark.parametrize("name", PAIRS)
def test_an_encoder_decoder(name: str, source_padding: bool, side: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    _, model = make_both(name, tmp_path / "theirs")
    model = model.double().train()
    torch.manual_seed(2)
    source = torch.randint(3, SOURCE_VOCAB, (3, 8))
    source_mask = torch.ones_like(source)
    if source_padding:
        source_mask[0, 5:] = source_mask[2, 1:] = 0
    targets = torch.randint(3, VOCAB, (3, 9))
    _, mask, _ = padded(side)
    given = {
        "attention_mask": source_mask, "decoder_input_ids": targets, "decoder_attention_mask": mask,
        "labels": targets.roll(-1, 1).masked_fill(mask == 0, -100),
    }  # fmt: skip
    seen = rows_computed(model.decoder)
    lean, whole = (model(source, **given, return_logits=keep) for keep in (None, True))
    assert seen == [sum(LENGTHS)] * 2 + [27] * 2
    torch.testing.assert_close(lean.loss, whole.loss)
    expected, found = gradients(model, whole.loss), gradients(model, lean.loss)
    assert expected.keys() == found.keys()
    for key, grad in expected.items():
        torch.testing.assert_close(found[key], grad)
