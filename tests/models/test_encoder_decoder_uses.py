"""Encoder-decoders compiled, in bfloat16, with adapters and streamed; padding tokens where positions skip them."""

from __future__ import annotations

import copy
import json
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from encoder_decoder_models import PAIRS, SOURCE_VOCAB, VOCAB, batch, make_both
from generation_cases import Letters
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from fastattn.generation import stream_ids, stream_text
from fastattn.models import EncoderDecoder
from fastattn.models.checkpoint.names import to_file
from fastattn.models.lora import adapters_of, attach, detach, merge
from fastattn.models.peft import load_adapter, save_adapter
from numerics import assert_each_within_rule

transformers = pytest.importorskip("transformers")
from transformers_rule import float64_throughout  # noqa: E402  which imports transformers

some_pairs = pytest.mark.parametrize("name", ["bert to gpt2", "roberta to roberta"])
pytestmark = pytest.mark.filterwarnings("ignore:Version v4.12.0:FutureWarning")


def batch_of_lengths(name: str, source: int, target: int) -> dict[str, Tensor]:
    """Two sources and targets, one of each with padding."""
    generator = torch.Generator().manual_seed(source)
    ids = torch.randint(3, SOURCE_VOCAB, (2, source), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, source - 2 :] = 0
    labels = torch.randint(3, VOCAB, (2, target), generator=generator)
    labels[1, target - 1 :] = -100
    pad = int(PAIRS[name][0] == "Roberta")
    return {"input_ids": ids.masked_fill(mask == 0, pad), "attention_mask": mask, "labels": labels}


@pytest.mark.parametrize(
    "name",
    [
        "bert to roberta",
        *(pytest.param(n, marks=pytest.mark.exhaustive) for n in PAIRS if n != "bert to roberta"),
    ],
)
def test_compiles_once_for_20_lengths_of_source_and_target(name: str, tmp_path: Path) -> None:
    ours = make_both(name, tmp_path)[1].double()
    torch.compiler.reset()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(ours, fullgraph=True, dynamic=True, backend=counter)
    with torch.no_grad():
        for i in range(20):
            inputs = batch_of_lengths(name, 6 + i, 4 + 7 * i % 20)
            expected, actual = ours(**inputs), compiled(**inputs)
            torch.testing.assert_close(actual.logits, expected.logits)
            torch.testing.assert_close(actual.loss, expected.loss)
    torch.compiler.reset()
    assert counter.frame_count == 1


@pytest.mark.exhaustive
@some_pairs
def test_gradients_of_the_compiled_model_are_those_of_the_model(name: str, tmp_path: Path) -> None:
    ours = make_both(name, tmp_path)[1].double().train()
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(ours, fullgraph=True, backend=counter)
    for i in range(4):
        inputs = batch_of_lengths(name, 6 + i, 7 - i)
        found = []
        for model in (compiled, ours):
            ours.zero_grad()
            model(**inputs).loss.backward()
            found.append({n: p.grad.clone() for n, p in ours.named_parameters() if p.grad is not None})
        assert found[0].keys() == found[1].keys()
        for parameter, gradient in found[0].items():
            torch.testing.assert_close(gradient, found[1][parameter], msg=lambda m, n=parameter: f"{n}: {m}")
    torch.compiler.reset()
    assert counter.frame_count <= 2  # the first lengths, and all others


