"""Who watches the launches of a thread: a recorder of `fastattn.backends.recording`, or nobody."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, Protocol


class Watcher(Protocol):
    """What makes the launches of a thread while it watches."""

    def launch(self, launch: Any) -> None:
        """Make a Triton launch."""

    def call(self, function: Callable[..., Any], args: Sequence[Any]) -> Any:
        """Call a function that launches by itself, and return what it does."""


class _Watched(threading.local):
    by: Watcher | None = None


watched = _Watched()
