"""The findings of a device's checks, and the error bound of a result against float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from device_errors import lost_after
from processes import announce
from rounding import MORE_ORDERS, error_of_terms, plain_in_any_order
from schema import without_paths
from torch import Tensor

Finding = dict[str, Any]
REFUSED = "cannot run this call"  # what a named backend says of a call it does not have
# How long one call may take before it counts as stuck: the extension compiles nothing, the others do, side by side.
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
    """(result, None), or (None, what was raised in a line): whatever it is, it ends this call and not the check."""
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
    """Say what runs next, and by when it must have been followed by something; silent where nothing can hang."""
    if device.type == "cuda":
        announce(CALL_SECONDS.get(backend, ANY_SECONDS), f"{check} {backend}: {text}")


def refused_or_failed(check: str, wrong: str, backend: str) -> Finding:
    """A call that raised: the backend does not have it, or it failed."""
    return finding(check, "skipped" if REFUSED in wrong else "failed", wrong, backend=backend)


def finding(check: str, status: str, detail: str = "", **more: Any) -> Finding:
    """One result: status is "passed", "failed", "skipped", "not run" or "info"."""
    return {"check": check, "status": status, "detail": without_paths(detail)[:400], **more}


def backends_here(device: torch.device) -> list[str]:
    """The backends that can run on the device, the CUDA extension last: a hang there costs what comes after it."""
    from fastattn import backends
    from fastattn.spec import AttentionCall, AttentionSpec

    query = torch.empty(1, 1, 16, 64, device=device, dtype=torch.float16)
    spec = AttentionSpec.of(AttentionCall(query, query, query))
    names = [backend.NAME for backend in backends.BACKENDS if backend.why_not(spec) is None]
    chosen = [name for name in names if not _only or name in _only]
    return sorted(chosen, key=lambda name: name == "cuda")


def excess(
    actual: Tensor, plain: Tensor, golden: Tensor, dtype: torch.dtype, terms: Tensor | None = None
) -> float:
    """max|actual - golden| over what the rule allows, 2 max|plain - golden| + eps(dtype) max|golden|; inf for NaN.

    terms: of sums that cancel, which plain torch may have exactly by chance: it counts as wrong by their error.
    """
    actual, plain, golden = actual.double(), plain.double(), golden.double()
    infinite = golden.isinf()
    if (
        actual.shape != golden.shape
        or actual.isnan().any()
        or not torch.equal(actual[infinite], golden[infinite])
    ):
        return float("inf")
    if not golden.numel():
        return 0.0
    actual, plain, golden = (t.masked_fill(infinite, 0) for t in (actual, plain, golden))
    error = (actual - golden).abs().max().item()
    of_plain = 2 * (plain - golden).abs().max().item()
    if terms is not None:
        of_plain = max(of_plain, error_of_terms(terms, dtype))
    allowed = of_plain + torch.finfo(dtype).eps * golden.abs().max().item()
    return 0.0 if error == 0 else error / allowed if allowed else float("inf")


def ratios_of(
    actual: dict[str, Tensor],
    plain: dict[str, Tensor],
    golden: dict[str, Tensor],
    dtype: torch.dtype,
    again: Callable[[], dict[str, Tensor]],
    terms: dict[str, Tensor],
) -> dict[str, float]:
    """By result, the part of the allowed error that it uses.

    Where float32 seems to be over the rule, plain torch's error is that of several orders of summation: of a few
    numbers, that of one order may be 0 by chance.

    Args:
        actual: what is judged.
        plain: the formula in plain torch, in the dtype.
        golden: the same in float64.
        dtype: of the call.
        again: computes `plain`.
        terms: of the gradients whose terms cancel, as `excess` takes them.
    """

    def judged(plain: dict[str, Tensor]) -> dict[str, float]:
        return {n: excess(t, plain[n], golden[n], dtype, terms.get(n)) for n, t in actual.items()}

    ratios = judged(plain)
    if dtype == torch.float32 and any(1 < ratio < float("inf") for ratio in ratios.values()):
        ratios = judged(plain_in_any_order(again, golden, MORE_ORDERS))
    return ratios
