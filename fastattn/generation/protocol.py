"""The protocol between generation and models. Models implement it; generation imports none of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor


class GenerationDefaults(Protocol):
    """The fields of a model's config that generation reads."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def eos_token_id(self) -> int | Sequence[int] | None: ...

    @property
    def pad_token_id(self) -> int | None: ...


class Decoder(Protocol):
    """The steps of one batch of sequences, which keeps their tokens' keys and values."""

    def prefill(self, ids: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Logits of the token after each prompt, (B, V), of ids (B, S) whose rows begin with `lengths` (B,) tokens."""

    def step(self, tokens: Tensor) -> Tensor:
        """Logits of the token after these, (B, V), one token (B,) being appended to each sequence."""


class CausalLM(Protocol):
    """A causal language model that is driven token by token.

    Optional: decoder(batch, capacity, *, batch_invariant=False) -> Decoder | None, which `generate` takes in the place
    of a cache and its steps where there is one.
    """

    @property
    def config(self) -> GenerationDefaults: ...

    @property
    def max_positions(self) -> int | None:
        """Most tokens of a sequence; None where nothing limits them."""

    def new_cache(self, batch: int, capacity: int) -> Any:
        """An empty cache for `batch` sequences of up to `capacity` tokens each."""

    def step(self, ids: Tensor, cache: Any | None, attention_mask: Tensor | None = None) -> Tensor:
        """Logits of the token after `ids`, (B, V).

        Args:
            ids: (B, S) the tokens that follow those in the cache, the prompt first.
            cache: what `new_cache` made, appended to; None = `ids` are the whole sequences.
            attention_mask: (B, S and the tokens in the cache), nonzero = a real token; None = all are.
        """
