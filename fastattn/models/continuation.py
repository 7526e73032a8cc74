"""An encoder-decoder's decoder as a causal model in `fastattn.generation`'s protocol."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from fastattn.models.decodable import can_decode
from fastattn.models.decoder import GPT
from fastattn.models.encoder_decoder_config import EncoderDecoderConfig
from fastattn.models.steps import GPTDecoder
from fastattn.nn.cross_attention import Memory
from fastattn.nn.kv_cache import KVCache


class Continuation:
    """A decoder that reads encoded sources; they are encoded when the first token is asked for.

    encode: encode(batch_invariant) returns the `Memory` of the sources.
    """

    def __init__(
        self,
        model: GPT,
        config: EncoderDecoderConfig,
        generation_config: dict[str, Any] | None,
        encode: Callable[[bool], Memory],
    ) -> None:
        self.model, self.encode = model, encode
        self.config, self.generation_config = config, generation_config
        self.memory: Memory | None = None  # of the sequences that step sees

    @property
    def max_positions(self) -> int | None:
        """Most tokens of a target."""
        return self.model.max_positions

    def decoder(self, batch: int, capacity: int, *, batch_invariant: bool = False) -> GPTDecoder | None:
        """Steps that check nothing; None where modules were replaced or have hooks."""
        if not can_decode(self.model):
            return None
        memory = self.encode(batch_invariant)
        return GPTDecoder(self.model, batch, capacity, batch_invariant=batch_invariant, memory=memory)

    def new_cache(self, batch: int, capacity: int) -> list[KVCache]:
        """Empty caches of self-attention; keys of the source are kept with its memory."""
        return self.model.new_cache(batch, capacity)

    def step(self, ids: Tensor, cache: Any | None, attention_mask: Tensor | None = None) -> Tensor:
        """Logits of the token after `ids`, (B, V); beams of a prompt are neighbours, and read the same source."""
        if self.memory is None:
            memory = self.encode(False)
            self.memory = memory.repeated(len(ids) // max(memory.tokens.batch, 1))
        out = self.model(
            ids, attention_mask, cache=cache, logits_to_keep=1, return_logits=True, memory=self.memory
        )
        assert out.logits is not None
        return out.logits[:, -1]
