"""Federated averaging (FedAvg) of a small text classifier through Flower: pip install flwr

Four clients hold different texts, each mostly of one label. In a round each trains the shared weights on its own texts
and sends weights back, never texts; Flower's FedAvg strategy averages them by the number of examples. The clients run
in this process, one after another; over a network the same class is a `flwr.client.NumPyClient` of a ClientApp.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from flwr.client import NumPyClient
from flwr.common import Code, FitRes, Status, ndarrays_to_parameters, parameters_to_ndarrays
from flwr.server.strategy import FedAvg
from torch import Tensor

from fastattn.models import BertConfig, BertForSequenceClassification

CLIENTS, ROUNDS, WORDS, LENGTH = 4, 8, 64, 12
CONFIG = BertConfig(
    vocab_size=WORDS, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64,
    max_position_embeddings=LENGTH, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    id2label={0: "a", 1: "b"},
)  # fmt: skip


def data(count: int, seed: int, share: float = 0.5) -> tuple[Tensor, Tensor]:
    """Rows of words and labels; a row with label 1 has more words of the upper half, and `share` of rows have it."""
    generator = torch.Generator().manual_seed(seed)
    labels = (torch.rand(count, generator=generator) < share).long()
    upper = torch.rand(count, LENGTH, generator=generator) < torch.where(labels == 1, 0.75, 0.25)[:, None]
    ids = torch.randint(WORDS // 2, (count, LENGTH), generator=generator) + upper * (WORDS // 2)
    return ids, labels


def load(model: BertForSequenceClassification, weights: list[np.ndarray]) -> None:
    """Put weights in the order of the state dict into the model."""
    model.load_state_dict(dict(zip(model.state_dict(), map(torch.from_numpy, weights))))


class Client(NumPyClient):
    """A holder of texts that trains on them where they are."""

    def __init__(self, number: int) -> None:
        self.rows = data(512, number, share=0.15 if number % 2 else 0.85)

    def fit(self, parameters: list[np.ndarray], config: dict) -> tuple[list[np.ndarray], int, dict]:
        """The weights after an epoch on its own texts, and how many these are."""
        model = BertForSequenceClassification(CONFIG).train()
        load(model, parameters)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        for chosen in torch.randperm(len(self.rows[0])).split(32):
            loss = model(self.rows[0][chosen], labels=self.rows[1][chosen]).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return [value.numpy().copy() for value in model.state_dict().values()], len(self.rows[0]), {}


def main() -> None:
    """Average for some rounds and print what the shared model reaches."""
    torch.manual_seed(0)
    model, clients, strategy = (
        BertForSequenceClassification(CONFIG),
        [Client(i) for i in range(CLIENTS)],
        FedAvg(),
    )
    test = data(1024, 99)
    weights = [value.numpy().copy() for value in model.state_dict().values()]
    for number in range(ROUNDS + 1):
        load(model, weights)
        with torch.no_grad():
            logits = model.eval()(test[0]).logits
        right = float((logits.argmax(-1) == test[1]).float().mean())
        print(f"round {number}: accuracy {right:.3f}, loss {float(F.cross_entropy(logits, test[1])):.3f}")
        results = []
        for client in clients:
            trained, count, metrics = client.fit(weights, {})
            status = Status(Code.OK, "")
            results.append((client, FitRes(status, ndarrays_to_parameters(trained), count, metrics)))
        averaged, _ = strategy.aggregate_fit(number, results, [])
        weights = parameters_to_ndarrays(averaged)


if __name__ == "__main__":
    main()
