"""A language model of a few hundred weights and data with something to learn, for tests of training."""

import random
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from fastattn.data.packing import PackedDataset, TokenStream

VOCAB = 23


class TinyLM(nn.Module):
    """Predicts a token from the one before it; with dropout, so that random state matters."""

    def __init__(self, width: int = 12, dropout: float = 0.1) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, width)
        self.drop = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCAB)

    def forward(self, input_ids, labels):
        logits = self.head(self.norm(self.drop(self.embed(input_ids))))
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return SimpleNamespace(loss=loss, logits=logits)


class TinyBlocks(TinyLM):
    """The same with blocks in a list, whose matrices Muon takes, and with its head tied to the embedding."""

    def __init__(self, width: int = 12, dropout: float = 0.1) -> None:
        super().__init__(width, dropout)
        self.head.weight = self.embed.weight
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Linear(width, 2 * width), nn.GELU(), nn.Dropout(dropout), nn.Linear(2 * width, width)
            )
            for _ in range(2)
        )

    def forward(self, input_ids, labels):
        h = self.embed(input_ids)
        for block in self.blocks:
            h = h + block(h)
        logits = self.head(self.norm(h))
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return SimpleNamespace(loss=loss, logits=logits)


def make_blocks(seed: int = 0, **options) -> TinyBlocks:
    torch.manual_seed(seed)
    return TinyBlocks(**options)


def make_model(seed: int = 0, **options) -> TinyLM:
    torch.manual_seed(seed)
    return TinyLM(**options)


def make_data(
    tokens: int = 600,
    block_size: int = 9,
    seed: int = 0,
    starts: tuple[int, ...] = (0,),
    segments: bool = False,
) -> PackedDataset:
    """Each token is mostly the one before it plus 3, so that there is something to learn."""
    generator = np.random.default_rng(seed)
    steps = np.where(generator.random(tokens) < 0.85, 3, generator.integers(0, VOCAB, tokens))
    stream = TokenStream((np.cumsum(steps) % VOCAB).astype(np.uint16), np.array(starts, np.int64))
    return PackedDataset(stream, block_size, segments=segments)


def noisy_collate(items):
    """Draws from all three global generators, as masking for a masked language model may."""
    batch = torch.utils.data.default_collate(items)
    drop = torch.rand(batch["labels"].shape) < 0.2
    drop |= torch.tensor(np.random.rand(*drop.shape) < 0.1)  # noqa: NPY002
    if random.random() < 0.5:
        drop[0, 3] = True
    batch["labels"][drop] = -100
    return batch


def everything(trainer):
    """The weights and the optimiser's state of a trainer, by name."""
    state = {f"model.{k}": v for k, v in trainer.model.state_dict().items()}
    for index, values in trainer.optimizer.state_dict()["state"].items():
        state |= {f"optimizer.{index}.{k}": v for k, v in values.items()}
    return state


def timeless(log):
    """The records of a log without what is measured."""
    measured = ("seconds", "tokens_per_second", "stopped", "peak_memory")
    return [{k: v for k, v in r.items() if k not in measured} for r in log]
