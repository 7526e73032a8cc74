"""The findings of a device's checks, and calls that may raise or hang."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from measure.device_errors import lost_after
from measure.processes import announce
from measure.protocols import REFUSED
from report.schema import without_paths

Finding = dict[str, Any]
# Seconds after which one call counts as hanging: the extension compiles nothing, the other backends do, side by side.
CALL_SECONDS = {"cuda": 20.0, "triton": 60.0}
ANY_SECONDS = 60.0
_only: list[str] = []  # the backends chosen for this process; empty for all
T = TypeVar("T")


class DeviceLost(Exception):
    """No further CUDA call of this process can succeed."""


def only_backends(names: Sequence[str]) -> None:
    """Leave out other backends from now on."""
    _only[:] = names


def attempt(function: Callable[[], T], device: torch.device) -> tuple[T | None, str | None]:
    """(result, None), or (None, the exception in a line); only a lost device ends the check."""
    try:
        result = function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # a fault shows here, not in an unrelated call
        return result, None
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        text = f"{type(error).__name__}: {lines[0]}"
        if lost_after(error, device):
            raise DeviceLost(text) from error
        return None, text


def announce_call(check: str, backend: str, text: str, device: torch.device) -> None:
    """Announce the next call and its limit in seconds; silent on a CPU, where no call can hang."""
    if device.type == "cuda":
        announce(CALL_SECONDS.get(backend, ANY_SECONDS), f"{check} {backend}: {text}")


def refused_or_failed(check: str, wrong: str, backend: str) -> Finding:
    """A call that raised: skipped if the backend refused it, else failed."""
    return finding(check, "skipped" if REFUSED in wrong else "failed", wrong, backend=backend)


def finding(check: str, status: str, detail: str = "", **more: Any) -> Finding:
    """One result: status is "passed", "failed", "skipped", "not run" or "info"."""
    return {"check": check, "status": status, "detail": without_paths(detail)[:400], **more}


def backends_here(device: torch.device) -> list[str]:
    """The backends that can run on the device; the CUDA extension is last, because a hang there loses what follows."""
    from fastattn import backends
    from fastattn.spec import AttentionCall, AttentionSpec

    query = torch.empty(1, 1, 16, 64, device=device, dtype=torch.float16)
    spec = AttentionSpec.of(AttentionCall(query, query, query))
    names = [backend.NAME for backend in backends.BACKENDS if backend.why_not(spec) is None]
    chosen = [name for name in names if not _only or name in _only]
    return sorted(chosen, key=lambda name: name == "cuda")
