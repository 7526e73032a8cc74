"""A small GPT trained on prose or on code until it reproduces the text, for prompt lookup on realistic output.

The share of right guesses depends on the generated text. A small model that has not seen the text generates nothing
like it: with sampling it repeats nothing, and with greedy decoding it repeats itself endlessly.
"""

from __future__ import annotations

import functools
import sysconfig
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from measure.training import train_gpt

LENGTH, BATCH, STEPS = 1024, 2, 360
CHARACTERS = 90_000  # of the corpus, which training reads about twenty times
MODEL: dict[str, Any] = {"vocab_size": 2048, "n_positions": 1024, "n_embd": 256, "n_layer": 4, "n_head": 4}
SMALL: dict[str, Any] = {"vocab_size": 64, "n_positions": 1024, "n_embd": 64, "n_layer": 2, "n_head": 4}


def corpus_of(kind: str) -> list[str]:
    """The first CHARACTERS of the packaged corpus, or of the modules of Python's standard library."""
    from fastattn.data import default_corpus

    if kind == "prose":
        texts = list(default_corpus())
    else:
        files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
        texts = [file.read_text(encoding="utf-8", errors="ignore") for file in files]
    found: list[str] = []
    for text in texts:
        found.append(text[: CHARACTERS - sum(map(len, found))])
    return [text for text in found if text]


@functools.cache
def trained(kind: str, count: int) -> tuple[Any, Tensor]:
    """A GPT trained for STEPS on a kind of text, and `count` rows (count, LENGTH) of the ids that it was trained on."""
    sizes = {**MODEL, "positions": "rotary"}
    model, seen, _ = train_gpt(corpus_of(kind), sizes, length=LENGTH, batch=BATCH, steps=STEPS)
    places = [len(seen) * (i + 1) // (count + 1) for i in range(count)]
    return model, torch.stack([torch.as_tensor(seen[i]["input_ids"]).long() for i in places])


def untrained(count: int) -> tuple[Any, Tensor]:
    """A tiny GPT with random weights, and ids that repeat."""
    from fastattn.models import GPT, GPTConfig

    torch.manual_seed(0)
    model = GPT(GPTConfig(**SMALL, positions="rotary"))
    return model.eval(), torch.randint(SMALL["vocab_size"], (count, 16)).repeat(1, LENGTH // 16)
