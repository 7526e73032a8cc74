"""Softmax in torch operations: torch's own kernel on blocks of rows, so nothing of the input's size is made twice."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from fastattn.spec import SoftmaxCall, SoftmaxSpec, accumulation_dtype

BLOCK_ELEMENTS = {"cpu": 2**17}  # a block stays in a core's cache between the passes over it
OTHER_BLOCK_ELEMENTS = 2**26  # elsewhere few launches count more

Index = tuple[slice, ...]


def softmax_tiles(spec: SoftmaxSpec) -> str:
    """How the rows are cut."""
    return f"torch's softmax on blocks of {block_elements(spec.device)} elements"


def softmax_fwd(spec: SoftmaxSpec, call: SoftmaxCall) -> Tensor:
    """exp(scale * x) over its sum along a dimension, or the logarithm; constant where masked."""
    x, dim = call.x, call.dim
    out = torch.empty_like(x, dtype=call.dtype)
    if x.numel() == 0:
        return out
    if call.scale == 1.0 and call.mask is None and not call.causal and call.dtype == x.dtype:
        _whole(x, out, dim, call.log)
        _constant_where_unseen(x, out, dim, call.log)
        return out
    mask = None if call.mask is None else call.mask.expand(x.shape)
    for block in blocks_of(out, dim, block_elements(spec.device)):
        scores = x[block].to(accumulation_dtype(x.dtype)) * call.scale
        visible = None if mask is None else mask[block]
        if call.causal:
            below = _causal(block, x)
            visible = below if visible is None else visible & below
        if visible is not None:
            scores.masked_fill_(~visible, -torch.inf)
        probs = scores.log_softmax(dim) if call.log else scores.softmax(dim)
        _constant_where_unseen(scores, probs, dim, call.log)
        out[block] = probs
    return out


def softmax_bwd(
    spec: SoftmaxSpec, dout: Tensor, out: Tensor, dim: int, scale: float, dtype: torch.dtype
) -> Tensor:
    """scale * out * (dout - sum(out * dout)), in log scale * (dout - exp(out) * sum(dout)); 0 where out is constant."""
    dx = torch.empty_like(out, dtype=dtype)
    derivative = torch._log_softmax_backward_data if spec.log else torch._softmax_backward_data
    constant = -torch.inf if spec.log else 0.0
    for block in blocks_of(out, dim, block_elements(spec.device)):
        rows = out[block]
        cotangent = torch.where(rows != constant, dout[block], 0)
        part = derivative(cotangent, rows, dim, rows.dtype)
        dx[block] = part if scale == 1.0 else part * scale
    return dx


def block_elements(device: str) -> int:
    """How many elements a block may have."""
    return BLOCK_ELEMENTS.get(device, OTHER_BLOCK_ELEMENTS)


def blocks_of(tensor: Tensor, dim: int, limit: int) -> Iterator[Index]:
    """Indices that cut a tensor into blocks of at most `limit` elements, in memory order, never along `dim`.

    A block is one row at least, whatever its length.
    """
    steps = list(tensor.shape)
    size = tensor.numel()
    if size == 0:
        return
    for axis in sorted((a for a in range(tensor.dim()) if a != dim), key=tensor.stride, reverse=True):
        if size <= limit:
            break
        inner = size // steps[axis]
        steps[axis] = max(1, limit // inner)
        size = inner * steps[axis]
    ranges = [
        [slice(start, min(start + step, length)) for start in range(0, length, step)]
        for length, step in zip(tensor.shape, steps)
    ]
    yield from itertools.product(*ranges)


def _whole(x: Tensor, out: Tensor, dim: int, log: bool) -> None:
    """Torch's kernel on the whole tensor, its dimensions taken in the order in which `out` lies in memory."""
    order = sorted(range(x.dim()), key=out.stride, reverse=True)
    kernel = torch.ops.aten._log_softmax.out if log else torch.ops.aten._softmax.out
    kernel(x.permute(order), order.index(dim), False, out=out.permute(order))


def _constant_where_unseen(scores: Tensor, result: Tensor, dim: int, log: bool) -> None:
    """Rows whose scores are all -inf come out of torch as NaN: they are the constant 0, -inf in log."""
    suspects = result.select(dim, 0).isnan()
    if suspects.any():
        unseen = suspects & (scores.amax(dim) == -torch.inf)
        result.masked_fill_(unseen.unsqueeze(dim), -torch.inf if log else 0.0)


def _causal(block: Index, x: Tensor) -> Tensor:
    """Which entries of a block lie on or below the diagonal that ends in the bottom right corner."""
    rows, columns = (
        torch.arange(length, device=x.device)[part] for length, part in zip(x.shape[-2:], block[-2:])
    )
    return columns <= rows[:, None] + (x.shape[-1] - x.shape[-2])
