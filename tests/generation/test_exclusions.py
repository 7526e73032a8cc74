"""min_new_tokens and no_repeat_ngram_size: transformers' ids, and rows that do not depend on their batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from encoder_decoder_models import batch, make_theirs
from generation_cases import make, prompts, theirs_and_ours

from fastattn.models import EncoderDecoder

ENDS = [2, 11, 30, 33, 43]
OPTIONS: list[dict[str, Any]] = [
    {"no_repeat_ngram_size": 1},
    {"no_repeat_ngram_size": 2},
    {"no_repeat_ngram_size": 3, "repetition_penalty": 0.8},
    {"min_new_tokens": 9},
    {"min_new_tokens": 5, "no_repeat_ngram_size": 2, "repetition_penalty": 1.2},
    {"min_new_tokens": 24},
]


def repeated(row: list[int], size: int) -> bool:
    """Whether a run of so many tokens comes twice."""
    grams = [tuple(row[i : i + size]) for i in range(len(row) - size + 1)]
    return len(set(grams)) < len(grams)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_ids_are_those_of_transformers(options: dict[str, Any], beams: int) -> None:
    pytest.importorskip("transformers")
    theirs, ours = theirs_and_ours(eos_token_id=ENDS, pad_token_id=0)
    for model in (theirs, ours):  # so that the likeliest tokens repeat themselves, and end soon
        with torch.no_grad():
            model.get_parameter("transformer.wpe.weight" if model is theirs else "wpe.weight").mul_(0.1)
    # theirs counts padding among the n-grams, of which a prompt of one length has none
    lengths = (9, 9, 9) if "no_repeat_ngram_size" in options else (9, 4, 1, 7)
    ids, mask = prompts(lengths)
    plain = {"max_new_tokens": 24, "num_beams": beams}
    expected = theirs.generate(ids, attention_mask=mask, do_sample=False, **plain, **options)
    assert torch.equal(ours.generate(ids, mask, **plain, **options), expected)
    assert torch.equal(ours.generate(ids, mask, **plain, **options, use_cache=False), expected)
    without = ours.generate(ids, mask, **plain)
    assert without.shape != expected.shape or not torch.equal(without, expected)


@pytest.mark.parametrize("invariant", [False, True])
def test_a_row_is_drawn_as_it_is_alone(invariant: bool) -> None:
    model = make(
        torch.float32 if invariant else torch.float64, positions="rotary", eos_token_id=ENDS, pad_token_id=0
    )
    ids, mask = prompts((6, 2, 9), "right")
    options: dict[str, Any] = {
        "do_sample": True, "temperature": 0.7, "max_new_tokens": 30, "no_repeat_ngram_size": 2, "min_new_tokens": 12,
        "num_return_sequences": 2, "batch_invariant": invariant,
    }  # fmt: skip
    together = model.generate(ids, mask, seed=[1, 2, 3], **options)[:, 9:]
    for row, length in enumerate((6, 2, 9)):
        alone = model.generate(ids[row : row + 1, :length], seed=[row + 1], **options)[:, length:]
        for copy in range(2):
            made = together[2 * row + copy].tolist()
            shown = alone[copy].tolist()
            assert made[: len(shown)] == shown
            assert not set(made[:12]) & set(ENDS)
            end = next((i for i, token in enumerate(made) if token in ENDS), len(made))
            assert not repeated(ids[row, :length].tolist() + made[: end + 1], 2)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("name", ["bert to bert", "bert to gpt2"])
def test_the_settings_of_a_summariser_s_folder_count(name: str, beams: int, tmp_path: Path) -> None:
    """As "min_length", which counts the token that the target begins with."""
    pytest.importorskip("transformers")
    theirs = make_theirs(name)
    said = {"no_repeat_ngram_size": 3, "min_length": 9, "max_length": 16, "num_beams": beams}
    for key, value in said.items():
        setattr(theirs.generation_config, key, value)
    theirs.save_pretrained(tmp_path)
    inputs = {key: value for key, value in batch(name).items() if key != "labels"}
    ours = EncoderDecoder.from_pretrained(tmp_path)
    expected = theirs.generate(**inputs, do_sample=False)
    assert torch.equal(ours.generate(**inputs), expected)
    off = ours.generate(**inputs, no_repeat_ngram_size=0, min_new_tokens=0)
    plain = theirs.generate(**inputs, do_sample=False, no_repeat_ngram_size=0, min_length=0)
    assert torch.equal(off, plain)


def test_where_every_token_is_excluded_the_error_says_so() -> None:
    ids, _ = prompts((3,))
    with pytest.raises(ValueError, match=r"are not finite, .* or options that exclude every token"):
        make(vocab_size=61).generate(ids, no_repeat_ngram_size=1, max_new_tokens=61)
