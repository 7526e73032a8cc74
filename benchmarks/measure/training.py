"""Small GPTs trained by a bench, for figures that need more than random weights."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from typing import Any

import torch


def train_gpt(
    corpus: Sequence[str], sizes: dict[str, Any], *, length: int, batch: int, steps: int
) -> tuple[Any, Any, Any]:
    """A GPT of these sizes, trained for so many steps, and two datasets of rows of `length` ids: seen and held out."""
    from fastattn.data import PackedDataset, TokenStream, split, train_bpe
    from fastattn.models import GPT, GPTConfig
    from fastattn.train import TrainConfig, Trainer

    tokenizer = train_bpe(corpus, vocab_size=sizes["vocab_size"])
    stream = TokenStream.build(corpus, tokenizer)
    train, held_out = (PackedDataset(part, length) for part in split(stream, validation_fraction=0.1))
    torch.manual_seed(0)
    model = GPT(GPTConfig(**sizes))
    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig(output_dir=folder, overwrite=True, max_steps=steps, batch_size=batch, lr=2e-3)
        Trainer(model, config, train, held_out, tokenizer=tokenizer).fit()
    return model.eval(), train, held_out
