"""The thread that owns a decoder and runs its requests together."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Mapping, Sequence

import torch

from fastattn.integers import cdiv
from fastattn.models import GPT
from fastattn.nn.modes import evaluating
from fastattn.serve.engine.requests import Overloaded, Request, refuse_unreadable
from fastattn.serve.engine.steps import Batch
from fastattn.serve.engine.worker import CLOSING, Worker

log = logging.getLogger("fastattn.serve")
PAGE_SIZE = 64  # tokens
BYTES_OF_CACHE = 1 << 30  # unless told otherwise, and no more than all places of the batch can use


class Engine(Worker):
    """Runs requests of one GPT at the same time; they join and leave at every step.

    On a CPU a request's tokens have the bits that `generate(batch_invariant=True, prefill_chunk_size=16)` gives the
    prompt alone, whatever else runs, and whether it was preempted or shared pages; page_size instead of 16 where that
    is no multiple. Elsewhere logits are within rounding of that.

    Args:
        model: the GPT; from here on it belongs to the engine's thread.
        max_batch: most continuations that run at the same time.
        max_queue: most requests that wait for a place; more are refused, but a body's prompts are taken together.
        max_length: most tokens of prompt and continuation; None = the model's n_positions.
        page_size: tokens of a page of the cache. A CPU reads pages of a multiple of 64 where they lie.
        kv_memory: bytes for pages; None = for max_batch sequences of max_length, at most 1 GiB.
        batch_invariant: None = on a CPU.

    Raises:
        ValueError: the pages do not hold one sequence of max_length, or the model cannot be decoded in steps.
    """

    def __init__(
        self,
        model: GPT,
        *,
        max_batch: int = 16,
        max_queue: int = 256,
        max_length: int | None = None,
        page_size: int = PAGE_SIZE,
        kv_memory: int | None = None,
        batch_invariant: bool | None = None,
    ) -> None:
        config, weight = model.config, model.wte.weight
        most = config.n_positions if model.max_positions is None else model.max_positions
        self.max_length = min(max_length or most, most)
        for name, value in {"max_batch": max_batch, "max_queue": max_queue, "page_size": page_size}.items():
            if value < 1:
                raise ValueError(f"{name}: got {value}, needs 1 or more")
        bytes_of_page = (
            2 * len(model.h) * config.kv_heads * page_size * config.head_dim * weight.element_size()
        )
        of_one = cdiv(self.max_length, page_size)
        pages = max_batch * of_one
        if kv_memory is None:
            pages = max(min(pages, BYTES_OF_CACHE // bytes_of_page), of_one)
        else:
            pages = min(pages, kv_memory // bytes_of_page)
        if pages < of_one:
            raise ValueError(
                f"kv_memory: got {kv_memory} bytes, needs {of_one * bytes_of_page} at least, for a sequence of "
                f"{self.max_length} tokens"
            )
        super().__init__("fastattn-engine", max_queue)
        self.model = model
        self.batch_invariant = weight.device.type == "cpu" if batch_invariant is None else batch_invariant
        self.batch = Batch(model, pages, page_size, self.max_length, max_batch, self.batch_invariant)
        self._arrived: deque[Request] = deque()
        self._count = self.steps = 0
        self._torch_threads = torch.get_num_threads()

    @property
    def busy(self) -> bool:
        """Whether a request waits or runs."""
        return bool(self._arrived) or self.batch.busy

    @property
    def queued(self) -> int:
        """Requests that have no place yet."""
        return len(self._arrived) + len(self.batch.waiting)

    def behind(self, prompt: Sequence[int]) -> Sequence[int]:
        """The tokens that a continuation follows."""
        return prompt

    def room(self, prompt: Sequence[int]) -> int:
        """Most tokens of a prompt's continuation; below 0 where the prompt is too long."""
        return self.max_length - len(prompt)

    @property
    def longest(self) -> int:
        """Most tokens of a prompt."""
        return self.max_length

    @property
    def vocab_size(self) -> int:
        """Of prompts."""
        return self.model.config.vocab_size

    def submit(self, *requests: Request) -> None:
        """Hand requests of one client over from any thread; outputs come by their `on_output`, in the engine's thread.

        Raises:
            Overloaded: the queue is full before the first of them, or the engine is closing.
            ValueError, TypeError: a prompt or an option does not fit the model. None is taken then.
        """
        with self._changed:
            self._admit(self.queued)  # before any work for those that are refused
        for request in requests:
            self._settle(request)
        with self._changed:
            self._admit(self.queued)
            for request in requests:
                self._count += 1
                request.number = self._count
                self._arrived.append(request)
            self._changed.notify()

    def _settle(self, request: Request) -> None:
        refuse_unreadable(request.prompt, self.vocab_size)
        request.settle(self.model)
        assert request.settled is not None
        wanted = len(request.prompt) + request.settled.max_new_tokens
        if wanted > self.max_length:
            raise ValueError(
                f"max_tokens: a prompt of {len(request.prompt)} tokens and {request.settled.max_new_tokens} more are "
                f"{wanted}, more than the {self.max_length} that the model reads"
            )

    def stats(self) -> Mapping[str, float]:
        """Counts since the start, and what runs now."""
        batch, pool = self.batch, self.batch.pool
        return {
            "running": len(batch.running),
            "waiting": self.queued,
            "pages": len(pool),
            "pages_held": len(pool) - pool.available,
            "prompt_tokens": batch.prompt_tokens,
            "shared_tokens": batch.shared_tokens,
            "generated_tokens": batch.made_tokens,
            "preemptions": batch.preemptions,
            "steps": self.steps,
        }

    def _work(self) -> None:
        torch.set_num_threads(self._torch_threads)  # a thread has its own; the order of sums may depend on it
        with evaluating(self.model):
            while True:
                with self._changed:
                    self._changed.wait_for(self._wanted)
                    if self._stopped:
                        break
                self._run_call()
                if self.busy:
                    self._step()
        for request in {each.request: None for each in (*self.batch.running, *self.batch.waiting)}:
            self.batch.fail(request, Overloaded(CLOSING))

    def _wanted(self) -> bool:
        return bool(self._calls or self.busy or self._stopped)

    def _step(self) -> None:
        while self._arrived:
            self.batch.add(self._arrived[0])
            self._arrived.popleft()
        if self._refusing:
            for request in {each.request: None for each in self.batch.waiting if not each.made}:
                self.batch.fail(request, Overloaded(CLOSING))
        try:
            self.batch.step()
            self.steps += 1
        except Exception as error:  # of the scheduling itself: all that run fail, and the engine goes on
            log.exception("a step failed")
            for request in {each.request: None for each in (*self.batch.running, *self.batch.waiting)}:
                self.batch.fail(request, error)
