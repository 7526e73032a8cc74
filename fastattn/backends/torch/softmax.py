"""Softmax in torch operations: torch's own kernel on blocks of rows, so nothing of the input's size is made twice."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from fastattn import torch_compat
from fastattn.spec import SoftmaxCall, SoftmaxSpec, accumulation_dtype
from fastattn.visibility import distances

BLOCK_ELEMENTS = {"cpu": 2**20}  # a block stays in the last-level cache between the passes over it
OTHER_BLOCK_ELEMENTS = 2**26  # on other devices fewer launches matter more
PRODUCT_DTYPES = (torch.float32, torch.float64)  # whose products of vectors are faster than sums

Index = tuple[slice, ...]


def softmax_tiles(spec: SoftmaxSpec) -> str:
    """The size of the blocks of rows, in a line."""
    return f"torch's softmax on blocks of {block_elements(spec.device)} elements"


def softmax_fwd(spec: SoftmaxSpec, call: SoftmaxCall) -> Tensor:
    """exp(scale * x) over its sum along a dimension, or the logarithm; constant where masked."""
    x, dim = call.x, call.dim
    out = torch.empty_like(x, dtype=call.dtype)
    if x.numel() == 0:
        return out
    if _is_torchs(call):
        _whole(x, out, dim, call.log)
        _constant_where_hidden(x, out, dim, call.log)
        return out
    mask = None if call.mask is None else call.mask.expand(x.shape)
    scratch: dict[torch.Size, Tensor] = {}
    for block in blocks_of(out, dim, _limit(spec, out, dim)):
        scores = _scratch(scratch, out[block], accumulation_dtype(x.dtype))
        scores.copy_(x[block])  # scaled after it is widened
        if call.scale != 1.0:
            keeps_infinity = call.scale >= torch.finfo(scores.dtype).tiny  # below, -inf turns to NaN or inf
            hidden = None if keeps_infinity else scores == -torch.inf
            scores.mul_(call.scale)
            if hidden is not None:
                scores.masked_fill_(hidden, -torch.inf)
        if mask is not None:
            scores.masked_fill_(~mask[block], -torch.inf)
        if call.causal:
            scores.masked_fill_(_above_diagonal(block, x), -torch.inf)
        torch_compat.softmax(out[block], scores, dim, log=call.log)
        _constant_where_hidden(scores, out[block], dim, call.log)
    return out


def softmax_bwd(
    spec: SoftmaxSpec, dout: Tensor, out: Tensor, dim: int, scale: float, dtype: torch.dtype
) -> Tensor:
    """scale * out * (dout - sum(out * dout)), in log scale * (dout - exp(out) * sum(dout)); 0 where out is constant."""
    dx = torch.empty_like(out, dtype=dtype)
    if out.numel() == 0:
        return dx
    if not spec.log and scale == 1.0 and dtype == out.dtype:
        if out.is_contiguous() and dx.is_contiguous():
            torch_compat.softmax_backward(dx, dout, out, dim, log=False)
        else:
            order = _memory_order(out)
            y, dy = out.permute(order), dout.permute(order)
            torch_compat.softmax_backward(dx.permute(order), dy, y, order.index(dim), log=False)
        if _finite(dx, dim):  # NaN or inf that meets a constant 0 turns its whole row to NaN
            return dx
    constant = -torch.inf if spec.log else 0.0
    nothing = out.new_zeros(())
    scratch: dict[torch.Size, Tensor] = {}
    for block in blocks_of(out, dim, _limit(spec, out, dim)):
        rows, part = out[block], dx[block]
        upstream_grad = _scratch(scratch, rows, out.dtype)
        torch.where(rows != constant, dout[block], nothing, out=upstream_grad)
        torch_compat.softmax_backward(part, upstream_grad, rows, dim, log=spec.log)
        if scale != 1.0:
            part.mul_(scale)
    if not _finite(dx, dim):
        dx.masked_fill_(out == constant, 0.0)
    return dx


def softmax_fwd_plan(spec: SoftmaxSpec, call: SoftmaxCall) -> Callable[[Tensor, None], Tensor] | None:
    """What `softmax_fwd` does for calls of these strides where that is torch's kernel on the whole tensor, and no more.

    Kernels leave caches cold, where a Python function costs many times what it does in a loop.
    """
    x, dim = call.x, call.dim
    if not (_is_torchs(call) and x.is_contiguous() and x.numel()):
        return None
    function, constant = (torch.log_softmax, -torch.inf) if call.log else (torch.softmax, 0.0)
    by_product = x.dim() == 2 and x.dtype in PRODUCT_DTYPES

    def run(x: Tensor, mask: None = None) -> Tensor:
        out = function(x, dim)
        first = out.select(dim, 0)  # as `_of_first_entries`
        total = (first.dot(first) if by_product else first.sum()).item()
        if total != total:  # as `_constant_where_hidden` says
            out.masked_fill_(x == -torch.inf, constant)
        return out

    return run


def softmax_bwd_plan(
    spec: SoftmaxSpec, dim: int, scale: float, dtype: torch.dtype
) -> Callable[[Tensor, Tensor], Tensor | None] | None:
    """The same of `softmax_bwd`; its function gives None where more is to do."""
    kernel = torch_compat.softmax_gradient_kernel()
    if kernel is None or spec.log or scale != 1.0 or dtype != spec.dtype:
        return None

    def run(dout: Tensor, out: Tensor) -> Tensor | None:
        if not out.is_contiguous() or out.numel() == 0:
            return None
        dx: Tensor = kernel(dout, out, dim, dtype)
        first = dx.select(dim, 0)  # as `_of_first_entries`
        total = (first.dot(first) if dtype in PRODUCT_DTYPES and first.dim() == 1 else first.sum()).item()
        return dx if math.isfinite(total) else None

    return run


def _is_torchs(call: SoftmaxCall) -> bool:
    """Whether torch's kernel gives the result, but for what -inf hides."""
    return call.scale == 1.0 and call.mask is None and not call.causal and call.dtype == call.x.dtype


