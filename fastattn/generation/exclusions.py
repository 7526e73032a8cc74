"""Tokens that may not come next: ends of a continuation that is too short, and what would repeat an n-gram."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

EXCLUDED = float("-inf")


class Exclusions:
    """What transformers calls min_new_tokens and no_repeat_ngram_size, of R sequences without their padding.

    min_new_tokens: an end token may not come before a continuation has so many tokens. no_repeat_ngram_size n: a token
    may not come if it and the n - 1 before it stand in prompt or continuation already.
    """

    def __init__(
        self,
        prompt: Tensor,
        real: Tensor | None,
        ends: Sequence[int],
        *,
        min_new_tokens: int,
        no_repeat_ngram_size: int,
        room: int,
    ) -> None:
        """prompt: (R, S) ids; real: (R, S) bool, None = all are; room: most tokens of a continuation."""
        rows, seqlen = prompt.shape
        self.ends = torch.tensor(sorted(set(ends)), dtype=torch.int64, device=prompt.device)
        self.least, self.size = min_new_tokens if ends else 0, no_repeat_ngram_size
        self.starts = prompt.new_full((rows,), seqlen, dtype=torch.int64) if real is None else real.sum(1)
        self.lengths = self.starts  # of prompt and continuation
        self.width = seqlen  # no length is above it
        self.ids: Tensor | None = None  # (R, S + room), real tokens first
        if no_repeat_ngram_size:
            ids = prompt.long()
            if real is not None:
                ids = ids.gather(1, (~real).to(torch.uint8).argsort(dim=1, stable=True))
            self.ids = F.pad(ids, (0, room))

    @property
    def active(self) -> bool:
        """Whether any token may be excluded."""
        return self.least > 0 or self.ids is not None

    def __call__(self, scores: Tensor) -> Tensor:
        """(R, V) -> (R, V), -inf for tokens that are excluded."""
        if self.ids is not None:
            scores = scores.masked_fill(self._repeating(self.ids, scores.shape[-1]), EXCLUDED)
        early = self.lengths - self.starts < self.least  # (R,)
        if bool(early.any()):
            of_ends = scores[:, self.ends].masked_fill(early[:, None], EXCLUDED)
            scores = scores.index_copy(1, self.ends, of_ends)
        return scores

    def _repeating(self, ids: Tensor, vocab_size: int) -> Tensor:
        """(R, V) bool: tokens that followed the last size - 1 tokens before."""
        count, width = self.size - 1, self.width
        found = torch.zeros(len(ids), vocab_size + 1, dtype=torch.bool, device=ids.device)
        if width > count:
            grams = ids[:, :width].unfold(1, self.size, 1)  # (R, N, size)
            ends = torch.arange(self.size, width + 1, device=ids.device)  # where each ends
            places = self.lengths[:, None] - count + torch.arange(count, device=ids.device)
            last = ids.gather(
                1, places.clamp(min=0)
            )  # of a shorter row anything: none of its n-grams is whole
            same = (grams[..., :count] == last[:, None]).all(-1) & (ends <= self.lengths[:, None])
            found.scatter_(
                1, torch.where(same, grams[..., -1], vocab_size), True
            )  # the last column is of no token
        return found[:, :vocab_size]

    def add(self, tokens: Tensor, rows: Tensor | None = None) -> None:
        """Tokens (R,) joined the sequences; rows: only those of these numbers did."""
        if rows is None:
            rows = torch.arange(len(tokens), device=tokens.device)
        else:
            tokens = tokens[rows]
        if self.ids is not None:
            self.ids[rows, self.lengths[rows]] = tokens
            self.width = min(self.width + 1, self.ids.shape[1])
        self.lengths = self.lengths.index_add(0, rows, torch.ones_like(rows))

    def reorder(self, rows: Tensor) -> None:
        """Sequence i becomes a copy of sequence rows[i]."""
        self.starts, self.lengths = self.starts[rows], self.lengths[rows]
        self.ids = None if self.ids is None else self.ids[rows]
