"""torch's kernels of softmax and of its gradient, which write to a given tensor."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .lookup import find

_softmax_gradient_op = find("torch._softmax_backward_data")


def softmax_gradient(dprobs: Tensor, probs: Tensor) -> Tensor:
    """probs * (dprobs - rowsum(probs * dprobs)), along the last dimension.

    Fallback: the formula in torch operations.
    """
    if _softmax_gradient_op is None:
        return _softmax_gradient(dprobs, probs, -1, log=False)
    result: Tensor = _softmax_gradient_op(dprobs, probs, -1, probs.dtype)
    return result


def softmax_gradient_kernel() -> Any:
    """torch's kernel of the gradient of softmax: (dout, out, dim, dtype of the input) -> a new tensor.

    Fallback: None.
    """
    return _softmax_gradient_op


_softmax = find("torch.ops.aten._softmax")
_log_softmax = find("torch.ops.aten._log_softmax")


def softmax(out: Tensor, x: Tensor, dim: int, *, log: bool) -> None:
    """Write softmax, or its logarithm, to `out`; without a copy where that is contiguous.

    Fallback: torch.softmax and torch.log_softmax, one more operator for the dispatcher.
    """
    kernel = _log_softmax if log else _softmax
    function: Any = torch.log_softmax if log else torch.softmax
    if out.is_contiguous() and out.dtype == x.dtype:
        function(x, dim, out=out) if kernel is None else kernel.out(x, dim, False, out=out)
    else:
        out.copy_(function(x, dim) if kernel is None else kernel.default(x, dim, False))


_softmax_bwd = find("torch.ops.aten._softmax_backward_data")
_log_softmax_bwd = find("torch.ops.aten._log_softmax_backward_data")


def softmax_backward(dx: Tensor, dout: Tensor, out: Tensor, dim: int, *, log: bool) -> None:
    """Write the gradient of softmax, or of its logarithm, to `dx`; without a copy where that is contiguous.

    Fallback: the formula in torch operations, with temporaries of the size of `out`.
    """
    kernel = _log_softmax_bwd if log else _softmax_bwd
    if kernel is None:
        dx.copy_(_softmax_gradient(dout, out, dim, log))
    elif dx.is_contiguous() and dx.dtype == dout.dtype:
        kernel.out(dout, out, dim, out.dtype, **{"out" if log else "grad_input": dx})
    else:
        dx.copy_(kernel.default(dout, out, dim, out.dtype))


def _softmax_gradient(dout: Tensor, out: Tensor, dim: int, log: bool) -> Tensor:
    if out.dtype in (torch.float16, torch.bfloat16):  # torch's kernels sum in float32
        dout, out = dout.float(), out.float()
    if log:
        return dout - out.exp() * dout.sum(dim, keepdim=True)
    product = dout * out
    return product - out * product.sum(dim, keepdim=True)
