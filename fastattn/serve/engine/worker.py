"""A thread that owns a model, and how requests reach it from others."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable

from fastattn.serve.engine.requests import Overloaded

log = logging.getLogger("fastattn.serve")
JOIN_SECONDS = 10.0  # that a thread gets to end
CLOSING = "the server is shutting down"


class Worker:
    """Base of the engine and of the worker of encoders: the thread, its queue's limits, and its end.

    Args:
        name: of the thread.
        max_queue: most requests that wait; more are refused.
    """

    def __init__(self, name: str, max_queue: int) -> None:
        self.name, self.max_queue = name, max_queue
        self._calls: deque[tuple[Callable[[], None], Callable[[Exception], None]]] = deque()
        self._changed = threading.Condition()
        self._closing = self._refusing = self._stopped = False
        self._thread: threading.Thread | None = None

    @property
    def busy(self) -> bool:
        """Whether a request waits or runs."""
        raise NotImplementedError

    def _work(self) -> None:
        raise NotImplementedError

    def start(self) -> None:
        """Start the thread."""
        self._thread = threading.Thread(target=self._work, name=self.name, daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread is not None and self._thread.is_alive()

    def call(self, work: Callable[[], None], refuse: Callable[[Exception], None]) -> None:
        """Run `work`, which raises nothing, in the thread between two steps; `refuse` if the thread ends before.

        Raises:
            Overloaded: too many wait, or the worker is closing.
        """
        with self._changed:
            self._admit(len(self._calls))
            self._calls.append((work, refuse))
            self._changed.notify()

    def _admit(self, waiting: int) -> None:
        """Refuse one more where the worker is closing or `waiting` is the limit; the lock is held."""
        if self._closing:
            raise Overloaded(CLOSING)
        if waiting >= self.max_queue:
            raise Overloaded(f"{self.max_queue} requests are waiting already")

    def close(self) -> None:
        """Accept no more requests; those that have not begun fail at the thread's next step."""
        with self._changed:
            self._closing = self._refusing = True
            self._changed.notify()

    @property
    def unfinished(self) -> bool:
        """Whether the thread has something to finish."""
        return self.alive and bool(self._calls or self.busy)

    def drain(self, seconds: float) -> bool:
        """Accept no more requests and finish those there are, within `seconds`; whether all were finished."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        end = time.monotonic() + seconds
        while self.unfinished and time.monotonic() < end:
            time.sleep(0.01)
        return not self.busy

    def _run_call(self) -> None:
        """Run one of the calls that wait, if there is one."""
        if self._calls:
            work, _ = self._calls.popleft()
            work()

    def stop(self) -> None:
        """End the thread; requests that are not finished fail, and calls that wait are refused.

        A thread that is still in a step after 10 seconds is left to end with the process.
        """
        with self._changed:
            self._closing = self._stopped = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join(JOIN_SECONDS)
            if self._thread.is_alive():
                log.error("%s did not end within %g s: a step of it still runs", self.name, JOIN_SECONDS)
        while self._calls:
            _, refuse = self._calls.popleft()
            refuse(Overloaded(CLOSING))