@pytest.mark.parametrize("name", PAIRS)
def test_bfloat16_stays_within_the_rule_of_bfloat16(name: str, tmp_path: Path) -> None:
    """Logits, loss, the encoder's output and the gradient, beside transformers' in bfloat16 and in float64.

    The gradient counts as one vector: of small tensors a bfloat16 model's rounding is a few draws of chance.
    """
    theirs, _ = make_both(name, tmp_path)
    theirs = theirs.bfloat16()
    ours = EncoderDecoder.from_pretrained(tmp_path, dtype="bfloat16").train()
    inputs = batch(name)
    real, source = inputs["labels"] != -100, inputs["attention_mask"].bool()

    def results(model: Any, **options: Any) -> dict[str, Tensor]:
        model.zero_grad()
        out = model(**inputs, **options)
        out.loss.backward()
        grads = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}
        if model is ours:
            _, family = EncoderDecoder.fitted(
                ours.config, ours.families[0], frozenset(["encoder.pooler.dense.weight"])
            )
            grads = to_file(grads, ours.config, family)
        return {
            "logits": out.logits[real],
            "loss": out.loss.to(dtype=out.logits.dtype),
            "encoder": out.encoder_last_hidden_state[source],
            "gradient": torch.cat([grads[n].flatten() for n in sorted(grads)]),
        }

    with float64_throughout():
        golden = results(copy.deepcopy(theirs).double())
    actual = results(ours, return_logits=True)
    assert {tensor.dtype for tensor in actual.values()} == {torch.bfloat16}
    assert_each_within_rule(actual, lambda: results(theirs), golden, name, torch.bfloat16)
    ids = ours.generate(inputs["input_ids"], inputs["attention_mask"], max_new_tokens=4)
    assert ids.shape[0] == 3
    assert ours.training


