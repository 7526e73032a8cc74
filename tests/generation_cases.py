"""Models, tokenizers and prompts of the tests of generation."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from gpt2_names import from_gpt2_names
from torch import Tensor

from fastattn.data import Tokenizer, train_bpe
from fastattn.models import GPT, GPTConfig

SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "n_positions": 96,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
}


def make(dtype: torch.dtype = torch.float32, **options: Any) -> GPT:
    """Random weights of a deviation by which the likeliest tokens stand out."""
    torch.manual_seed(0)
    return GPT(GPTConfig(**{**SIZES, "initializer_range": 0.3, **options})).to(dtype).eval()


def theirs_and_ours(**options: Any) -> tuple[Any, GPT]:
    """transformers' GPT-2 and ours with the same float32 weights."""
    import transformers

    special = {name: options.get(name) for name in ("eos_token_id", "pad_token_id", "bos_token_id")}
    ours = make(**options)
    config = transformers.GPT2Config(**SIZES, **special)
    torch.manual_seed(1)
    theirs = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, 0.3)
    ours.load_state_dict(from_gpt2_names(theirs.state_dict()))
    ours.tie_weights()
    return theirs, ours


def prompts(lengths: tuple[int, ...], side: str = "left") -> tuple[Tensor, Tensor]:
    """Random prompts of these lengths, padded with 0 on one side, and their mask."""
    generator = torch.Generator().manual_seed(sum(lengths))
    width = max(lengths)
    ids, mask = torch.zeros(len(lengths), width, dtype=torch.int64), torch.zeros(len(lengths), width).long()
    for row, length in enumerate(lengths):
        part = slice(width - length, width) if side == "left" else slice(0, length)
        ids[row, part] = torch.randint(3, SIZES["vocab_size"], (length,), generator=generator)
        mask[row, part] = 1
    return ids, mask


TEXT = "Stop here: 你好, 世界! Ünïcode 😀👍 and 👩\u200d👩\u200d👧 too. The end.\n"


@cache
def tokenizer() -> Tokenizer:
    """A byte-level BPE that knows few of these characters, so that most span several tokens."""
    return train_bpe(["stop the end, stop here and there"] * 3, vocab_size=280)


class Letters:
    """A tokenizer with a character for each id."""

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return "".join(chr(ord("0") + i) for i in ids)


class Script:
    """A model that says what is written: after each prompt the tokens of a text, then the end token."""

    max_positions = None

    def __init__(self, ids: list[int], vocab_size: int, eos: int | None = None) -> None:
        from types import SimpleNamespace

        self.ids = ids
        self.config = SimpleNamespace(vocab_size=vocab_size, eos_token_id=eos, pad_token_id=eos)

    def new_cache(self, batch: int, capacity: int) -> list[int]:
        return [0]

    def step(self, ids: Tensor, cache: list[int] | None, attention_mask: Tensor | None = None) -> Tensor:
        assert cache is not None
        place, cache[0] = cache[0], cache[0] + 1
        token = self.ids[place] if place < len(self.ids) else self.config.eos_token_id or 0
        return 9.0 * torch.nn.functional.one_hot(torch.tensor([token] * len(ids)), self.config.vocab_size)
