"""What every check of a device reports, and how near to float64 a result has to be."""

from __future__ import annotations

from typing import Any

import torch
from schema import without_paths
from torch import Tensor

Finding = dict[str, Any]
# Both sides of the rule are rounding errors, and on tensors of a few numbers which is larger is luck: a call over the
# rule is counted, one over it this many times has failed. A wrong kernel is off by orders of magnitude.
SLACK = 4.0


def finding(check: str, status: str, detail: str = "", **more: Any) -> Finding:
    """One result: status is "passed", "failed", "skipped" or "info"."""
    return {"check": check, "status": status, "detail": without_paths(detail)[:400], **more}


def backends_here(device: torch.device) -> list[str]:
    """The backends that can run on the device, the CUDA extension last: a hang there costs what comes after it."""
    from fastattn import backends
    from fastattn.spec import AttentionCall, AttentionSpec

    query = torch.empty(1, 1, 16, 64, device=device, dtype=torch.float16)
    spec = AttentionSpec.of(AttentionCall(query, query, query))
    names = [backend.NAME for backend in backends.BACKENDS if backend.why_not(spec) is None]
    return sorted(names, key=lambda name: name == "cuda")


def excess(actual: Tensor, plain: Tensor, golden: Tensor, dtype: torch.dtype) -> float:
    """max|actual - golden| over what the rule allows, 2 max|plain - golden| + eps(dtype) max|golden|; inf for NaN."""
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
    allowed = 2 * (plain - golden).abs().max().item() + torch.finfo(dtype).eps * golden.abs().max().item()
    return 0.0 if error == 0 else error / allowed if allowed else float("inf")
