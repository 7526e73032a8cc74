"""Small GPTs with a tokenizer of few merges, and what a loss is by hand, for the tasks that write text."""

from __future__ import annotations

from typing import Any

import small_models
import torch

from fastattn.data.records import Record
from fastattn.data.tokenization import Tokenizer, train_bpe
from fastattn.models import GPT, GPTConfig
from fastattn.models.lora import attach

TEXTS = (
    "A cat sat.",
    "The dog sleeps on the mat, and the cat sleeps too.",
    "x",
    "Ünïcode 今天 and so on " * 4,
)
EPS = torch.finfo(torch.float32).eps  # a loss is a float32


def make_tokenizer() -> Tokenizer:
    """Of byte-level BPE, with ChatML's special tokens."""
    return train_bpe(list(TEXTS), 300, special_tokens=["<|im_start|>", "<|im_end|>"])


def model_of(tokenizer: Tokenizer, cls: Any = GPT, kind: str = "learned", **changes: Any) -> Any:
    torch.manual_seed(0)
    fields = {
        **small_models.GPT2,
        **small_models.KINDS[kind],
        "vocab_size": tokenizer.vocab_size,
        "n_embd": 16,
    }
    dropless = dict.fromkeys(("embd_pdrop", "resid_pdrop", "attn_pdrop"), 0.0)
    tokens = {"eos_token_id": tokenizer.eos_id, "bos_token_id": tokenizer.eos_id}
    return cls(GPTConfig(**{**fields, **dropless, **tokens, "n_positions": 64, **changes})).eval()


def records(*fields: dict[str, Any]) -> list[Record]:
    return [Record(f"data: line {i}", each) for i, each in enumerate(fields, 1)]


def batch_of(data: Any) -> dict[str, torch.Tensor]:
    items = [data[i] for i in range(len(data))]
    return {name: torch.stack([item[name] for item in items]) for name in items[0]}


def loss_by_hand(model: Any, ids: list[int], counted: list[bool]) -> tuple[float, int]:
    """The sum of -ln P over the counted tokens of a sequence read alone, and their number."""
    logprobs = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    places = [i for i in range(1, len(ids)) if counted[i]]
    return -sum(float(logprobs[i - 1, ids[i]].detach()) for i in places), len(places)


def assert_adapters_alone_change(model: Any, batch: dict[str, torch.Tensor]) -> None:
    """A training step with adapters on every layer: the weights under them keep their bits, and the adapters do not."""
    attach(model.train(), 2, 4.0)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model(**batch).loss.backward()
    torch.optim.AdamW(trained, 1e-2).step()
    changed = {
        name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])
    }
    assert changed
    assert all(".lora." in name for name in changed)
