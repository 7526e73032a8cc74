"""What is asked of the engine, what it answers, and the state of each continuation in between."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from fastattn.generation.choosing import NOT_FINITE, Chooser
from fastattn.generation.options import Options, Settled
from fastattn.generation.protocol import CausalLM, Decodes, GenerationError
from fastattn.generation.rows import Row
from fastattn.generation.sampling import Draws, LogitsProcessor
from fastattn.generation.stopping import special_tokens
from fastattn.generation.text import RowText

LEAST_SCORE = -9999.0  # in place of -inf, which JSON has not; as in OpenAI's and vLLM's APIs


@dataclass(frozen=True)
class TokenScore:
    """A token's log-probability, by the model's own logits, and those of the likeliest tokens in its place.

    Attributes:
        token: its id.
        logprob: natural logarithm; None for the first token of a prompt.
        top: (id, log-probability) of the likeliest tokens, the likeliest first.
    """

    token: int
    logprob: float | None
    top: list[tuple[int, float]] = field(default_factory=list)


@dataclass
class Output:
    """News of one continuation.

    Attributes:
        index: which of the request's continuations.
        text: what it grew by: whole characters only, and nothing of a stop string.
        tokens: the ids that it grew by.
        scores: of these tokens, where asked for.
        prompt_scores: of the whole prompt, once, where asked for.
        finish: "stop" or "length" with the last news of a continuation.
        made: tokens that the model chose in all, those of a stop string included.
        error: ends the whole request.
    """

    index: int = 0
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    scores: list[TokenScore] = field(default_factory=list)
    prompt_scores: list[TokenScore] = field(default_factory=list)
    finish: str | None = None
    made: int = 0
    error: Exception | None = None


class DeadlineError(Exception):
    """A request's time was over before it was done."""


class Overloaded(Exception):
    """The queue is full, or the engine takes no more requests."""


class NoTokenLeft(ValueError):
    """A request's penalties, biases or format leave no token to choose, though the model's logits are finite."""


class FormatTooSlow(ValueError):
    """The tokens that a request's format allows are not found in the time that a token may take."""


UNLOGGED = (DeadlineError, Overloaded, NoTokenLeft, FormatTooSlow)  # no fault of the server's


class FrequencyPenalty:
    """Subtracts so much from a logit for each time its token is in the continuation; a `LogitsProcessor`."""

    def __init__(self, prompt_length: int, penalty: float) -> None:
        self.prompt_length, self.penalty = prompt_length, penalty

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        made = ids[:, self.prompt_length :].long()
        counts = torch.zeros_like(scores).scatter_add_(1, made, torch.ones_like(made, dtype=scores.dtype))
        return scores - self.penalty * counts


class LogitBias:
    """Adds a number to the logits of some tokens; a `LogitsProcessor`."""

    def __init__(self, bias: Mapping[int, float]) -> None:
        self.tokens = torch.tensor(list(bias), dtype=torch.int64, device="cpu")
        self.numbers = torch.tensor(list(bias.values()), device="cpu")

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores.clone()
        scores[:, self.tokens.to(scores.device)] += self.numbers.to(scores)
        return scores


@dataclass(eq=False)
class Request:
    """A prompt to continue.

    Args:
        prompt: token ids, one at least.
        options: those of `generate`, without beams; num_return_sequences is `copies`.
        tokenizer: turns ids into text; None = no text is made.
        copies: continuations; they share the prompt's pages.
        scores: how many of the likeliest tokens are reported with each token; None = no log-probabilities at all.
        prompt_scores: the same for the prompt's tokens.
        constraint: makes one more processor for each continuation, after those of the options.
        on_output: called in the engine's thread with each `Output`.
        deadline: of `time.monotonic`, after which the request fails; None = no limit.
    """

    prompt: Sequence[int]
    options: Options
    on_output: Callable[[Output], None]
    tokenizer: Decodes | None = None
    copies: int = 1
    scores: int | None = None
    prompt_scores: int | None = None
    deadline: float | None = None
    constraint: Callable[[], LogitsProcessor] | None = None
    cancelled: threading.Event = field(default_factory=threading.Event)
    # of the engine
    begins: Sequence[int] | None = None  # what continuations follow, where that is not the prompt
    number: int = 0  # in the order of arrival
    settled: Settled | None = None
    sequences: list[Continuation] = field(default_factory=list)
    unfinished: int = 0

    def cancel(self) -> None:
        """Nobody wants the answer any more: its pages are free after the engine's current step."""
        self.cancelled.set()

    def tell(self, output: Output) -> None:
        """Pass news on; a listener that fails is gone, and so is the wish for more."""
        try:
            self.on_output(output)
        except Exception:
            self.cancel()

    @property
    def behind(self) -> Sequence[int]:
        """The tokens that continuations follow."""
        return self.prompt if self.begins is None else self.begins

    def settle(self, model: CausalLM) -> None:
        """Decide the options and make the continuations; TypeError or ValueError for options that do not fit."""
        settled = self.options.settled(model, len(self.behind), 1)
        if settled.num_beams > 1:
            raise ValueError(f"num_beams: got {settled.num_beams}, a running batch has no beams, needs 1")
        if not settled.do_sample and self.copies > 1:
            raise ValueError(
                f"n: got {self.copies} with a temperature of 0, whose continuations are all the same"
            )
        if settled.seed is None:
            settled = replace(settled, seed=secrets.randbits(63))
        self.settled = settled
        self.sequences = [Continuation(self, copy, model) for copy in range(self.copies)]
        self.unfinished = self.copies


