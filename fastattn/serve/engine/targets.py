"""The thread that owns an encoder-decoder and generates the targets of several sources at a time."""

from __future__ import annotations

import itertools
import logging
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor

from fastattn.generation.choosing import greedy
from fastattn.generation.protocol import CausalLM, GenerationError
from fastattn.models import EncoderDecoder
from fastattn.nn.modes import evaluating
from fastattn.serve.engine.requests import (
    UNLOGGED,
    Continuation,
    DeadlineError,
    Output,
    Overloaded,
    Request,
    refuse_unreadable,
)
from fastattn.serve.engine.worker import CLOSING, Worker

log = logging.getLogger("fastattn.serve")
MOST_TARGET = 512  # tokens, where the decoder has no learned positions


class TargetEngine(Worker):
    """Runs requests of one encoder-decoder a batch at a time: requests that come meanwhile wait for the next batch.

    A prompt is the encoder's input. On a CPU its tokens have the bits that `generate(batch_invariant=True)` gives
    its source alone: sources are encoded one by one, and steps are batch-invariant.

    Args:
        model: the encoder-decoder; from here on it belongs to the thread.
        max_batch: most continuations of a batch.
        max_queue: most requests that wait; more are refused.
        max_length: most tokens of a target with its first; None = what the decoder reads, or 512 where it has no limit.
        batch_invariant: None = on a CPU.

    Raises:
        ValueError: a size is below 1, or the config names no first token of targets.
    """

    def __init__(
        self,
        model: EncoderDecoder,
        *,
        max_batch: int = 16,
        max_queue: int = 256,
        max_length: int | None = None,
        batch_invariant: bool | None = None,
    ) -> None:
        for name, value in {"max_batch": max_batch, "max_queue": max_queue}.items():
            if value < 1:
                raise ValueError(f"{name}: got {value}, needs 1 or more")
        super().__init__("fastattn-targets", max_queue)
        weight, encoder = model.decoder.wte.weight, model.config.encoder
        most = model.decoder.max_positions
        self.max_length = min(each for each in (max_length, most or MOST_TARGET) if each is not None)
        self.max_source = encoder.max_position_embeddings - encoder.position_offset
        self.model, self.device, self.max_batch = model, weight.device, max_batch
        self.batch_invariant = weight.device.type == "cpu" if batch_invariant is None else batch_invariant
        _, start = model.continuation(torch.zeros(1, 1, dtype=torch.int64, device=self.device))
        self.start_ids: list[int] = start[0].tolist()
        self._waiting: deque[Request] = deque()
        self._running: list[Continuation] = []
        self._count = self.steps = self.prompt_tokens = self.made_tokens = 0
        self._torch_threads = torch.get_num_threads()

    @property
    def busy(self) -> bool:
        """Whether a request waits or runs."""
        return bool(self._waiting or self._running)

    def behind(self, prompt: Sequence[int]) -> Sequence[int]:
        """The tokens that a continuation follows: the first ones of a target."""
        return self.start_ids

    def room(self, prompt: Sequence[int]) -> int:
        """Most tokens of a prompt's target; below 0 where the prompt is too long."""
        return self.max_length - len(self.start_ids) if len(prompt) <= self.max_source else -1

    @property
    def longest(self) -> int:
        """Most tokens of a prompt."""
        return self.max_source

    @property
    def vocab_size(self) -> int:
        """Of prompts."""
        return self.model.config.encoder.vocab_size

    def submit(self, *requests: Request) -> None:
        """Hand requests of one client over from any thread; outputs come by their `on_output`, in this thread.

        Raises:
            Overloaded: the queue is full before the first of them, or the engine is closing.
            ValueError, TypeError: a prompt or an option does not fit the model. None is taken then.
        """
        with self._changed:
            self._admit(len(self._waiting))  # before any work for those that are refused
        for request in requests:
            self._settle(request)
        with self._changed:
            self._admit(len(self._waiting))
            for request in requests:
                self._count += 1
                request.number = self._count
                self._waiting.append(request)
            self._changed.notify()

    def _settle(self, request: Request) -> None:
        if request.prompt_scores is not None:
            raise ValueError("echo: a prompt that the encoder reads has no log-probabilities")
        refuse_unreadable(request.prompt, self.vocab_size)
        request.begins = self.start_ids
        request.settle(cast("CausalLM", self.model))  # whose tokens and settings it reads
        assert request.settled is not None
        if request.copies > self.max_batch:
            raise ValueError(f"n: got {request.copies}, needs {self.max_batch} at most")
        if (room := self.room(request.prompt)) < request.settled.max_new_tokens:
            raise ValueError(
                f"max_tokens: {request.settled.max_new_tokens} tokens behind a prompt of {len(request.prompt)}, needs "
                f"{max(room, 0)} at most, and a prompt of {self.max_source}"
            )

    def stats(self) -> Mapping[str, float]:
        """Counts since the start, and what runs now."""
        return {
            "running": len(self._running),
            "waiting": len(self._waiting),
            "prompt_tokens": self.prompt_tokens,
            "generated_tokens": self.made_tokens,
            "steps": self.steps,
        }

    def _work(self) -> None:
        torch.set_num_threads(self._torch_threads)  # a thread has its own; the order of sums may depend on it
        with evaluating(self.model):
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: self._calls or self._waiting or self._stopped)
                if self._stopped:
                    break
                self._run_call()
                self.run_batch()
        while self._waiting:
            self._waiting.popleft().tell(Output(error=Overloaded(CLOSING)))

    def run_batch(self) -> None:
        """Run those that wait, as many as fit into a batch, to their ends."""
        self._drop_waiting()
        chosen: list[Request] = []
        while self._waiting and sum(r.copies for r in chosen) + self._waiting[0].copies <= self.max_batch:
            chosen.append(self._waiting[0])
            self._running += self._waiting.popleft().sequences
        if not chosen:
            return
        try:
            self._run(chosen)
        except Exception as error:
            self._recover(chosen, error)
        finally:
            self._running = []

    def _recover(self, chosen: list[Request], error: Exception) -> None:
        """Whose error it is shows when each request runs alone; what it has made is kept."""
        left = [request for request in chosen if request.unfinished and not request.cancelled.is_set()]
        if len(chosen) == 1:
            for request in left:
                self._fail(request, error)
            return
        error.__traceback__ = None  # its frames hold the caches of the batch, and memory may be short
        for request in left:
            self._running = list(request.sequences)
            try:
                self._run([request])
            except Exception as own:
                self._fail(request, own)

    @torch.no_grad()
    def _run(self, chosen: list[Request]) -> None:
        """Generate the targets of these sources, after what they have made already."""
        longest = max(len(request.prompt) for request in chosen)
        ids = torch.zeros(len(chosen), longest, dtype=torch.int64, device="cpu")
        mask = torch.zeros(len(chosen), longest, dtype=torch.bool, device="cpu")
        for row, request in enumerate(chosen):
            ids[row, : len(request.prompt)] = torch.tensor(list(request.prompt), device="cpu")
            mask[row, : len(request.prompt)] = True
        target, start = self.model.continuation(ids.to(self.device), mask.to(self.device))
        copies = [each for request in chosen for each in request.sequences]
        most = max(each.row.limit for each in copies) + start.shape[1]
        decoder = target.decoder(len(copies), most, batch_invariant=self.batch_invariant)
        if decoder is None:
            raise GenerationError("model: an encoder-decoder with replaced modules or hooks has no steps")
        for each in copies:
            if each.row.done and not each.made:  # of no tokens
                self._tell(each, each.accept(0, start[:0]))
        logits = decoder.prefill(start)  # a row for each source
        self.prompt_tokens += int(mask.sum())
        of = [row for row, request in enumerate(chosen) for _ in request.sequences]
        rows = torch.tensor(of, device=self.device)
        if len(copies) > len(chosen):
            decoder.reorder(rows)
            logits = logits[rows]
        for place in itertools.count():  # tokens after the first ones
            self.steps += 1
            self._accept(copies, logits, place)
            self._drop_running(copies)
            self._drop_waiting()
            if self._stopped or all(each.row.done for each in copies):
                break
            last = [
                each.made[min(place, len(each.made) - 1)] if each.made else self.start_ids[-1]
                for each in copies
            ]
            logits = decoder.step(torch.tensor(last, device=self.device))
        for request in chosen:
            if request.unfinished:
                self._fail(request, Overloaded(CLOSING))

    def _accept(self, copies: list[Continuation], logits: Tensor, place: int) -> None:
        """Choose a token for each continuation that is not finished and has none in this place, by logits (N, V)."""
        choosing = {
            number: each
            for number, each in enumerate(copies)
            if not each.row.done and len(each.made) == place
        }
        likeliest = greedy(logits).tolist() if any(each.plain for each in choosing.values()) else []
        for number, each in choosing.items():
            if each.row.done:  # another continuation of its request failed just now
                continue
            row = logits[number : number + 1]
            try:
                news = each.accept(likeliest[number] if each.plain else each.choose(row), row)
            except Exception as error:
                self._fail(each.request, error)
                continue
            self.made_tokens += 1
            self._tell(each, news)

    @staticmethod
    def _tell(each: Continuation, news: Output) -> None:
        each.request.unfinished -= each.row.done
        if each.row.done or news.text or news.tokens:
            each.request.tell(news)

    def _drop_running(self, copies: list[Continuation]) -> None:
        """Requests that nobody wants any more, or that take too long, make no further tokens."""
        now = time.monotonic()
        for request in dict.fromkeys(each.request for each in copies if not each.row.done):
            if request.cancelled.is_set():
                self._end(request)
            elif request.deadline is not None and now > request.deadline:
                self._fail(request, DeadlineError("the request took longer than it may"))

    def _drop_waiting(self) -> None:
        now = time.monotonic()
        for request in list(self._waiting):
            error: Exception | None = Overloaded(CLOSING) if self._refusing else None
            if request.deadline is not None and now > request.deadline:
                error = DeadlineError("the request took longer than it may")
            if error is not None:
                request.tell(Output(error=error))
            if error is not None or request.cancelled.is_set():
                self._waiting.remove(request)

    def _fail(self, request: Request, error: Exception) -> None:
        if not isinstance(error, UNLOGGED):
            log.error("request %d failed", request.number, exc_info=error)
        self._end(request)
        request.tell(Output(error=error))

    @staticmethod
    def _end(request: Request) -> None:
        request.unfinished = 0
        for each in request.sequences:
            each.row.done = True
