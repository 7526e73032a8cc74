"""A small GPT trained here on prose or on code: text that prompt lookup meets is not that of random weights."""

from __future__ import annotations

import functools
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

KINDS = ("prose", "code")
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
    from fastattn.data import PackedDataset, TokenStream, split, train_bpe
    from fastattn.models import GPT, GPTConfig
    from fastattn.train import TrainConfig, Trainer

    corpus = corpus_of(kind)
    tokenizer = train_bpe(corpus, vocab_size=MODEL["vocab_size"])
    stream = TokenStream.build(corpus, tokenizer)
    train, held_out = (PackedDataset(part, LENGTH) for part in split(stream, validation_fraction=0.1))
    torch.manual_seed(0)
    model = GPT(GPTConfig(**MODEL, positions="rotary"))
    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig(output_dir=folder, overwrite=True, max_steps=STEPS, batch_size=BATCH, lr=2e-3)
        Trainer(model, config, train, held_out, tokenizer=tokenizer).fit()
    rows = torch.stack([torch.as_tensor(held_out[i]["input_ids"]).long() for i in range(count)])
    return model.eval(), rows


def untrained(count: int) -> tuple[Any, Tensor]:
    """The same in small, with random weights and ids that repeat."""
    from fastattn.models import GPT, GPTConfig

    torch.manual_seed(0)
    model = GPT(GPTConfig(**SMALL, positions="rotary"))
    return model.eval(), torch.randint(SMALL["vocab_size"], (count, 16)).repeat(1, LENGTH // 16)
