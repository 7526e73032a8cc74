"""The choice of the next tokens: penalties, exclusions, the caller's processors, then the likeliest or a drawn one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor

from fastattn.generation.exclusions import Exclusions
from fastattn.generation.options import Settled
from fastattn.generation.protocol import GenerationError
from fastattn.generation.sampling import Draws, Penalties, draw, shares
from fastattn.philox import draw_seed

NOT_FINITE = -1  # in place of a token


class Scores:
    """The processing of R sequences' logits before tokens are compared, and the tokens so far that it depends on."""

    def __init__(
        self, options: Settled, prompt: Tensor, mask: Tensor | None, vocab_size: int, ends: Sequence[int]
    ) -> None:
        """prompt: (R, S); mask: (R, S) bool, None = all are real; ends: tokens that end a continuation."""
        self.processors = options.logits_processor
        self.penalties = Penalties(
            prompt, mask, vocab_size, options.repetition_penalty, options.presence_penalty
        )
        self.exclusions = Exclusions(
            prompt, mask, ends, min_new_tokens=options.min_new_tokens,
            no_repeat_ngram_size=options.no_repeat_ngram_size, room=options.max_new_tokens,
        )  # fmt: skip
        penalised = options.repetition_penalty != 1.0 or options.presence_penalty != 0.0
        self.changes = bool(self.processors) or penalised or self.exclusions.active
        self.length = prompt.shape[1]
        self.ids: Tensor | None = None  # (R, S + new) for processors
        if self.processors:
            self.ids = torch.nn.functional.pad(prompt, (0, options.max_new_tokens))

    def __call__(self, logits: Tensor) -> Tensor:
        """(R, V) -> (R, V) float32."""
        scores = self.penalties(logits.float())
        if self.exclusions.active:
            scores = self.exclusions(scores)
        for processor in self.processors:
            assert self.ids is not None
            made = processor(self.ids[:, : self.length], scores)
            if not isinstance(made, Tensor) or made.shape != scores.shape:
                got = tuple(made.shape) if isinstance(made, Tensor) else type(made).__name__
                raise ValueError(
                    f"logits_processor: returned {got}, needs scores of shape {tuple(scores.shape)}"
                )
            scores = made
        return scores

    def add(self, tokens: Tensor, rows: Tensor | None = None) -> None:
        """Tokens (R,) joined the sequences; rows: only those of these numbers did."""
        if not self.changes:
            return
        self.penalties.add(tokens, rows)
        if self.exclusions.active:
            self.exclusions.add(tokens, rows)
        if self.ids is not None:
            self.ids[:, self.length] = tokens
            self.length += 1

    def reorder(self, rows: Tensor) -> None:
        """Sequence i becomes a copy of sequence rows[i]."""
        self.penalties.reorder(rows)
        self.exclusions.reorder(rows)
        if self.ids is not None:
            self.ids = self.ids[rows]


class Chooser:
    """Chooses tokens for R sequences, N consecutive rows for each of R / N prompts."""

    def __init__(
        self, options: Settled, prompt: Tensor, mask: Tensor | None, vocab_size: int, ends: Sequence[int]
    ) -> None:
        self.options = options
        self.scores = Scores(options, prompt, mask, vocab_size, ends)
        self.greedy = not options.do_sample
        self.draws: Draws | None = None
        if options.do_sample:
            self.draws = Draws(_streams(options, len(prompt), prompt.device), prompt.device)

    @property
    def independent(self) -> bool:
        """Whether a choice depends on earlier tokens through their logits only."""
        return not self.scores.changes

    def __call__(self, logits: Tensor, position: int | Tensor) -> Tensor:
        """Tokens (R,) after logits (R, V), NOT_FINITE where none can be chosen.

        position: tokens that each sequence has after its prompt, one number or (R,).
        """
        if self.scores.changes:
            logits = self.scores(logits)
        if self.draws is None:
            return greedy(logits)
        return self._drawn(logits, self.draws.at(position))

    def several(self, logits: Tensor, counts: Sequence[int]) -> Tensor:
        """Tokens (R, n) after logits (R, n, V) of consecutive positions, where choices are `independent`.

        counts: tokens that each sequence has after its prompt at the first of these positions.
        """
        if self.draws is None:
            return greedy(logits)
        places = torch.arange(logits.shape[1], device=logits.device)
        uniform = self.draws.at(torch.tensor(counts, device=logits.device)[:, None] + places)  # (R, n)
        return self._drawn(logits.flatten(0, 1), uniform.view(-1, 1)).view(logits.shape[:2])

    def _drawn(self, logits: Tensor, uniform: Tensor) -> Tensor:
        """Tokens (N,) after logits (N, V), by numbers (N, 1)."""
        o = self.options
        tokens = draw(shares(logits, o.temperature, o.top_k, o.top_p, o.min_p), uniform)
        return torch.where(logits.amax(-1).isfinite(), tokens, NOT_FINITE)


def refuse_not_finite(place: int) -> NoReturn:
    """place: how many tokens after the prompt the logits are that no token can be chosen by."""
    raise GenerationError(
        f"model: its logits for token {place} after the prompt are not finite, "
        f"so no token can be chosen; look for NaN or infinite weights, or options that exclude every token"
    )


def greedy(logits: Tensor) -> Tensor:
    """The likeliest tokens (...) of logits (..., V), NOT_FINITE where the greatest logit is not: NaN counts as that."""
    most, tokens = logits.max(-1)
    return torch.where(most.isfinite(), tokens, NOT_FINITE)


def _streams(options: Settled, count: int, device: torch.device) -> list[tuple[int, int]]:
    """The seed and the stream of each sequence: a list of seeds has streams of its own for each prompt."""
    seed, generator = options.seed, options.generator
    if isinstance(seed, Sequence):
        return [(int(each), copy) for each in seed for copy in range(options.num_return_sequences)]
    if generator is not None:
        drawn = torch.randint(
            -(2**63), 2**63 - 1, (1,), dtype=torch.int64, generator=generator, device=generator.device
        )
        seed = int(drawn)
    elif seed is None:
        seed = int(draw_seed(device))
    return [(int(seed), row) for row in range(count)]
