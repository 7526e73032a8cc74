"""Penalties and filters on logits, and how a token is drawn. Definitions are those of transformers.

A token is drawn by inverting the distribution's cumulative sum at one uniform number. That number is a function of the
seed, the stream and the position in the continuation alone, so that a draw depends on nothing else in the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastattn.philox import philox_4x32

COLD = 1e-3  # below it, logits are shifted before they are divided by the temperature, which could overflow
NUCLEUS = 512  # the likeliest tokens, among which top_p is looked for before all are sorted
POSITIONS = 256  # uniform numbers of a sequence that are made at once
_SAMPLING = 1  # the fourth word of the counter, which is 0 in the stream of dropout

LogitsProcessor = Callable[[Tensor, Tensor], Tensor]  # (ids (B, S), scores (B, V)) -> scores (B, V)


class Penalties:
    """Repetition and presence penalties of a batch of sequences, and the tokens that they are of.

    repetition_penalty p: logits of tokens in the prompt or the continuation are divided by p where they are positive,
    else multiplied by it (Keskar et al. 2019, as in transformers). presence_penalty a: logits of tokens in the
    continuation fall by a (as in vLLM).
    """

    def __init__(
        self, prompt: Tensor, real: Tensor | None, vocab_size: int, repetition: float, presence: float
    ) -> None:
        """prompt: (B, S) ids; real: (B, S) bool, None = every one is a token of the sequence."""
        self.repetition, self.presence = repetition, presence
        batch, device = len(prompt), prompt.device
        self.seen: Tensor | None = None  # (B, V), of prompt and continuation
        self.made: Tensor | None = None  # (B, V), 1.0 for a token of the continuation
        if repetition != 1.0:
            ids = prompt.long() if real is None else prompt.long().masked_fill(~real, vocab_size)
            seen = torch.zeros(batch, vocab_size + 1, dtype=torch.bool, device=device)
            self.seen = seen.scatter_(1, ids, True)[:, :vocab_size]  # the last column is that of padding
        if presence != 0.0:
            self.made = torch.zeros(batch, vocab_size, device=device)

    def __call__(self, logits: Tensor) -> Tensor:
        """(B, V) float32 -> (B, V)."""
        if self.seen is not None:
            p = self.repetition
            logits = torch.where(self.seen, torch.where(logits < 0, logits * p, logits / p), logits)
        if self.made is not None:
            logits = logits.sub(self.made, alpha=self.presence)
        return logits

    def add(self, tokens: Tensor, rows: Tensor | None = None) -> None:
        """Tokens (B,) joined the sequences; rows: only those of these numbers did."""
        if rows is not None:
            tokens = tokens[rows]
        else:
            rows = torch.arange(len(tokens), device=tokens.device)
        if self.seen is not None:
            self.seen[rows, tokens] = True
        if self.made is not None:
            self.made[rows, tokens] = 1.0

    def reorder(self, rows: Tensor) -> None:
        """Sequence i becomes a copy of sequence rows[i]."""
        self.seen = None if self.seen is None else self.seen[rows]
        self.made = None if self.made is None else self.made[rows]


def shares(
    logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, min_p: float | None
) -> Tensor:
    """The distribution that tokens are drawn from, (B, V) float32, not normalised; 0 for a token that is left out.

    Divided by the temperature; then the k likeliest tokens are kept; then the fewest of the likeliest that together
    reach probability p; then those at least min_p times as likely as the likeliest. A token as likely as the last one
    kept by top_k or top_p is kept too.
    """
    logits = logits.float()
    if temperature < COLD:
        logits, temperature = logits - logits.amax(-1, keepdim=True), max(temperature, 1e-30)
    if temperature != 1.0:
        logits = logits / float(temperature)
    vocab_size = logits.shape[-1]
    if top_k is not None and top_k < vocab_size:
        least = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < least, float("-inf"))
    probs = logits.softmax(-1)
    if top_p is not None and top_p < 1.0:
        probs = probs.masked_fill(probs < _least_in_nucleus(probs, top_p), 0.0)
    if min_p is not None and min_p > 0.0:
        probs = probs.masked_fill(probs < min_p * probs.amax(-1, keepdim=True), 0.0)
    return probs


def _least_in_nucleus(probs: Tensor, top_p: float) -> Tensor:
    """The probability of the last of the likeliest tokens that together reach top_p, (B, 1)."""
    vocab_size = probs.shape[-1]
    for count in (min(NUCLEUS, vocab_size), vocab_size):
        ordered = probs.topk(count, dim=-1).values
        total = ordered.cumsum(-1)
        if count == vocab_size or bool((total[:, -1] >= top_p).all()):
            break
    inside = total - ordered < top_p  # the tokens before do not reach p yet
    inside[:, 0] = True  # the likeliest stays, also where top_p is 0 in float32
    return ordered.masked_fill(~inside, 1.0).amin(-1, keepdim=True)


class Draws:
    """Uniform numbers in [0, 1): number t of a stream is a function of its seed, its index and t alone (Philox4x32-10).

    Args:
        streams: of each sequence, its seed and the stream's index under that seed.
        device: where the numbers are needed.
    """

    def __init__(self, streams: Sequence[tuple[int, int]], device: torch.device) -> None:
        seeds = [seed % 2**64 for seed, _ in streams]
        low, high = (
            torch.tensor([s >> n & 0xFFFFFFFF for s in seeds], device="cpu")[:, None] for n in (0, 32)
        )
        self.key = low, high
        self.index = torch.tensor([index for _, index in streams], device="cpu")[:, None]
        self.device = device
        self.numbers = torch.empty(
            len(streams), 0, dtype=torch.float64, device=device
        )  # (B, positions so far)

    def at(self, position: int | Tensor) -> Tensor:
        """Numbers (B, 1) float64 at a position, or at one of each sequence (B,); at n of each, (B, n), as many."""
        furthest = position if isinstance(position, int) else int(position.max())
        while furthest >= self.numbers.shape[1]:
            self.numbers = torch.cat((self.numbers, self._more()), 1)
        if isinstance(position, int):
            return self.numbers[:, position : position + 1]
        return self.numbers.gather(1, position.view(len(position), -1))

    def _more(self) -> Tensor:
        first = self.numbers.shape[1] // 2  # a call of Philox makes two numbers
        calls = torch.arange(first, first + POSITIONS // 2, device="cpu")[None]
        zero = torch.zeros_like(calls)
        words = torch.broadcast_tensors(*philox_4x32((calls, self.index, zero, zero + _SAMPLING), self.key))
        high, low = torch.stack(words[::2], -1) >> 5, torch.stack(words[1::2], -1) >> 6  # 27 and 26 bits
        return ((high * 2**26 + low).double() / 2**53).flatten(1).to(self.device)


def draw(probs: Tensor, uniform: Tensor) -> Tensor:
    """The tokens (B,) at which cumulative sums of probs (B, V), not normalised, pass `uniform` (B, 1) of the total."""
    total = probs.double().cumsum(-1)
    goal = torch.minimum(uniform * total[:, -1:], torch.nextafter(total[:, -1:], total.new_zeros(())))
    return torch.searchsorted(total, goal, right=True).squeeze(1)
