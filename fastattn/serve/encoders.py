"""The thread that owns an encoder: texts of all requests run together, by their number of tokens."""

from __future__ import annotations

import logging
import math
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from fastattn.data import DataError
from fastattn.data.encoding import InputTokenizer
from fastattn.serve.engine.requests import UNLOGGED, DeadlineError, Overloaded
from fastattn.serve.engine.worker import CLOSING, Worker

log = logging.getLogger("fastattn.serve")
_NUMBERED = re.compile(r"^text (\d+)")


@dataclass(eq=False)
class Job:
    """Examples of one request for a task's `predict`.

    Args:
        examples: as `predict` takes them, with the tokens of each.
        options: of `predict`; jobs with equal ones run together.
        on_done: called once in the worker's thread, with the predictions in their order or an error, which is a
            DataError where the examples are at fault.
    """

    examples: list[dict[str, Any]]
    tokens: list[int]
    options: dict[str, Any]
    on_done: Callable[[list[dict[str, Any]] | Exception], None]
    deadline: float | None = None
    cancelled: threading.Event = field(default_factory=threading.Event)
    results: list[dict[str, Any]] = field(default_factory=list)

    def done(self, result: list[dict[str, Any]] | Exception) -> None:
        """Tell who asked; nobody may be there any more."""
        try:
            self.on_done(result)
        except Exception:
            self.cancelled.set()


class EncoderWorker(Worker):
    """Runs `task.predict` for the texts of several requests at a time, up to so many tokens.

    Models pack a batch's tokens, so that no padding is computed. A request with more tokens is run in parts, between
    which others have their turn.
    """

    def __init__(
        self, task: ModuleType, model: Any, tokenizer: InputTokenizer, batch_tokens: int, max_queue: int
    ) -> None:
        super().__init__("fastattn-encoder", max_queue)
        self.task, self.model, self.tokenizer = task, model, tokenizer
        self.batch_tokens, self._busy = batch_tokens, False
        self._jobs: deque[Job] = deque()
        self.batches = self.texts = self.read_tokens = 0

    @property
    def busy(self) -> bool:
        """Whether a job waits or runs."""
        return bool(self._jobs) or self._busy

    def submit(self, job: Job) -> None:
        """Hand a job over from any thread; Overloaded if the queue is full."""
        with self._changed:
            self._admit(len(self._jobs))
            self._jobs.append(job)
            self._changed.notify()

    def stats(self) -> Mapping[str, float]:
        """Counts since the start, and what waits now."""
        return {
            "running": int(self._busy),
            "waiting": len(self._jobs),
            "texts": self.texts,
            "prompt_tokens": self.read_tokens,
            "steps": self.batches,
        }

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._calls or self._jobs or self._stopped)
                if self._stopped:
                    break
                self._busy = True
            self._run_call()
            self.step()
            self._busy = False
        for job in self._jobs:
            job.done(Overloaded(CLOSING))

    def step(self) -> None:
        """Run one batch: the first job's next examples, and those of others with the same options."""
        now = time.monotonic()
        for job in list(self._jobs):
            error: Exception | None = Overloaded(CLOSING) if self._refusing and not job.results else None
            if job.deadline is not None and now > job.deadline:
                error = DeadlineError("the request took longer than it may")
            if error is not None:
                job.done(error)
            if error is not None or job.cancelled.is_set():
                self._jobs.remove(job)
        chosen: list[tuple[Job, int]] = []
        total, first = 0, self._jobs[0] if self._jobs else None
        for job in list(self._jobs):
            if first is None or job.options != first.options:
                continue
            start = stop = len(job.results)
            while stop < len(job.examples) and (not total or total + job.tokens[stop] <= self.batch_tokens):
                total += job.tokens[stop]
                stop += 1
            if stop > start:
                chosen.append((job, stop))
            if stop < len(job.examples):
                break
        if chosen:
            self._run(chosen)
            self.read_tokens += total
            last = chosen[-1][0]
            if last in self._jobs:  # it was cut, so that the others have their turn
                self._jobs.remove(last)
                self._jobs.append(last)

    def _run(self, chosen: list[tuple[Job, int]]) -> None:
        examples = [each for job, stop in chosen for each in job.examples[len(job.results) : stop]]
        options = {**chosen[0][0].options, "batch_size": len(examples)}
        try:
            found = self.task.predict(self.model, self.tokenizer, examples, **options)
        except Exception as error:
            if len(chosen) > 1:  # whose it is shows when each runs alone
                error.__traceback__ = None  # its frames hold the batch's tensors, and memory may be short
                for each in chosen:
                    self._run([each])
                return
            job = chosen[0][0]
            self._fail(job, counted_from(len(job.results), error))
            return
        self.batches += 1
        self.texts += len(examples)
        for job, stop in chosen:
            count = stop - len(job.results)
            job.results += found[:count]
            del found[:count]
            if not is_finite(job.results[-count:]):
                self._fail(
                    job, RuntimeError("model: its predictions are not finite; look for NaN in its weights")
                )
                continue
            if len(job.results) == len(job.examples):
                self._jobs.remove(job)
                job.done(job.results)

    def _fail(self, job: Job, error: Exception) -> None:
        """End a job with an error, which is the server's unless the examples are at fault."""
        self._jobs.remove(job)
        if not isinstance(error, (DataError, *UNLOGGED)):
            log.error("a request failed", exc_info=error)
        job.done(error)


def counted_from(before: int, error: Exception) -> Exception:
    """An error that names a text of a job's part by its number, with the number in the job."""
    message = _NUMBERED.sub(lambda found: f"text {int(found[1]) + before}", str(error), count=1)
    return DataError(message) if isinstance(error, DataError) and before else error


def is_finite(found: Any) -> bool:
    """Whether no number in predictions, which are lists, dicts, texts and numbers, is NaN or infinite."""
    if isinstance(found, float):
        return math.isfinite(found)
    if isinstance(found, list) and found and isinstance(found[0], float):
        return all(map(math.isfinite, found))
    if isinstance(found, (list, dict)):
        return all(map(is_finite, found.values() if isinstance(found, dict) else found))
    return True