@some_pairs
def test_adapters_train_alone_merge_and_go_through_a_folder(name: str, tmp_path: Path) -> None:
    theirs, ours = make_both(name, tmp_path / "base")
    before = {n: p.detach().clone() for n, p in ours.named_parameters()}
    inputs = batch(name)
    attach(ours, r=3, alpha=6, targets="all-linear").train()
    on = {adapter.block.name for adapter in adapters_of(ours)}
    for part in ("encoder.encoder.layer.0.attention.self.query", "decoder."):
        assert any(layer.startswith(part) for layer in on)
    assert {layer for layer in on if "crossattention" in layer}
    modules = dict(theirs.named_modules())
    assert on <= modules.keys()  # the names are those of transformers' layers
    optimizer = torch.optim.SGD([p for p in ours.parameters() if p.requires_grad], lr=0.5)
    for _ in range(2):
        optimizer.zero_grad()
        ours(**inputs).loss.backward()
        optimizer.step()
    moved = {n for n, p in ours.named_parameters() if n not in before and p.grad is not None and p.grad.any()}
    assert moved == {n for n, _ in ours.named_parameters() if ".lora." in n}
    assert all(torch.equal(p, before[n]) for n, p in ours.named_parameters() if n in before)

    ours.eval()
    save_adapter(ours, tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["task_type"] == "SEQ_2_SEQ_LM"
    again = load_adapter(EncoderDecoder.from_pretrained(tmp_path / "base"), tmp_path / "adapter").eval()
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    with torch.no_grad():
        adapted = ours(**inputs).logits
        assert torch.equal(again(**inputs).logits, adapted)
    assert all(torch.equal(p, before[n]) for n, p in detach(again).named_parameters())
    tokens = ours.generate(ids, mask, max_new_tokens=6)
    weights = {adapter.block: adapter.weight() for adapter in adapters_of(ours)}
    merge(ours)
    with torch.no_grad():
        assert not torch.equal(ours(**inputs).logits, again(**inputs).logits)
    for block, added in weights.items():
        rows = slice(block.start, block.stop)
        exact = before[block.ours][rows].double() + added
        assert torch.equal(ours.get_parameter(block.ours)[rows], exact.float())
    assert torch.equal(ours.generate(ids, mask, max_new_tokens=6), tokens)
    ours.save_pretrained(tmp_path / "merged")
    assert transformers.EncoderDecoderModel.from_pretrained(tmp_path / "merged") is not None


@pytest.mark.downloads
@some_pairs
def test_peft_computes_the_same_from_our_folder(name: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    theirs, ours = make_both(name, tmp_path / "base")
    attach(ours.double(), r=3, alpha=6)
    torch.manual_seed(1)
    for adapter in adapters_of(ours):
        adapter.lora_B.data.normal_(0, 0.2)
    save_adapter(ours, tmp_path / "adapter")
    adapted = peft.PeftModel.from_pretrained(theirs.double(), tmp_path / "adapter").eval()
    inputs = batch(name)
    real = inputs["labels"] != -100
    with torch.no_grad():
        expected = adapted(**inputs).logits[real]
        torch.testing.assert_close(ours(**inputs).logits[real], expected, rtol=0, atol=1e-9)


@some_pairs
def test_a_target_is_streamed_as_it_is_written(name: str, tmp_path: Path) -> None:
    ours = make_both(name, tmp_path)[1].train()
    inputs = batch(name)
    ids, mask = inputs["input_ids"][:1], inputs["attention_mask"][:1]
    for options in ({}, {"do_sample": True, "seed": 3}, {"prompt_lookup_num_tokens": 4}):
        options = {"max_new_tokens": 12, **options}
        made = ours.generate(ids, mask, **options)[0, 1:].tolist()
        pieces = list(stream_ids(ours, ids, mask, **options))
        assert list(chain.from_iterable(pieces)) == made
        assert len(pieces) > 1
        text = "".join(stream_text(ours, ids, mask, tokenizer=Letters(), **options))
        assert text == Letters().decode(made)
    start = torch.tensor([[ours.config.decoder_start_token_id, 7, 8]])
    begun = ours.generate(ids, mask, decoder_input_ids=start, max_new_tokens=5)[0, 3:].tolist()
    pieces = stream_ids(ours, ids, mask, decoder_input_ids=start, max_new_tokens=5)
    assert list(chain.from_iterable(pieces)) == begun
    stopped = "".join(
        stream_text(ours, ids, mask, tokenizer=Letters(), max_new_tokens=12, stop_strings=text[2:4])
    )
    assert stopped == text[: text.index(text[2:4])]
    assert ours.training
    for call, complaint in (
        (lambda: stream_ids(ours, inputs["input_ids"], inputs["attention_mask"]), "input_ids: got 3 prompts"),
        (lambda: stream_ids(ours, ids, mask, num_beams=2), "num_beams: got 2"),
        (lambda: stream_ids(ours, ids, mask[:, 1:]), "attention_mask: got shape"),
    ):
        with pytest.raises(ValueError, match=complaint):
            call()


@pytest.mark.parametrize("batch_invariant", [False, True])
def test_padding_tokens_take_no_position_in_a_roberta_decoder(batch_invariant: bool, tmp_path: Path) -> None:
    """transformers counts tokens that are not the padding token, so prompts with some inside show who counts how."""
    name = "bert to roberta"
    theirs, ours = make_both(name, tmp_path)
    inputs = batch(name)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    start = torch.tensor([[0, 1, 9, 8], [1, 7, 7, 7], [0, 5, 6, 1]])  # 1 is the padding token
    with torch.no_grad():
        expected = theirs(ids, attention_mask=mask, decoder_input_ids=start).logits
        torch.testing.assert_close(ours(ids, mask, start).logits, expected)
    expected = theirs.generate(
        ids, attention_mask=mask, decoder_input_ids=start, decoder_attention_mask=torch.ones_like(start),
        max_new_tokens=8, do_sample=False,
    )  # fmt: skip
    options = {"decoder_input_ids": start, "max_new_tokens": 8}
    assert torch.equal(ours.generate(ids, mask, **options, batch_invariant=batch_invariant), expected)
    handle = ours.decoder.lm_head.register_forward_hook(lambda *args: None)  # by modules, as they have hooks
    assert torch.equal(ours.generate(ids, mask, **options), expected)
    handle.remove()
    limit = ours.decoder.max_positions
    assert limit == 40 - 2
    with pytest.raises(ValueError, match=f"decoder_input_ids: {limit + 1} tokens is more than"):
        ours(ids, mask, torch.full((3, limit + 1), 5))