class Continuation:
    """One continuation of a request: its tokens, how they are chosen, and the pages that hold its keys and values."""

    def __init__(self, request: Request, index: int, model: CausalLM) -> None:
        settled = request.settled
        assert settled is not None
        self.request, self.index, self.model = request, index, model
        ends, _ = special_tokens(model, settled.eos_token_id, settled.pad_token_id, stop_ids=settled.stop_ids)
        text = None
        if request.tokenizer is not None:
            text = RowText(request.tokenizer, request.behind, settled.stop_strings)
        self.row = Row(frozenset(ends), settled.max_new_tokens, text)
        self.prompt = request.behind
        self.made: list[int] = []  # chosen tokens, those of a stop string included
        self.scores: list[TokenScore] = []  # of those not given yet
        self.prompt_scores: list[TokenScore] = []
        self.given = 0  # tokens of the row that were given
        self.pages: list[int] = []
        self.held = 0  # tokens in the cache
        self.names: list[bytes] | None = None  # of the full pages of the prompt, once they are needed
        self.order = (0, 0)

    @cached_property
    def chooser(self) -> Chooser:
        """What chooses its tokens; made with the first one, as its tensors have the size of the vocabulary."""
        settled = self.request.settled
        assert settled is not None
        if self.request.constraint is not None:
            # the folder's exclusions may leave no token that the format allows
            settled = replace(
                settled, logits_processor=(*settled.logits_processor, self.request.constraint()), min_new_tokens=0,
                no_repeat_ngram_size=0,
            )  # fmt: skip
        device = next(self.model.parameters()).device  # type: ignore[attr-defined]
        prompt = torch.tensor([list(self.prompt)], device=device)
        chooser = Chooser(settled, prompt, None, self.model.config.vocab_size, sorted(self.row.ends))
        if chooser.draws is not None:  # the continuations of a prompt draw from streams of their own
            assert isinstance(settled.seed, int)
            chooser.draws = Draws([(settled.seed, self.index)], device)
        return chooser

    @property
    def wanted(self) -> int:
        """Tokens that have to be in the cache before the next one can be chosen, or appended."""
        return len(self.prompt) + max(len(self.made) - 1, 0)

    @property
    def reading(self) -> bool:
        """Whether tokens are missing in the cache; otherwise the last token made is the only one."""
        return self.held < self.wanted or not self.made

    def token(self, place: int) -> int:
        """The token at a place of prompt and continuation."""
        return self.prompt[place] if place < len(self.prompt) else self.made[place - len(self.prompt)]

    @property
    def plain(self) -> bool:
        """Whether the likeliest token by the model's logits is taken."""
        return self.chooser.greedy and self.chooser.independent

    def choose(self, logits: Tensor) -> int:
        """The next token by logits (1, V)."""
        return -1 if self.row.done else int(self.chooser(logits, len(self.made)))

    def accept(self, token: int, logits: Tensor) -> Output:
        """Append a token that was chosen by logits (1, V); what is complete of the text and its scores."""
        row, top = self.row, self.request.scores
        if not row.done:
            if token == NOT_FINITE and bool(logits.amax().isfinite()):
                raise NoTokenLeft(
                    "logits are not finite behind the request's penalties, logit_bias or format: no token is left"
                )
            row.append(token)
            self.made.append(token)
            if self.chooser.scores.changes:
                self.chooser.scores.add(torch.tensor([token], device=logits.device))
            if top is not None:
                self.scores += scores_of(logits, [token], top)
        news = self.news()
        if row.done:
            vars(self).pop("chooser", None)  # a body's requests are kept until the last one is finished
            stopped = bool(row.text is not None and row.text.found) or bool(
                self.made and self.made[-1] in row.ends
            )
            news.finish = "stop" if stopped else "length"
        return news

    def news(self) -> Output:
        """What may be given of the row and was not yet."""
        row = self.row
        tokens = row.ids[self.given : row.given]
        output = Output(self.index, "" if row.text is None else row.text.take(), tokens)
        if self.request.scores is not None:
            output.scores = self.scores[: len(tokens)]
            del self.scores[: len(tokens)]
        self.given += len(tokens)
        output.made = len(self.made)
        output.prompt_scores, self.prompt_scores = self.prompt_scores, []
        return output


def scores_of(logits: Tensor, tokens: Sequence[int], top: int) -> list[TokenScore]:
    """The scores of one token (N) for each row of logits (N, V)."""
    scores = []
    for row, token in zip(logits.float().log_softmax(-1).clamp(min=LEAST_SCORE), tokens):
        best = row.topk(min(top, len(row)))
        likeliest = list(zip(best.indices.tolist(), best.values.tolist()))
        scores.append(TokenScore(token, float(row[token]), likeliest))
    return scores


def refuse_unreadable(prompt: Sequence[int], vocab_size: int) -> None:
    """ValueError for a prompt without tokens, or with ids beyond the vocabulary."""
    if not prompt:
        raise ValueError("prompt: got no token, needs one at least")
    if not all(0 <= token < vocab_size for token in prompt):
        raise GenerationError(f"prompt: got a token id outside 0 to {vocab_size - 1}")
