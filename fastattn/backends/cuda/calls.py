"""Calls of the extension that launch kernels."""

from __future__ import annotations

from typing import Any

from fastattn import extension
from fastattn.recorders import this_thread


def run(name: str, *args: Any) -> Any:
    """The results of a function of the extension, called by this thread's recorder."""
    function = getattr(extension.module(), name)
    return function(*args) if this_thread.recorder is None else this_thread.recorder.call(function, args)
