"""Two ways to compute the logits of the next tokens: a model's decoder, or its `step` with or without a cache."""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.generation.protocol import CausalLM, Decoder, GenerationError


class Driver(Protocol):
    """Computes the next logits of R sequences, of which N consecutive ones belong to each of R / N prompts."""

    def first(self) -> Tensor:
        """Logits of the token after each prompt, (R, V)."""

    def next(self, tokens: Tensor) -> Tensor:
        """Logits of the token after these, (R, V), one token (R,) being appended to each sequence."""

    def reorder(self, rows: Tensor) -> None:
        """Sequence i becomes a copy of sequence rows[i], (R,)."""


def driver_of(
    model: CausalLM,
    prompt: Tensor,
    mask: Tensor | None,
    new_tokens: int,
    copies: int,
    *,
    use_cache: bool,
    batch_invariant: bool,
    chunk_size: int | None,
) -> Driver:
    """A driver that uses the model's decoder where it has one, else its `step`.

    Args:
        prompt: (B, S) ids.
        mask: (B, S) bool, True = a real token; None = all are.
        new_tokens: most tokens that are appended to a sequence.
        copies: sequences of each prompt.
    """
    make = getattr(model, "decoder", None)
    room = prompt.shape[1] + new_tokens
    decoder = None
    if make is not None and use_cache:
        decoder = make(len(prompt) * copies, room, batch_invariant=batch_invariant)
    if decoder is not None:
        return DecoderDriver(decoder, prompt, mask, copies, chunk_size)
    if batch_invariant:
        raise GenerationError("batch_invariant: this model has no decoder, which it needs")
    return ModelDriver(model, prompt, mask, room, copies, use_cache, chunk_size)


class DecoderDriver:
    """Runs a model's decoder, which reads each prompt once for all sequences that continue it."""

    def __init__(
        self, decoder: Decoder, prompt: Tensor, mask: Tensor | None, copies: int, chunk_size: int | None
    ) -> None:
        self.decoder, self.copies, self.chunk_size = decoder, copies, chunk_size
        self.lengths: Tensor | None = None
        if mask is not None:
            self.lengths = mask.sum(1)
            order = (~mask).to(torch.uint8).argsort(dim=1, stable=True)  # tokens to the front, in order
            prompt = prompt.gather(1, order)[:, : int(self.lengths.max())]
        self.prompt = prompt

    def first(self) -> Tensor:
        logits = self.decoder.prefill(self.prompt, self.lengths, chunk_size=self.chunk_size)
        if self.copies == 1:
            return logits
        rows = torch.arange(len(logits), device=logits.device).repeat_interleave(self.copies)
        self.decoder.reorder(rows)
        return logits[rows]

    def next(self, tokens: Tensor) -> Tensor:
        return self.decoder.step(tokens)

    def extend(self, tokens: Tensor) -> Tensor:
        """Logits of the token after each of these, (R, n, V), n tokens (R, n) being appended to each sequence."""
        return self.decoder.extend(tokens)

    def rewind(self, lengths: Tensor) -> None:
        """Keep the first `lengths` (R,) tokens of each sequence."""
        self.decoder.rewind(lengths)

    def reorder(self, rows: Tensor) -> None:
        self.decoder.reorder(rows)


class ModelDriver:
    """Runs a model's step. Padding is moved to the front, and the mask of all positions is made once."""

    def __init__(
        self,
        model: CausalLM,
        prompt: Tensor,
        mask: Tensor | None,
        room: int,
        copies: int,
        use_cache: bool,
        chunk_size: int | None,
    ) -> None:
        self.model, self.length = model, prompt.shape[1]
        if copies > 1:
            prompt = prompt.repeat_interleave(copies, 0)
            mask = None if mask is None else mask.repeat_interleave(copies, 0)
        if mask is not None:
            order = mask.to(torch.uint8).argsort(dim=1, stable=True)  # tokens to the end, in order
            prompt = prompt.gather(1, order)
            mask = F.pad(mask.gather(1, order), (0, room - self.length), value=True)
        self.ids = F.pad(prompt, (0, room - self.length))
        self.mask, self.chunk_size = mask, chunk_size
        self.cache: Any = model.new_cache(len(prompt), room) if use_cache else None

    def first(self) -> Tensor:
        size = self.chunk_size or self.length
        for start in range(0, self.length, size):
            logits = self._step(start, min(start + size, self.length))
        return logits

    def next(self, tokens: Tensor) -> Tensor:
        self.ids[:, self.length] = tokens
        self.length += 1
        return self._step(0 if self.cache is None else self.length - 1, self.length)

    def reorder(self, rows: Tensor) -> None:
        self.ids = self.ids[rows]
        self.mask = None if self.mask is None else self.mask[rows]
        if self.cache is None:
            return
        layers = list(self.cache) if isinstance(self.cache, (list, tuple)) else []
        if not layers or not all(hasattr(layer, "reorder") for layer in layers):
            raise GenerationError(
                "num_beams: the layers of this model's cache have no reorder(rows), needs use_cache=False"
            )
        for layer in layers:
            layer.reorder(rows)

    def _step(self, start: int, stop: int) -> Tensor:
        seen = None if self.mask is None else self.mask[:, :stop]
        return self.model.step(self.ids[:, start:stop], self.cache, seen)
