"""One gradient for a weight that is both embedding and head: the embedding adds its rows to the head's gradient.

By itself autograd makes a second gradient of the weight's size, zero but for the rows of the tokens that were read.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastattn import torch_compat


def shares_gradient(embedding: nn.Embedding, head: nn.Linear) -> bool:
    """Whether a `TiedWeight` can be used: both share the weight, and nothing but autograd sees the calls."""
    weight = embedding.weight
    return (
        weight is head.weight
        and type(embedding) is nn.Embedding
        and not torch_compat.has_hooks(embedding)
        and torch.is_grad_enabled()
        and weight.requires_grad
        and type(weight) is nn.Parameter
        and torch_compat.has_graph_task()
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()  # type: ignore[attr-defined]
        and not torch_compat.dispatch_mode_active()
        and not torch_compat.transforms_active((weight,))
        and not torch_compat.dual_level_entered()
    )


class TiedWeight:
    """A weight whose embedding adds its gradient to the head's, within one run of the autograd engine.

    The head's function is made last, so the engine, which runs later functions first, comes to it before the trunk and
    to the embedding after all. A head keeps its gradient, and the engine adds the two, where it comes too late or where
    the run does not come to the embedding: hidden states may be detached from it.
    """

    def __init__(self, embedding: nn.Embedding) -> None:
        self.weight = embedding.weight  # (V, E)
        self.padding_idx = embedding.padding_idx  # the row that lookups give no gradient
        self.task: int | None = None  # the engine's run that `grad` is of
        self.grad: Tensor | None = None
        self.taken: int | None = None  # the last run in which the embedding came by
        self.lookup: weakref.ref[Any] | None = None  # the embedding's node, which refers to this

    def embed(self, ids: Tensor) -> Tensor:
        """weight[ids], (..., E)."""
        x: Tensor = _Lookup.apply(ids, self.weight, self)
        return x

    def head(self) -> Tensor:
        """The weight for the head's product; to be called right before it."""
        weight: Tensor = _Head.apply(self.weight, self)
        return weight

    def leave(self, grad: Tensor) -> bool:
        """Hand the head's gradient over to the embedding; False if its backward has run already or will not run."""
        task, node = torch_compat.graph_task(), None if self.lookup is None else self.lookup()
        if self.taken == task or node is None or not torch_compat.will_execute(node):
            return False
        if self.task == task and self.grad is not None:  # the head was used twice
            grad = self.grad + grad
        self.task, self.grad = task, grad
        return True

    def take(self) -> Tensor | None:
        """The head's gradient; one left by an earlier run that did not need the embedding's is dropped."""
        self.taken = torch_compat.graph_task()
        grad, own = self.grad, self.task == self.taken
        self.task = self.grad = None
        return grad if own else None


class _Head(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, tied: TiedWeight) -> Tensor:
        ctx.tied = tied
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None]:
        if torch.is_grad_enabled():  # a graph of the gradient keeps the two apart
            return grad, None
        return (None if ctx.tied.leave(grad) else grad), None


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor, tied: TiedWeight) -> Tensor:
        ctx.tied, ctx.shape = tied, weight.shape
        tied.lookup = weakref.ref(ctx)
        ctx.save_for_backward(ids)
        return F.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[None, Tensor, None]:
        (ids,) = ctx.saved_tensors
        rows = dout.reshape(-1, dout.shape[-1])
        if ctx.tied.padding_idx is not None:
            rows = rows.masked_fill((ids == ctx.tied.padding_idx).reshape(-1, 1), 0.0)
        if torch.is_grad_enabled():
            return None, dout.new_zeros(ctx.shape).index_add(0, ids.flatten(), rows), None
        grad = ctx.tied.take()
        if grad is None:
            grad = dout.new_zeros(ctx.shape)
        return None, grad.index_add_(0, ids.flatten(), rows.to(grad.dtype)), None
