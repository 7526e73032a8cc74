"""A thread for work that may take too long."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, TypeVar

Result = TypeVar("Result")
Calls = SimpleQueue[Any]  # of (work, its Future), and None at the end


class InTime:
    """Runs work in a thread of its own and waits so many seconds for it.

    A thread whose work takes longer is not waited for: it ends with that work, and later work gets another thread.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._calls: Calls | None = None
        self._end: Callable[[], object] = lambda: None

    def __call__(self, work: Callable[[], Result]) -> Result:
        """What `work` returns or raises; TimeoutError of `concurrent.futures` if it takes too long."""
        if self._calls is None:
            self._calls = SimpleQueue()
            threading.Thread(target=_serve, args=(self._calls,), name="fastattn-in-time", daemon=True).start()
            self._end = weakref.finalize(self, self._calls.put, None)
        outcome: Future[Result] = Future()
        self._calls.put((work, outcome))
        try:
            return outcome.result(self.seconds)
        finally:
            if not outcome.done():
                self._end()
                self._calls = None


def _serve(calls: Calls) -> None:
    while (call := calls.get()) is not None:
        work, outcome = call
        try:
            outcome.set_result(work())
        except BaseException as error:
            outcome.set_exception(error)
        del call, work, outcome  # else the last call's objects live until the next
