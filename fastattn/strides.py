"""Strides and addresses of tensors: memory order, adjacent columns, 16-byte alignment and offsets beyond 32 bits."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

ALIGNMENT = 16  # bytes: the widest load of a thread, and what TMA needs of addresses and strides

# Layouts of the rows of a tensor, each a case of the one before.
UNALIGNED = 0  # any
ALIGNED = 1  # every row begins at a multiple of 16 bytes
DESCRIBABLE = 2  # and a TMA descriptor can describe them: nothing is empty or expanded


def row_class(tensor: Tensor) -> int:
    """How the rows of a tensor (..., rows, columns) lie for a kernel, which gets a dense copy where columns are not
    adjacent.

    The stride of a batch of one counts for DESCRIBABLE, although it is never used: a sequence cut out of a batch is
    then loaded, and rounded, as in the batch.
    """
    size, width = tensor.element_size(), tensor.shape[-1]
    if tensor.is_contiguous() and not (width * size % ALIGNMENT or tensor.data_ptr() % ALIGNMENT):  # most are
        first = tensor.stride(0)
        return DESCRIBABLE if first > 0 and not first * size % ALIGNMENT and tensor.numel() else ALIGNED
    shape, strides = tensor.shape, tensor.stride()
    if strides[-1] != 1 and width != 1:
        if width * size % ALIGNMENT == 0:
            return DESCRIBABLE if tensor.numel() else ALIGNED
        return ALIGNED if tensor.numel() <= width else UNALIGNED
    if tensor.data_ptr() % ALIGNMENT:
        return UNALIGNED
    found = DESCRIBABLE if tensor.numel() else ALIGNED
    if strides[0] <= 0 or strides[0] * size % ALIGNMENT:
        found = ALIGNED
    for stride, length in zip(strides[:-1], shape):
        if length > 1:
            if stride * size % ALIGNMENT:
                return UNALIGNED
            if stride <= 0:
                found = ALIGNED
    return found


def has_adjacent_columns(tensor: Tensor) -> bool:
    """Whether neighbours in the last dimension are neighbours in memory."""
    return tensor.stride(-1) == 1 or tensor.shape[-1] == 1


def with_adjacent_columns(tensor: Tensor) -> Tensor:
    """`tensor`, copied in its memory order only if its last dimension is not innermost."""
    # `has_adjacent_columns` without a call, as every operand of every call passes here
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else dense(tensor)


def is_expanded(tensor: Tensor) -> bool:
    """Whether elements of a dimension share memory, as after `expand`."""
    return any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape))


def dense(tensor: Tensor) -> Tensor:
    """A dense copy of `tensor` in its memory order, with the last dimension innermost."""
    return empty_in_order(tensor, tuple(tensor.shape)).copy_(tensor)


def empty_in_order(like: Tensor, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised dense tensor of `shape` with the memory order of `like`'s dimensions.

    The last dimension stays innermost, so a (B, S, H, D)-backed query gives a (B, S, H, Dv)-backed output.
    """
    outer = sorted(range(like.dim() - 1), key=like.stride, reverse=True)
    order = [*outer, like.dim() - 1]
    storage = like.new_empty([shape[dim] for dim in order], dtype=dtype)
    return storage.permute([order.index(dim) for dim in range(like.dim())])


def in_order(tensor: Tensor, like: Tensor) -> Tensor:
    """`tensor` in the memory order of `like`, copied only where it has another."""
    if tensor.is_contiguous() and like.is_contiguous():
        return tensor
    shape = tuple(tensor.shape)
    if tensor.stride() == strides_in_order(like.stride(), shape):
        return tensor
    return empty_in_order(like, shape).copy_(tensor)


@lru_cache(maxsize=1024)
def strides_in_order(of_like: tuple[int, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
    """The strides of `empty_in_order` for a tensor of these strides and a shape."""
    outer = sorted(range(len(shape) - 1), key=of_like.__getitem__, reverse=True)
    strides, step = [0] * len(shape), 1
    for dim in (len(shape) - 1, *reversed(outer)):
        strides[dim] = step
        step *= max(shape[dim], 1)
    return tuple(strides)


def passes_32_bits(*tensors: Tensor | None) -> bool:
    """Whether some element lies 2**31 or more elements from the first of its tensor."""
    for tensor in tensors:
        if tensor is None or (tensor.is_contiguous() and tensor.numel() < 2**31):
            continue
        # in a smaller storage no element lies that far, whatever the strides
        if tensor.untyped_storage().nbytes() >= 2**31 and last_offset(tensor) >= 2**31:
            return True
    return False


def last_offset(tensor: Tensor) -> int:
    """How many elements the last element of a tensor lies behind its first."""
    return sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()) if size > 1)
