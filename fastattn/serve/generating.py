"""From a body's sampling options to requests of an engine, and from their outputs to what endpoints send."""

from __future__ import annotations

import asyncio
import time
import weakref
from collections import deque
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from starlette.concurrency import run_in_threadpool

from fastattn.generation.options import Options
from fastattn.generation.stopping import special_tokens
from fastattn.serve.engine import Output, Request, TokenScore
from fastattn.serve.engine.requests import FrequencyPenalty, LogitBias
from fastattn.serve.errors import ApiError, of_exception, of_failure
from fastattn.serve.metrics import Metrics
from fastattn.serve.options import ServeOptions
from fastattn.serve.schemas import Sampling
from fastattn.serve.served import Decoder

MOST_DIGITS = 20  # of a token's id: more than any has
LEAST_TOP_P = 1e-6  # for 0, which keeps the likeliest token: less than its share in a vocabulary of any size


def options_of(body: Sampling, model: Decoder, prompt: Sequence[int], max_tokens: int) -> Options:
    """The options of `generate` that a body asks for; ApiError for what does not go together.

    A temperature of 0 takes the likeliest token. Without one, tokens are drawn, as in OpenAI's API.
    """
    try:
        return _options_of(body, model, prompt, max_tokens)
    except (TypeError, ValueError) as error:
        raise of_exception(error) from None


def _options_of(body: Sampling, model: Decoder, prompt: Sequence[int], max_tokens: int) -> Options:
    vocab_size = model.engine.model.config.vocab_size
    if body.min_tokens is not None and body.min_tokens > max_tokens:
        reason = f"got {body.min_tokens}, needs the {max_tokens} tokens that may be made at most"
        raise ApiError(400, f"min_tokens: {reason}", param="min_tokens")
    processors: list[Any] = []
    if body.frequency_penalty:
        processors.append(FrequencyPenalty(len(model.engine.behind(prompt)), body.frequency_penalty))
    if body.logit_bias:
        names = (token for token in body.logit_bias if token.isdecimal() and len(token) <= MOST_DIGITS)
        bias = {int(token): body.logit_bias[token] for token in names}
        if len(bias) < len(body.logit_bias) or any(token >= vocab_size for token in bias):
            raise ApiError(400, f"logit_bias: needs token ids from 0 to {vocab_size - 1}", param="logit_bias")
        processors.append(LogitBias(bias))
    stops = [body.stop] if isinstance(body.stop, str) else list(body.stop or [])
    shaping: dict[str, Any] = {"do_sample": False}
    if body.temperature != 0.0:
        shaping = {
            "do_sample": True,
            "temperature": body.temperature,
            "top_p": None if body.top_p is None else max(body.top_p, LEAST_TOP_P),
            "top_k": None if body.top_k is None else max(body.top_k, 0),  # -1 stands for all, as in vLLM
            "min_p": body.min_p,
        }
    return Options(
        max_new_tokens=max_tokens,
        num_beams=1,
        num_return_sequences=1,
        prompt_lookup_num_tokens=0,
        repetition_penalty=body.repetition_penalty,
        presence_penalty=body.presence_penalty,
        no_repeat_ngram_size=body.no_repeat_ngram_size,
        min_new_tokens=body.min_tokens,
        eos_token_id=_ends_of(body, model),
        stop_strings=stops or None,
        tokenizer=model.tokenizer,
        logits_processor=processors or None,
        seed=body.seed,
        **shaping,
    )


def _ends_of(body: Sampling, model: Decoder) -> list[int]:
    """The model's end tokens, unless they are ignored, and those of the body."""
    owner: Any = model.engine.model
    vocab_size, given = owner.config.vocab_size, body.stop_token_ids or []
    if not all(0 <= token < vocab_size for token in given):
        message = f"stop_token_ids: needs token ids from 0 to {vocab_size - 1}"
        raise ApiError(400, message, param="stop_token_ids")
    own, _ = special_tokens(owner, () if body.ignore_eos else None, None)
    return [*own, *given]


def room_for(
    model: Decoder, prompt: Sequence[int], asked: int | None, default: int | None, limits: ServeOptions
) -> int:
    """How many tokens may be made after a prompt; ApiError if what is asked for does not fit."""
    longest, room = model.engine.longest, model.engine.room(prompt)
    most = model.engine.max_length if limits.max_tokens is None else limits.max_tokens
    if asked is not None and asked > most:
        raise ApiError(400, f"max_tokens: got {asked}, needs {most} at most", param="max_tokens")
    if room < (asked or 0):
        raise ApiError(
            400,
            f"This model's maximum context length is {longest} tokens; the prompt has {len(prompt)}"
            + (f", and {asked} more are asked for" if asked else ""),
            param="max_tokens" if asked else "prompt",
            code="context_length_exceeded",
        )
    if asked is not None:
        return asked
    return min(most, room, *([] if default is None else [default]))


