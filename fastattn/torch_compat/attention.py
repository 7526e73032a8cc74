"""torch's own attention: its public function, its fused kernels, and the ops that can be overridden."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .lookup import find

_sdpa: Any = find("torch._C._nn.scaled_dot_product_attention") or F.scaled_dot_product_attention


def torch_sdpa() -> Callable[..., Tensor]:
    """torch's own scaled_dot_product_attention, even if torch.nn.functional's was replaced.

    Fallback: the function in torch.nn.functional when fastattn was imported.
    """
    function: Callable[..., Tensor] = _sdpa
    return function


# torch's Python binding takes a third less time than the op, for a single query half of all
_cpu_flash_fwd = find("torch._scaled_dot_product_flash_attention_for_cpu") or find(
    "torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default"
)
_cpu_flash_bwd = find("torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default")


def has_cpu_flash_attention(*, backward: bool) -> bool:
    """Whether torch has its fused CPU attention, and the backward of it.

    Fallback: False, and attention on a CPU is blockwise softmax in torch operations.
    """
    return _cpu_flash_fwd is not None and (_cpu_flash_bwd is not None or not backward)


def cpu_flash_kernel() -> Any:
    """The kernel that `cpu_flash_attention` calls, for callers in a hot path; only where there is one."""
    return _cpu_flash_fwd


def cpu_flash_attention(
    query: Tensor, key: Tensor, value: Tensor, causal: bool, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """(out, lse) by torch's fused CPU attention; the mask is additive, causal to the top left."""
    result: tuple[Tensor, Tensor] = _cpu_flash_fwd(
        query, key, value, 0.0, causal, attn_mask=mask, scale=scale
    )
    return result


def cpu_flash_attention_backward(
    dout: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor,
    causal: bool, mask: Tensor | None, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dq, dk, dv) of `cpu_flash_attention`."""
    result: tuple[Tensor, Tensor, Tensor] = _cpu_flash_bwd(
        dout, query, key, value, out, lse, 0.0, causal, attn_mask=mask, scale=scale
    )
    return result


_flash_op = find("torch.ops.aten._scaled_dot_product_flash_attention.default")
_flash_backward_op = find("torch.ops.aten._scaled_dot_product_flash_attention_backward.default")


def override_flash_attention(
    dispatch_key: str, forward: Callable[..., Any], backward: Callable[..., Any]
) -> torch.library.Library:
    """Override torch's flash-attention ops on a dispatch key with these functions, until the result is released.

    Fallback: a RuntimeError, since there is nothing to override.
    """
    if _flash_op is None or _flash_backward_op is None:
        raise RuntimeError(f"torch {torch.__version__} has no flash-attention ops that fastattn knows")
    library = torch.library.Library("aten", "IMPL", dispatch_key)
    for op, kernel in ((_flash_op, forward), (_flash_backward_op, backward)):
        library.impl(op, kernel, dispatch_key, allow_override=True)
    return library
