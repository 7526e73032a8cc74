"""Export of models to programs that run without fastattn: torch.export, ONNX, torch.jit.trace and AOTInductor."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ContextDecorator
from threading import Lock
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from fastattn.ops import plain
from fastattn.ops.softmax import composed as composed_softmax
from fastattn.spec import AttentionCall, KVCacheCall, VarlenCall


class plain_torch(ContextDecorator):
    """A context in which calls of fastattn compute with torch's own operations, or with `plain_torch(False)` never do.

    Without it, calls do so where `torch.export.export` (and with it `torch.onnx.export` and AOTInductor) or
    `torch.jit.trace` records them: the artefact then needs no fastattn where it is loaded. Enter it for other tracers,
    `make_fx` say, or for `torch.compile` with a backend that knows torch's operations only. Under
    `plain_torch(False)` recorded programs keep the fused ops, `torch.ops.fastattn.*`, and fastattn has to be imported
    where they run; `decompositions` takes them out again.

    Results are the same up to rounding, gradients included; the guarantees for rows that see nothing and for NaN in
    padding hold. `backend=` is ignored, and dropout without a seed draws from torch's generator like torch's dropout.

    A context manager and a decorator, re-entrant; it counts for the whole process, all threads included.

    Args:
        enabled: False for the fused ops, whoever records.
    """

    def __init__(self, enabled: bool = True) -> None:
        if not isinstance(enabled, bool):
            raise TypeError(f"enabled: got {type(enabled).__name__}, needs a bool")
        self.enabled = enabled

    def __enter__(self) -> plain_torch:
        with _lock:
            plain.chosen.append(self.enabled)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with _lock:  # threads may leave in another order than they entered; the latest choice counts
            last = len(plain.chosen) - 1 - plain.chosen[::-1].index(self.enabled)
            del plain.chosen[last]


_lock = Lock()


def decompositions() -> dict[Any, Callable[..., Any]]:
    """The forward ops of attention and softmax in torch's operations, for `ExportedProgram.run_decompositions`.

    An exported program holds these ops where it was exported under `plain_torch(False)` (and by torch 2.9 with
    `strict=True`). `program.run_decompositions(decompositions())` gives one that runs without fastattn, and that
    `torch.onnx.export` takes. The losses and the ops of a backward have none.
    """
    ops: Any = torch.ops.fastattn
    return {
        ops.attention_fwd.default: _attention,
        ops.attention_weights.default: _weights,
        ops.varlen_fwd.default: _varlen,
        ops.kv_cache_fwd.default: _kv_cache,
        ops.softmax_fwd.default: _softmax,
    }


def _attention(*args: Any) -> tuple[Tensor, Tensor]:
    """Two calls: where nothing reads the lse, what remains is torch's own attention."""
    call = AttentionCall(*args[:-1])
    out = plain.attention(call, any_seed=False)
    assert isinstance(out, Tensor)
    return out, plain.attention(call, lse=True, any_seed=False)[1]


def _weights(lse: Tensor, *args: Any) -> Tensor:
    *call_args, mean, _ = args
    return plain.attention(AttentionCall(*call_args), weights="mean" if mean else True, any_seed=False)[1]


def _varlen(*args: Any) -> tuple[Tensor, Tensor]:
    call = VarlenCall(*args[:-1])
    out: Tensor = plain.attention_varlen(call)
    return out, plain.attention_varlen(call, lse=True)[1]


def _kv_cache(*args: Any) -> tuple[Tensor, Tensor]:
    result: tuple[Tensor, Tensor] = plain.attention_kv_cache(KVCacheCall(*args[:-1]), lse=True)
    return result


def _softmax(*args: Any) -> Tensor:
    *call, _ = args
    return composed_softmax(*call)
