"""New models draw every weight once: nothing is left as memory was, and nothing is drawn to be drawn again."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from small_models import GPT2, KINDS
from torch import nn
from torch.overrides import TorchFunctionMode

from fastattn import models
from fastattn.models import GPT, BertConfig, GPTConfig

SIZES: dict[str, Any] = {
    "vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 40,
}  # fmt: skip
ENCODERS: dict[str, dict[str, Any]] = {
    "bert": {},
    "roberta": {"position_offset": 2, "pad_token_id": 1},
    "electra": {"embedding_size": 16},
    "modernbert": {"positions": "rotary", "pre_norm": True, "local_attention": 8},
}
HEADS = ("Bert", "BertForMaskedLM", "BertForSequenceClassification", "BertForTokenClassification")


@pytest.fixture
def unset_memory_is_nan() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]


class Drawn(TorchFunctionMode):
    """Counts the numbers that are drawn."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in ("normal_", "uniform_") and args:
            self.numbers += args[0].numel()
        return func(*args, **(kwargs or {}))


def check(make: Any, once: bool = True) -> None:
    """Every weight of the model is set; `once`, also that no matrix is drawn twice, as those of new heads are."""
    with Drawn() as drawn:
        model: nn.Module = make()
    for name, tensor in model.state_dict().items():
        assert torch.isfinite(tensor.float()).all(), name
    matrices = sum(p.numel() for p in model.parameters() if p.dim() == 2)
    assert drawn.numbers > 0
    assert not once or drawn.numbers <= matrices


@pytest.mark.usefixtures("unset_memory_is_nan")
@pytest.mark.parametrize("kind", KINDS)
def test_a_decoder(kind: str) -> None:
    check(lambda: GPT(GPTConfig(**{**GPT2, **KINDS[kind]})))


@pytest.mark.usefixtures("unset_memory_is_nan")
@pytest.mark.parametrize("kind", ENCODERS)
@pytest.mark.parametrize("head", HEADS)
def test_an_encoder(kind: str, head: str) -> None:
    cls, config = getattr(models, head), BertConfig(**SIZES, **ENCODERS[kind])
    check(lambda: cls(config), once=head == "Bert")
