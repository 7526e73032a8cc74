"""The recorder of a thread's launches, one of `fastattn.backends.recording`, or None."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, Protocol


class Recorder(Protocol):
    """The recorder that makes the launches of a thread while it records them."""

    def launch(self, launch: Any) -> None:
        """Make a Triton launch."""

    def call(self, function: Callable[..., Any], args: Sequence[Any]) -> Any:
        """Call a function that launches kernels itself, and return its result."""


class _ThisThread(threading.local):
    recorder: Recorder | None = None


this_thread = _ThisThread()
