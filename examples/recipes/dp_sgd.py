"""A small text classifier trained with differential privacy (DP-SGD) through Opacus: pip install opacus

Every example's gradient is clipped and noise is added to their sum, so that the trained weights say little of any one
example: epsilon and delta bound how much. The classifier is plain torch around `fastattn.attention`; nothing of Opacus
is part of fastattn.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from opacus import PrivacyEngine
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fastattn

WORDS, LENGTH, WIDTH, HEADS = 64, 12, 32, 4
EPOCHS, BATCH, EPSILON, DELTA, CLIP = 20, 128, 8.0, 1e-4, 1.0


class Classifier(nn.Module):
    """Embeddings, one layer of attention, and a linear head on the mean, all of parts that Opacus knows."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, ids: Tensor) -> Tensor:
        """Logits (B, 2) of ids (B, S)."""
        x = self.embed(ids)
        parts = self.qkv(x).unflatten(-1, (3, HEADS, WIDTH // HEADS)).permute(2, 0, 3, 1, 4)
        seen = fastattn.attention(*parts.unbind(0))  # (B, H, S, D)
        x = self.norm(x + self.out(seen.transpose(1, 2).flatten(2)))
        return self.head(x.mean(1))


def data(count: int, seed: int) -> TensorDataset:
    """Rows of words; the label is whether more of them come from the upper half of the vocabulary."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(WORDS, (count, LENGTH), generator=generator)
    return TensorDataset(ids, ((ids >= WORDS // 2).sum(1) > LENGTH // 2).long())


def accuracy(model: nn.Module, rows: TensorDataset) -> float:
    """The share of rows whose label is the likeliest."""
    with torch.no_grad():
        return float((model(rows.tensors[0]).argmax(-1) == rows.tensors[1]).float().mean())


def main() -> None:
    """Train and print accuracy and epsilon after some epochs."""
    torch.manual_seed(0)
    train, test = data(4096, 1), data(1024, 2)
    model = Classifier()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    engine = PrivacyEngine(accountant="rdp")
    model, optimizer, loader = engine.make_private_with_epsilon(
        module=model, optimizer=optimizer, data_loader=DataLoader(train, batch_size=BATCH), epochs=EPOCHS,
        target_epsilon=EPSILON, target_delta=DELTA, max_grad_norm=CLIP,
    )  # fmt: skip
    print(
        f"noise {optimizer.noise_multiplier:.3f}, clipped to {CLIP}; accuracy before {accuracy(model, test):.3f}"
    )
    for epoch in range(1, EPOCHS + 1):
        for ids, labels in loader:
            if len(ids):  # Poisson sampling may draw none
                F.cross_entropy(model(ids), labels).backward()
                optimizer.step()
                optimizer.zero_grad()
        if epoch % 5 == 0:
            print(
                f"epoch {epoch}: accuracy {accuracy(model, test):.3f}, epsilon {engine.get_epsilon(DELTA):.2f}"
            )


if __name__ == "__main__":
    main()
