"""A small GPT trained here on prose or on code: text that prompt lookup meets is not that of random weights."""

from __future__ import annotations

import functools
import sysconfig
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from measure.training import train_gpt

LENGTH, BATCH, STEPS, CODE_FILES = 256, 8, 110, 90
MODEL: dict[str, Any] = {"vocab_size": 2048, "n_positions": 512, "n_embd": 256, "n_layer": 4, "n_head": 4}
SMALL: dict[str, Any] = {"vocab_size": 64, "n_positions": 512, "n_embd": 64, "n_layer": 2, "n_head": 4}


def corpus_of(kind: str) -> list[str]:
    """The packaged corpus, or the first modules of Python's standard library."""
    from fastattn.data import default_corpus

    if kind == "prose":
        return list(default_corpus())
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:CODE_FILES]
    return [file.read_text(encoding="utf-8", errors="ignore") for file in files]


@functools.cache
def trained(kind: str, count: int) -> tuple[Any, Tensor]:
    """A GPT trained for STEPS on a kind of text, and `count` rows (count, LENGTH) of ids that were held out."""
    sizes = {**MODEL, "positions": "rotary"}
    model, held_out = train_gpt(corpus_of(kind), sizes, length=LENGTH, batch=BATCH, steps=STEPS)
    return model, torch.stack([torch.as_tensor(held_out[i]["input_ids"]).long() for i in range(count)])


def untrained(count: int) -> tuple[Any, Tensor]:
    """The same in small, with random weights and ids that repeat."""
    from fastattn.models import GPT, GPTConfig

    torch.manual_seed(0)
    model = GPT(GPTConfig(**SMALL, positions="rotary"))
    return model.eval(), torch.randint(SMALL["vocab_size"], (count, 16)).repeat(1, LENGTH // 16)
