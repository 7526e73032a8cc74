"""The CUDA backend: the compiled extension, chosen by "auto" only where it was measured to be faster."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fastattn import extension
from fastattn.backends import layout
from fastattn.backends.cuda import attention as cuda_attention
from fastattn.backends.cuda.attention import attention_bwd, attention_fwd, varlen_bwd, varlen_fwd
from fastattn.backends.cuda.attention import attention_tiles as tiles
from fastattn.backends.cuda.softmax import (
    cross_entropy_bwd,
    cross_entropy_fwd,
    linear_cross_entropy_bwd,
    linear_cross_entropy_fwd,
    softmax_bwd,
    softmax_fwd,
    softmax_tiles,
)
from fastattn.extension.archs import MIN_ARCH, covers
from fastattn.spec import AttentionSpec, SoftmaxSpec

__all__ = [
    "DTYPES",
    "LAYOUT",
    "MEASURED_ROWS",
    "MIN_ARCH",
    "NAME",
    "READS_NO_VALUES",
    "attention_bwd",
    "attention_fwd",
    "cross_entropy_bwd",
    "cross_entropy_fwd",
    "linear_cross_entropy_bwd",
    "linear_cross_entropy_fwd",
    "softmax_bwd",
    "softmax_fwd",
    "softmax_tiles",
    "tiles",
    "varlen_bwd",
    "varlen_fwd",
    "why_not",
    "why_not_auto",
]

NAME = "cuda"
LAYOUT = layout.UNEXPANDED
READS_NO_VALUES = True
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True, slots=True)
class MeasuredRows:
    """Rows for which this backend was measured to be no slower than Triton."""

    arch: int
    backward: bool
    min_columns: int
    max_columns: int


MEASURED_ROWS: tuple[
    MeasuredRows, ...
] = ()  # nothing has been measured yet, so "auto" never chooses this backend


def why_not(spec: AttentionSpec | SoftmaxSpec) -> str | None:
    """Why this backend can't run `spec`, or None."""
    if spec.device != "cuda":
        return f"device {spec.device!r} is not a CUDA device"
    if spec.arch is not None and spec.arch < MIN_ARCH:
        return f"compute capability {spec.arch / 10} is below {MIN_ARCH / 10}"
    if spec.dtype not in DTYPES:
        return f"dtype {spec.dtype} is not one of float16, bfloat16, float32"
    found = extension.state()
    if found.info is None:
        return found.reason
    if spec.arch is not None and not covers(found.info.archs, spec.arch):
        built = ", ".join(found.info.archs)
        return f"the extension is built for {built}, this GPU is {spec.arch / 10}; {extension.ADVICE}"
    if isinstance(spec, AttentionSpec):
        return cuda_attention.why_not(spec, found.info.archs)
    return None


def why_not_auto(spec: AttentionSpec | SoftmaxSpec) -> str | None:
    """Why "auto" passes this backend over although it could run `spec`, or None."""
    if isinstance(spec, AttentionSpec):
        return cuda_attention.why_not_auto(spec)
    if not spec.unit_columns:
        return "elements of a row are not adjacent in memory, and Triton reads such rows without a copy"
    rows = [row for row in MEASURED_ROWS if row.arch == spec.arch and row.backward == spec.backward]
    if not rows:
        return "not yet measured on this GPU; backend='cuda' or FASTATTN_BACKEND=cuda runs it"
    if not any(row.min_columns <= spec.columns <= row.max_columns for row in rows):
        return f"not measured to be faster than Triton for rows of {spec.columns}"
    return None
