"""Beam search: transformers' ids on the same weights, and rows that do not depend on their batch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import tokenizers.decoders
import tokenizers.models
import tokenizers.pre_tokenizers
import torch
from generation_cases import make, prompts, theirs_and_ours
from typer.testing import CliRunner

from fastattn import cli
from fastattn.models import GPT

pytest.importorskip("transformers")

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {"num_beams": 3},
    "several": {"num_beams": 4, "num_return_sequences": 3},
    "short": {"num_beams": 3, "length_penalty": -1.5},
    "long": {"num_beams": 3, "length_penalty": 2.0, "early_stopping": "never"},
    "early": {"num_beams": 4, "early_stopping": True, "num_return_sequences": 2},
    "penalised": {"num_beams": 3, "repetition_penalty": 1.4},
}
ENDS = {"no end": None, "one end": 7, "several ends": [7, 11, 30, 41, 52]}


@pytest.mark.parametrize(("name", "pad"), [*((name, 5) for name in OPTIONS), ("early", 0)])
@pytest.mark.parametrize("ends", ENDS.values(), ids=ENDS)
def test_beams_are_those_of_transformers(name: str, ends: Any, pad: int) -> None:
    options = OPTIONS[name]
    theirs, ours = theirs_and_ours(eos_token_id=ends, pad_token_id=pad)
    ids, mask = prompts((9, 4, 1, 7))
    expected = theirs.generate(ids, attention_mask=mask, max_new_tokens=14, do_sample=False, **options)
    found = ours.generate(ids, mask, max_new_tokens=14, **options)
    if ends is None:  # theirs fills nothing then, and nothing is to be filled
        assert found.shape == (len(ids) * options.get("num_return_sequences", 1), 9 + 14)
    assert torch.equal(found, expected)
    assert torch.equal(ours.generate(ids, mask, max_new_tokens=14, use_cache=False, **options), expected)


def test_a_prompt_has_the_beams_that_it_has_alone_on_either_side_of_padding() -> None:
    ours = make(torch.float64, positions="rotary", num_kv_heads=2, eos_token_id=[7, 30], pad_token_id=5)
    options: dict[str, Any] = {"num_beams": 4, "num_return_sequences": 2, "max_new_tokens": 12}
    left, mask = prompts((8, 3, 5))
    right, right_mask = prompts((8, 3, 5), "right")
    out = ours.generate(left, mask, **options)
    assert torch.equal(ours.generate(right, right_mask, **options)[:, 8:], out[:, 8:])
    for row in range(3):
        alone = ours.generate(left[row][mask[row].bool()][None], **options)
        made = alone[:, int(mask[row].sum()) :]
        assert torch.equal(out[2 * row : 2 * row + 2, 8 : 8 + made.shape[1]], made)


def test_invariant_beams_do_not_depend_on_the_batch() -> None:
    ours = make(eos_token_id=7, pad_token_id=5)
    ids, mask = prompts((6, 2, 4))
    options: dict[str, Any] = {"num_beams": 3, "max_new_tokens": 10, "batch_invariant": True}
    out = ours.generate(ids, mask, **options)
    for row in range(3):
        alone = ours.generate(ids[row : row + 1], mask[row : row + 1], **options)
        assert torch.equal(alone[0], out[row, : alone.shape[1]])


def test_a_beam_is_the_best_of_all_continuations_where_none_is_cut() -> None:
    """With as many beams as tokens, two steps are an exhaustive search."""
    ours = make(torch.float64)
    ids, _ = prompts((4,))
    found = ours.generate(ids, max_new_tokens=2, num_beams=61)
    first = ours(ids).logits[0, -1].log_softmax(-1)
    behind = torch.cat((ids.expand(61, -1), torch.arange(61)[:, None]), 1)
    second = ours(behind).logits[:, -1].log_softmax(-1)
    best = (first[:, None] + second).flatten().argmax()
    assert found[0, -2:].tolist() == [int(best) // 61, int(best) % 61]


def test_beams_go_through_the_modules_of_a_changed_model() -> None:
    """A hook takes the model's steps in place of a decoder: a cache is reordered there too."""
    ours = make(torch.float64, eos_token_id=7, pad_token_id=5)
    ids, mask = prompts((6, 2))
    options: dict[str, Any] = {"num_beams": 3, "max_new_tokens": 10, "num_return_sequences": 2}
    expected = ours.generate(ids, mask, **options)
    seen: list[int] = []
    ours.ln_f.register_forward_hook(lambda *args: seen.append(1))
    assert torch.equal(ours.generate(ids, mask, **options), expected)
    assert seen


def test_beams_keep_the_space_before_the_first_word(tmp_path: Path) -> None:
    """Metaspace tokenizers, as those of Llama 2 and Mistral, take it off the first token of what they decode."""
    words = [f"\N{LOWER ONE EIGHTH BLOCK}{word}" for word in "abcd"]
    vocabulary = {word: number for number, word in enumerate(["<unk>", "</s>", *words])}
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer, core.decoder = tokenizers.pre_tokenizers.Metaspace(), tokenizers.decoders.Metaspace()
    core.add_special_tokens(["</s>"])
    make(vocab_size=len(vocabulary)).save_pretrained(tmp_path)
    core.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    model, ids = GPT.from_pretrained(tmp_path), torch.tensor([core.encode("a b").ids])
    for beams in (1, 3):
        command = [
            "generate",
            str(tmp_path),
            "--prompt=a b",
            "--max-new-tokens=6",
            f"--num-beams={beams}",
            "--json",
        ]
        out = CliRunner().invoke(cli.app, command).stdout
        made = model.generate(ids, max_new_tokens=6, num_beams=beams)[0].tolist()
        text = json.loads(out)["continuations"][0]["text"]
        assert text.startswith(" ")
        assert f"a b{text}" == core.decode(made)
