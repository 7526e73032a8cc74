"""Linear layers that use oneDNN for float32 inference on a CPU, where torch itself would use MKL or OpenBLAS."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastattn import torch_compat

ONEDNN_MIN_WEIGHTS = 1 << 20  # below, what a oneDNN call costs more than it saves


class Linear(nn.Linear):
    """torch.nn.Linear, computed by `linear`."""

    def forward(self, input: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        return linear(input, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias, (..., I) x (O, I) -> (..., O).

    Without gradients, float32 on a CPU goes to oneDNN, the kernel that torch.compile would use: decoding multiplies
    one row per sequence, where BLAS libraries use a single thread or slow kernels.
    """
    if torch_compat.has_onednn_linear() and _suits_onednn(x, weight):
        return torch_compat.onednn_linear(x, weight, bias)
    return F.linear(x, weight, bias)


def _suits_onednn(x: Tensor, weight: Tensor) -> bool:
    return (
        not torch.jit.is_tracing()  # type: ignore[attr-defined]
        and weight.numel() >= ONEDNN_MIN_WEIGHTS
        and not torch.is_grad_enabled()
        and x.is_cpu
        and weight.is_cpu
        and x.dtype == weight.dtype == torch.float32
        and type(weight) in (Tensor, nn.Parameter)
        and type(x) is Tensor
        and x.dim() >= 2
        and x.numel() > 0
        and x.shape[-1] == weight.shape[1]  # anything else is F.linear's to refuse
        and not torch.compiler.is_compiling()
        and not torch_compat.dispatch_mode_active()  # FlopCounterMode and its like know F.linear only
        and not torch.is_autocast_enabled("cpu")
        and not torch_compat.transforms_active((x, weight))
    )
