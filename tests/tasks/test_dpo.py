"""Preferences: the loss of the paper, packed as one by one, and a model that follows them."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from generative_cases import (
    EPS,
    assert_adapters_alone_change,
    loss_by_hand,
    make_tokenizer,
    model_of,
    records,
)
from tokenizers import processors

from fastattn.data.chat import DEFAULT_TEMPLATE
from fastattn.data.corpora import DataError
from fastattn.data.tokenization import Tokenizer
from fastattn.models import GPTConfig
from fastattn.tasks import dpo
from fastattn.train import run
from fastattn.train.progress import NoDisplay
from fastattn.train.run import Inputs, train


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return make_tokenizer()


PAIRS = (
    {"prompt": "Say A", "chosen": "A it is", "rejected": "B"},
    {"prompt": "And B", "chosen": "B", "rejected": "no idea at all"},
    {"prompt": "C", "chosen": "see", "rejected": "sea"},
)


def test_the_loss_of_preferences_is_the_papers(tokenizer: Tokenizer) -> None:
    """Against the formula written down, which is that of trl's DPOTrainer for loss_type "sigmoid"."""
    model = model_of(tokenizer, dpo.PreferenceGPT)
    options = dpo.Options(max_length=32, beta=0.3)
    examples = dpo.examples_of(records(*PAIRS), options)
    start = model_of(tokenizer, initializer_range=0.2)
    data = dpo.training_set(start, tokenizer, examples, options)
    model.beta = options.beta
    logps: list[list[tuple[float, float]]] = []
    for pair in PAIRS:
        prompt = tokenizer.encode(pair["prompt"])
        each = []
        for name in ("chosen", "rejected"):
            ids = [*prompt, *tokenizer.encode(pair[name]), tokenizer.eos_id]
            marks = [False] * len(prompt) + [True] * (len(ids) - len(prompt))
            each.append((-loss_by_hand(model, ids, marks)[0], -loss_by_hand(start, ids, marks)[0]))
        logps.append(each)
    losses = []
    for (chosen, chosen_start), (rejected, rejected_start) in logps:
        logits = (chosen - rejected) - (chosen_start - rejected_start)
        losses.append(-math.log(1 / (1 + math.exp(-0.3 * logits))))
    for size in (1, 2, 3):
        found = 0.0
        for first in range(0, 3, size):
            batch = data.collate([data[i] for i in range(first, min(first + size, 3))])
            output = model(**batch)
            found += output.loss.item() * len(batch["labels"]) / 3
        assert found == pytest.approx(sum(losses) / 3, rel=64 * EPS)
    model.label_smoothing = 1.0  # every preference the wrong way round
    swapped = model(**data.collate([data[0]])).loss.item()
    assert swapped == pytest.approx(
        losses[0] + 0.3 * ((logps[0][0][0] - logps[0][1][0]) - (logps[0][0][1] - logps[0][1][1])),
        rel=64 * EPS,
    )


def test_preferences_begin_at_ln_2_and_are_followed(tokenizer: Tokenizer, tmp_path: Path) -> None:
    model_of(tokenizer).save_pretrained(tmp_path, tokenizer=tokenizer)
    options = dpo.Options(max_length=32, beta=0.5)
    examples = dpo.examples_of(records(*PAIRS), options)
    model = dpo.new_model(tmp_path, examples, options, tokenizer)
    data = dpo.training_set(model, tokenizer, examples, options)
    batch = data.collate([data[i] for i in range(3)])
    assert model.train()(**batch).loss.item() == pytest.approx(math.log(2), rel=64 * EPS)
    before = dpo.evaluate(model, tokenizer, examples, options=options)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(12):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    after = dpo.evaluate(model, tokenizer, examples, options=options, batch_size=1)
    assert (model.eval()(**batch).margins > 0.5).all()  # every chosen answer gained on its rejected one
    assert after.metrics["margin"] > before.metrics["margin"] + 1
    assert after.metrics["accuracy"] >= before.metrics["accuracy"]


def test_the_policy_trains_without_the_dropout_of_its_config(tokenizer: Tokenizer, tmp_path: Path) -> None:
    model_of(tokenizer, dropout=0.3).save_pretrained(tmp_path, tokenizer=tokenizer)
    options = dpo.Options(max_length=32)
    examples = dpo.examples_of(records(*PAIRS), options)
    model = dpo.new_model(tmp_path, examples, options, tokenizer)
    data = dpo.training_set(model, tokenizer, examples, options)
    batch = data.collate([data[i] for i in range(3)])
    assert model.train()(**batch).loss.item() == pytest.approx(math.log(2), rel=64 * EPS)
    assert model.config.resid_pdrop == model.config.attn_pdrop == model.config.embd_pdrop == 0.3


