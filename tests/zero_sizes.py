"""Empty batches and lengths, and results as torch gives them for those."""

import pytest
import torch
from torch import Tensor

EMBED, HEADS, KV_HEADS, DIM = 24, 4, 2, 8
SIZES = [(0, 3, 5), (2, 0, 5), (2, 3, 0), (0, 0, 5), (2, 0, 0), (0, 3, 0), (0, 0, 0)]  # (B, L, S)
by_sizes = pytest.mark.parametrize("sizes", SIZES, ids=lambda s: "B{} L{} S{}".format(*s))


def randn(*shape, grad=True):
    return torch.randn(shape, dtype=torch.float64, requires_grad=grad)


def backward(results, leaves):
    """The gradients of everything finite in the results; None where a leaf takes no part."""
    total = sum((r[r.isfinite()].sum() for r in results if isinstance(r, Tensor)), torch.zeros(()))
    if not total.requires_grad:
        return [None] * len(leaves)
    return torch.autograd.grad(total, leaves, allow_unused=True)


def same(actual, expected):
    """Equal shapes and values; an absent gradient is one of zeros."""
    assert len(actual) == len(expected)
    for ours, theirs in zip(actual, expected):
        if ours is None or theirs is None:
            present = theirs if ours is None else ours
            assert present is None or not present.any()
        else:
            torch.testing.assert_close(ours, theirs, equal_nan=True)


def run(call, *tensors):
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    results = call(*leaves)
    results = results if isinstance(results, tuple) else (results,)
    return [*results, *backward(results, leaves)]
