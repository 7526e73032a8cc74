"""What narrower weights cost a trained model: its perplexity on held-out text, through the steps of generation."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

LENGTH, BATCH = 128, 16
MODEL: dict[str, Any] = {"vocab_size": 2048, "n_positions": LENGTH, "n_embd": 256, "n_layer": 4, "n_head": 4}


def trained(steps: int, changes: dict[str, Any]) -> tuple[Any, Any]:
    """A GPT trained on the packaged corpus for so many steps, and the rows held out, as a dataset."""
    from fastattn.data import PackedDataset, TokenStream, default_corpus, split, train_bpe
    from fastattn.models import GPT, GPTConfig
    from fastattn.train import TrainConfig, Trainer

    sizes = {**MODEL, **changes}
    corpus = default_corpus()
    tokenizer = train_bpe(corpus, vocab_size=sizes["vocab_size"])
    stream = TokenStream.build(corpus, tokenizer)
    train, dev = (PackedDataset(part, LENGTH) for part in split(stream, validation_fraction=0.1))
    torch.manual_seed(0)
    model = GPT(GPTConfig(**sizes))
    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig(output_dir=folder, overwrite=True, max_steps=steps, batch_size=BATCH, lr=2e-3)
        Trainer(model, config, train, dev, tokenizer=tokenizer).fit()
    return model.eval(), dev


@torch.no_grad()
def perplexity(model: Any, rows: Any, count: int = 256) -> float:
    """exp of the mean loss of a decoder's logits over at most so many rows."""
    total, tokens = 0.0, 0
    for first in range(0, min(count, len(rows)), BATCH):
        part = range(first, min(first + BATCH, count, len(rows)))
        ids = torch.stack([torch.as_tensor(rows[i]["input_ids"]).long() for i in part])
        logits = model.decoder(*ids.shape).logits(ids)[:, :-1].float()
        total += F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").item()
        tokens += ids[:, 1:].numel()
    return float(torch.tensor(total / tokens).exp())


def lines(steps: int, **changes: Any) -> Iterator[str]:
    """A line for each kind of weights."""
    model, rows = trained(steps, changes)
    plain = perplexity(model, rows)
    yield f"float32: {plain:.4f}"
    for name, made in (("int8", model.quantize("int8")), ("bfloat16", None)):
        model = made if made is not None else model.quantize(None).bfloat16()
        found = perplexity(model, rows)
        yield f"{name}: {found:.4f} ({100 * (found / plain - 1):+.3f} %)"