@dataclass
class Choice:
    """A continuation as it grows."""

    text: str = ""
    scores: list[TokenScore] = field(default_factory=list)
    prompt_scores: list[TokenScore] = field(default_factory=list)
    finish: str | None = None
    made: int = 0


class Mailbox:
    """Outputs on their way from engines' threads to an event loop, which is woken once for all that come together."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = weakref.ref(loop)  # which a mailbox that is kept for it must not keep
        self._posted: deque[tuple[asyncio.Queue[Any], Any]] = deque()
        self._woken = False

    def post(self, queue: asyncio.Queue[Any], item: Any) -> None:
        """Put an item into a queue of the loop, from any thread; RuntimeError once the loop is closed."""
        loop = self._loop()
        if loop is None:
            raise RuntimeError("the event loop is gone")
        self._posted.append((queue, item))
        if not self._woken:
            self._woken = True
            try:
                loop.call_soon_threadsafe(self._deliver)
            except RuntimeError:
                self._woken = False
                raise

    def _deliver(self) -> None:
        self._woken = False  # before the posts are read: a later one wakes the loop again
        while self._posted:
            queue, item = self._posted.popleft()
            queue.put_nowait(item)


_mailboxes: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, Mailbox] = weakref.WeakKeyDictionary()


def mailbox() -> Mailbox:
    """The running event loop's."""
    loop = asyncio.get_running_loop()
    if loop not in _mailboxes:
        _mailboxes[loop] = Mailbox(loop)
    return _mailboxes[loop]


class Generation:
    """The requests of one body, and their outputs in the event loop."""

    def __init__(self, model: Decoder, metrics: Metrics) -> None:
        self.model = model
        self.requests: list[Request] = []
        self._mailbox = mailbox()
        self._first, self._between = (each.labels(model.name) for each in (metrics.first, metrics.between))
        self._queue: asyncio.Queue[tuple[int, Output]] = asyncio.Queue()
        self._started = time.monotonic()
        self._last: dict[tuple[int, int], float] = {}
        self.made: dict[tuple[int, int], int] = {}

    def add(self, prompt: Sequence[int], options: Options, **more: Any) -> None:
        """One more prompt; nothing runs before `submit`."""
        number = len(self.requests)

        def on_output(output: Output) -> None:
            self._mailbox.post(self._queue, (number, output))

        self.requests.append(Request(prompt, options, on_output, tokenizer=self.model.tokenizer, **more))

    async def submit(self) -> None:
        """Hand all requests to the engine, or none; ApiError if one does not fit or the queue is full."""
        try:
            await run_in_threadpool(self.model.engine.submit, *self.requests)
        except Exception as error:
            self.cancel()
            raise of_exception(error) from None

    def cancel(self) -> None:
        """Nobody wants the answer any more."""
        for request in self.requests:
            request.cancel()

    async def outputs(self) -> AsyncIterator[tuple[int, Output]]:
        """Outputs with the number of their prompt, until all continuations are finished; raises the first error."""
        unfinished = sum(request.copies for request in self.requests)
        while unfinished:
            number, output = await self._queue.get()
            if output.error is not None:
                self.cancel()
                raise of_failure(output.error)
            key, now = (number, output.index), time.monotonic()
            if key in self._last:
                self._between.observe(now - self._last[key])
            else:
                self._first.observe(now - self._started)
            self._last[key] = now
            self.made[key] = output.made
            unfinished -= output.finish is not None
            yield number, output

    async def all(self) -> list[list[Choice]]:
        """The continuations of each prompt."""
        choices = [[Choice() for _ in range(request.copies)] for request in self.requests]
        async for number, output in self.outputs():
            choice = choices[number][output.index]
            choice.text += output.text
            choice.scores += output.scores
            choice.prompt_scores += output.prompt_scores
            choice.finish = output.finish or choice.finish
        return choices

    def usage(self) -> dict[str, int]:
        """The tokens read and made so far."""
        prompts, made = sum(len(request.prompt) for request in self.requests), sum(self.made.values())
        return {"prompt_tokens": prompts, "completion_tokens": made, "total_tokens": prompts + made}