@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
def test_the_reference_runs_on_the_device_of_the_training(
    sharding: str, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model_of(tokenizer).save_pretrained(tmp_path / "model", tokenizer=tokenizer)
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS))
    seen = []

    def logprobs(model: Any, pairs: Any, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
        seen.append(next(model.parameters()).device.type)
        return torch.zeros(len(pairs), device="cpu"), torch.zeros(len(pairs), device="cpu")

    monkeypatch.setattr(dpo, "logprobs", logprobs)
    monkeypatch.setattr(run, "usable_device", lambda name: torch.device("meta"))
    words = ("--task.max_length=32", f"--train.sharding={sharding}")
    given = (str(data),), (str(data),), str(tmp_path / "model"), str(tmp_path / "out")
    run.prepare(Inputs("dpo", *given, overrides=words))
    assert seen == ["meta" if sharding == "ddp" else "cpu"] * 2


def test_adapters_alone_follow_preferences(tokenizer: Tokenizer) -> None:
    model = model_of(tokenizer, dpo.PreferenceGPT)
    examples = dpo.examples_of(records(*PAIRS), dpo.Options())
    data = dpo.training_set(model, tokenizer, examples, dpo.Options())
    assert_adapters_alone_change(model, data.collate([data[0], data[1]]))


def test_bad_preferences_are_named(tokenizer: Tokenizer) -> None:
    for fields, message in (
        ({"prompt": "x", "chosen": "y"}, "data: line 1 has no 'rejected'"),
        ({"prompt": "x", "chosen": "y", "rejected": "y"}, "data: line 1: chosen and rejected are the same"),
        ({"prompt": [{}], "chosen": "y", "rejected": "z"}, "data: line 1: prompt is not a list"),
        ({"prompt": "x", "chosen": [], "rejected": "z"}, "data: line 1: chosen does not end with a message"),
    ):
        with pytest.raises(DataError, match=message):
            dpo.examples_of(records(fields), dpo.Options())
    shared = {"prompt": "say", "chosen": "hello " * 20 + "yes", "rejected": "hello " * 20 + "no"}
    model, options = model_of(tokenizer), dpo.Options(max_length=16)
    with pytest.raises(DataError, match=r"^data: within 16 tokens no pair has two different answers"):
        dpo.training_set(model, tokenizer, dpo.examples_of(records(shared), options), options)
    with pytest.raises(DataError, match=r"^--model: got a preset's name"):
        dpo.new_model(GPTConfig(), [], dpo.Options(), tokenizer)


ASKED = {"role": "user", "content": "say"}
SAID = {"role": "assistant", "content": "hello"}


def test_conversations_without_a_prompt_share_their_beginning() -> None:
    """As TRL reads them: what both begin with is the prompt."""
    first, second = {"role": "assistant", "content": "yes"}, {"role": "assistant", "content": "no"}
    whole = {"chosen": [ASKED, SAID, ASKED, first], "rejected": [ASKED, SAID, ASKED, second]}
    (found,) = dpo.examples_of(records(whole), dpo.Options())
    assert found.prompt == (ASKED, SAID, ASKED)
    assert (found.chosen, found.rejected) == ("yes", "no")
    given = {"prompt": [ASKED, SAID, ASKED], "chosen": [first], "rejected": [second]}
    (same,) = dpo.examples_of(records(given), dpo.Options())
    assert (same.prompt, same.chosen, same.rejected) == (found.prompt, found.chosen, found.rejected)


@pytest.mark.parametrize(
    ("chosen", "rejected", "said"),
    [
        ("a", "b", "has no prompt, needs one, or chosen and rejected as lists of messages"),
        ([SAID], [ASKED], "chosen and rejected begin with different messages"),
        ([ASKED, SAID], [ASKED, SAID], "chosen has 0 messages behind the 2"),
        ([ASKED, SAID], [ASKED, ASKED, SAID], "rejected has 2 messages behind the 1"),
    ],
)
def test_answers_without_a_prompt_that_share_no_beginning_are_refused(
    chosen: Any, rejected: Any, said: str
) -> None:
    with pytest.raises(DataError, match=said):
        dpo.examples_of(records({"chosen": chosen, "rejected": rejected}), dpo.Options())


def test_a_truncated_prompt_keeps_its_bos(tokenizer: Tokenizer) -> None:
    """The BOS that a tokenizer or a template writes; what is cut stands behind it."""
    model, text = model_of(tokenizer), "one two three four five six seven"
    bos = tokenizer.eos_token
    plain = make_tokenizer()
    (example,) = dpo.examples_of(records({"prompt": text, "chosen": "yes", "rejected": "no"}), dpo.Options())
    model.config = dataclasses.replace(model.config, bos_token_id=tokenizer.eos_id)
    plain.chat_template = "{{ eos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    front = make_tokenizer()
    front.core.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.eos_id)]
    )
    for each in (plain, front):
        (whole,), cut, _ = dpo.pairs_of(model, each, [example], 64)
        assert (whole.chosen[0], cut) == (tokenizer.eos_id, 0)
        (pair,), cut, _ = dpo.pairs_of(model, each, [example], len(whole.chosen) - 3)
        first = whole.prompts[0] - 3
        assert pair.chosen == [whole.chosen[0], *whole.chosen[4:]]
        assert pair.prompts[0] == first
        (pair,), _, _ = dpo.pairs_of(model, each, [example], 4)
        assert pair.chosen[0] == tokenizer.eos_id
        assert len(pair.chosen) == 4


def test_the_template_of_prompts_in_messages_is_saved(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """The model has learnt the default template, so its folder must have it."""
    folder, data, out = tmp_path / "model", tmp_path / "pairs.jsonl", tmp_path / "out"
    model_of(tokenizer).save_pretrained(folder, tokenizer=make_tokenizer())
    rows = [{**pair, "prompt": [{"role": "user", "content": pair["prompt"]}]} for pair in PAIRS]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ("--task.max_length=32", "--train.max_steps=1", "--train.batch_size=2", "--train.device=cpu")
    train(
        Inputs("dpo", (str(data),), (str(data),), str(folder), str(out), overrides=words), display=NoDisplay()
    )
    assert Tokenizer.from_pretrained(out).chat_template == DEFAULT_TEMPLATE
