"""The protocol between generation and models. Models implement it; generation imports none of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor


class GenerationError(ValueError):
    """A model cannot generate as asked: it has no decoder, or its logits are not finite."""


class GenerationDefaults(Protocol):
    """The fields of a model's config that generation reads."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def eos_token_id(self) -> int | Sequence[int] | None: ...

    @property
    def pad_token_id(self) -> int | None: ...


class Decoder(Protocol):
    """Decodes B sequences step by step and keeps the keys and values of their tokens.

    That of an encoder-decoder also keeps the encoder's keys and values; `reorder` copies these too.
    """

    def prefill(self, ids: Tensor, lengths: Tensor | None = None, *, chunk_size: int | None = None) -> Tensor:
        """Logits of the token after each prompt, (N, V), of ids (N, S) whose rows begin with `lengths` (N,) tokens.

        They are the first N sequences, N <= B; `reorder` gives the others theirs. chunk_size: most tokens of a row that
        are read at once.
        """

    def step(self, tokens: Tensor) -> Tensor:
        """Logits of the token after these, (B, V), one token (B,) being appended to each sequence."""

    def extend(self, tokens: Tensor) -> Tensor:
        """Logits of the token after each of these, (B, n, V), n tokens (B, n) being appended to each sequence."""

    def rewind(self, lengths: Tensor) -> None:
        """Keep the first `lengths` (B,) tokens of each sequence."""

    def reorder(self, rows: Tensor) -> None:
        """Sequence i becomes a copy of sequence rows[i], (B,)."""


class CausalLM(Protocol):
    """A causal language model that is driven token by token.

    Optional:
        decoder(batch, capacity, *, batch_invariant=False) -> Decoder | None, which `generate` uses instead of
            `new_cache` and `step` where there is one.
        generation_config: a mapping in the names of transformers' generation_config.json, whose values are the defaults
            of arguments of `generate`.
    """

    @property
    def config(self) -> GenerationDefaults: ...

    @property
    def max_positions(self) -> int | None:
        """Most tokens of a sequence; None where nothing limits them."""

    def new_cache(self, batch: int, capacity: int) -> Any:
        """An empty cache for `batch` sequences of up to `capacity` tokens each.

        Beam search needs a list of layers with a method `reorder(rows)`, as `fastattn.nn.kv_cache.KVCache` has.
        """

    def step(self, ids: Tensor, cache: Any | None, attention_mask: Tensor | None = None) -> Tensor:
        """Logits of the token after `ids`, (B, V).

        Args:
            ids: (B, S) the tokens that follow those in the cache, the prompt first.
            cache: what `new_cache` made, appended to; None = `ids` are the whole sequences.
            attention_mask: (B, S and the tokens in the cache), nonzero = a real token; None = all are.
        """


class Seq2SeqLM(Protocol):
    """An encoder-decoder: a causal language model of targets once it has read sources."""

    def continuation(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        decoder_input_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
    ) -> tuple[CausalLM, Tensor]:
        """The causal model of the targets of sources (B, S), and the tokens (B, P) that these begin with."""


class Decodes(Protocol):
    """A tokenizer: `fastattn.data.Tokenizer`, tokenizers' or transformers'."""

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of token ids."""
