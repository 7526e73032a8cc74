"""torch's own doors: `scaled_dot_product_attention` replaced while a context lasts."""

from __future__ import annotations

from contextlib import ContextDecorator
from types import TracebackType
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from fastattn.backends import warn_once
from fastattn.ops import arguments
from fastattn.ops.sdpa import scaled_dot_product_attention
from fastattn.spec import MAX_HEAD_DIM


class sdpa_override(ContextDecorator):
    """While entered, `torch.nn.functional.scaled_dot_product_attention` is fastattn's, whoever calls it.

    A context manager and a decorator; re-entrant, and what was there before is back after an exception, too. It
    exchanges the attribute for the whole process, all threads included. Reached: every call that looks the function up
    in `torch.nn.functional`, so models written in plain torch, timm, diffusers, transformers' "sdpa", and
    `nn.MultiheadAttention` and the encoder layers wherever they call it (training, or without their inference fast
    path, and with need_weights=False). Not reached: `from torch.nn.functional import scaled_dot_product_attention`
    done before, calls of `torch.ops.aten`, TorchScript, and the inference fast path of torch's encoder layers
    (`swap_attention` reaches that). Compiled code follows into the context and out again, except for calls inside
    `nn.MultiheadAttention`: they stay what they were when compiled.

    Nested tensors and head dims over 256, which fastattn refuses, go to the function that was there before, with one
    warning for each reason.

    Args:
        backend: "auto" or the name of a fastattn backend.
    """

    def __init__(self, backend: str = "auto") -> None:
        arguments.check_backend(backend)
        self.backend = backend
        self._previous: list[Any] = []

    def __enter__(self) -> sdpa_override:
        previous, backend = F.scaled_dot_product_attention, self.backend

        def override(
            query: Tensor,
            key: Tensor,
            value: Tensor,
            attn_mask: Tensor | None = None,
            dropout_p: float = 0.0,
            is_causal: bool = False,
            scale: float | None = None,
            enable_gqa: bool = False,
        ) -> Tensor:
            if (reason := _why_torchs(query, key, value)) is not None:
                warn_once(f"sdpa_override leaves this call to torch: {reason}")
                return previous(
                    query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
                )
            return scaled_dot_product_attention(
                query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, backend=backend
            )

        self._previous.append(previous)
        F.scaled_dot_product_attention = override
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        F.scaled_dot_product_attention = self._previous.pop()


def _why_torchs(query: Tensor, key: Tensor, value: Tensor) -> str | None:
    """Why fastattn has to leave a call that torch can run."""
    tensors = [t for t in (query, key, value) if isinstance(t, Tensor)]
    if any(t.is_nested for t in tensors):
        return "nested tensors"
    if any(t.dim() > 0 and t.shape[-1] > MAX_HEAD_DIM for t in tensors):
        return f"a head dim over {MAX_HEAD_DIM}"
    return None