def _scratch(kept: dict[torch.Size, Tensor], like: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor of a block's shape and memory order, kept for the next block: fresh memory costs more than softmax."""
    if like.shape not in kept:
        kept[like.shape] = torch.empty_like(like, dtype=dtype)
    return kept[like.shape]


def block_elements(device: str) -> int:
    """The most elements of a block on a device."""
    return BLOCK_ELEMENTS.get(device, OTHER_BLOCK_ELEMENTS)


def _limit(spec: SoftmaxSpec, tensor: Tensor, dim: int) -> int:
    """The most elements of a block: at least a row for each thread, since torch's kernels distribute rows."""
    threads = torch.get_num_threads() if spec.device == "cpu" else 1
    return max(block_elements(spec.device), threads * tensor.shape[dim])


def _memory_order(tensor: Tensor) -> list[int]:
    """The permutation of a dense tensor's dimensions that makes it contiguous."""
    return sorted(range(tensor.dim()), key=tensor.stride, reverse=True)


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
    """Torch's kernel on the whole tensor, with dimensions permuted to the memory order of `out`."""
    if x.is_contiguous() and out.is_contiguous():
        torch_compat.softmax(out, x, dim, log=log)
        return
    order = _memory_order(out)
    torch_compat.softmax(out.permute(order), x.permute(order), order.index(dim), log=log)


def _finite(tensor: Tensor, dim: int) -> bool:
    """Whether the rows' first entries are finite: a NaN or inf anywhere in a row makes its first entry NaN.

    A sum that overflows gives False too, which costs one more pass over the tensor.
    """
    return math.isfinite(_of_first_entries(tensor, dim))


def _of_first_entries(tensor: Tensor, dim: int) -> float:
    """A sum over the rows' first entries that is NaN if one of them is, and finite only if all are.

    The entries lie apart, so fetching their cache lines takes the time: torch's product of vectors does that
    faster than its sum, except in 16 bits.
    """
    first = tensor.select(dim, 0)
    if first.dim() != 1 or first.dtype not in PRODUCT_DTYPES:
        return float(first.sum().item())
    return float(first.dot(first).item())


def _constant_where_hidden(scores: Tensor, result: Tensor, dim: int, log: bool) -> None:
    """Sets hidden entries to 0, or -inf in log, in rows that torch made NaN: those that keep nothing or hold a NaN.

    A NaN in the sum of first entries shows that there are such rows; other rows' are in 0 to 1, or -inf to 0.
    """
    if math.isnan(_of_first_entries(result, dim)):
        result.masked_fill_(scores == -torch.inf, -torch.inf if log else 0.0)


def _above_diagonal(block: Index, x: Tensor) -> Tensor:
    """Which entries of a block lie above the diagonal that ends in the bottom right corner."""
    (first_row, last_row, _), (first, last, _) = (
        part.indices(length) for length, part in zip(x.shape[-2:], block[-2:])
    )
    return distances((first_row, last_row), (first, last), x.shape[-1] - x.shape[-2], x.device) < 0
