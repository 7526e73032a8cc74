"""Linear layers that use oneDNN for float32 on a CPU where MKL or OpenBLAS, torch's own choice, are slower."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastattn import torch_compat

ONEDNN_MIN_WEIGHTS = 1 << 20  # below, a oneDNN call of one row costs more than it saves
# The least for shapes that repeat, as in steps of generation: the kernel that oneDNN makes for a shape is used again.
REPEATED_MIN_ROWS, REPEATED_MIN_PRODUCTS = 4, 1 << 20
REPEATED_MOST_ROWS = 32  # more are those of a prompt, whose number may not come again

Sources = tuple["Tensor | None", ...]


class _Recipe(NamedTuple):
    """How a tensor was made: function(*sources), as long as none of them was changed in place since."""

    result: weakref.ref[Tensor]
    function: Callable[..., Tensor]
    sources: Sources
    versions: list[int | None]  # of the result and the sources


class _Last(threading.local):
    """A thread's last remade tensor: a layer takes it before the next one is made, so one is enough to keep."""

    recipe: _Recipe | None = None


_last = _Last()


class Linear(nn.Linear):
    """torch.nn.Linear with its arguments and results, computed by oneDNN for float32 on a CPU where that is faster."""

    def forward(self, input: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        return linear(input, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, repeated: bool = False) -> Tensor:
    """x @ weight.T + bias, (..., I) x (O, I) -> (..., O); repeated: calls with these shapes will come many times.

    float32 on a CPU goes to oneDNN, the kernel that torch.compile would use: decoding multiplies one row per sequence,
    where BLAS libraries use a single thread or slow kernels, and not every CPU's vector instructions. So do the three
    products of training, whose backward makes x again from what `remade` names instead of keeping it. Where MKL uses
    all vector instructions, shapes that may not repeat stay with it (`torch_compat.large_linear`).
    """
    if torch_compat.has_onednn_linear() and _suits_onednn(x, weight, repeated):
        if torch.is_grad_enabled() and _any_requires_grad(x, weight, bias):
            out: Tensor = _OneDnnLinear.apply(x, weight, bias, *_recipe_of(x))
            return out
        # MKL reads a weight for one row fastest, where it is made for the CPU
        several = x.numel() > weight.shape[1]
        if (
            repeated
            and x.numel() <= REPEATED_MOST_ROWS * weight.shape[1]
            and (several or not torch_compat.has_mkl_on_intel())
        ):
            return torch_compat.onednn_linear(x, weight, bias)
        return torch_compat.large_linear(x, weight, bias)
    return F.linear(x, weight, bias)


def remade(function: Callable[..., Tensor], *sources: Tensor | None) -> Tensor:
    """function(*sources) as the input of linear layers, which save only the sources and recompute it in their backward.

    The function has to give the same values every time. Other users of the result still save it, and so do layers that
    come after another call, or after a change in place.
    """
    result = function(*sources)
    if (
        torch.is_grad_enabled()
        and result.is_cpu
        and result.requires_grad
        and recorded_by_autograd_alone(result)
    ):
        versions = _versions(result, *sources)
        _last.recipe = _Recipe(weakref.ref(result, _forget), function, sources, versions)
    return result


def _recipe_of(x: Tensor) -> tuple[Any, ...]:
    """The function that makes x and its sources; None and x where it cannot be made again."""
    recipe = _last.recipe
    if recipe is not None and recipe.result() is x:
        versions = _versions(x, *recipe.sources)
        if versions == recipe.versions and versions[0] is not None:
            return recipe.function, *recipe.sources
    return None, x


def _versions(*tensors: Tensor | None) -> list[int | None]:
    return [None if tensor is None else torch_compat.version_of(tensor) for tensor in tensors]


def _forget(result: weakref.ref[Tensor]) -> None:
    """Let the sources of a freed tensor go."""
    if _last.recipe is not None and _last.recipe.result is result:
        _last.recipe = None


class _OneDnnLinear(torch.autograd.Function):
    """x @ weight.T + bias; the backward recomputes x as function(*sources), or saves x if there is no function."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        function: Callable[..., Tensor] | None,
        *sources: Tensor | None,
    ) -> Tensor:
        ctx.function = function
        ctx.save_for_backward(weight, *sources)
        return torch_compat.large_linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        weight, *sources = ctx.saved_tensors
        product = (
            _matmul if torch.is_grad_enabled() else torch_compat.product
        )  # which has no derivative itself
        rows = dout.reshape(-1, dout.shape[-1])
        dx = dweight = dbias = None
        if ctx.needs_input_grad[0]:
            dx = product(rows, weight.mT).view(*dout.shape[:-1], weight.shape[1])
        if ctx.needs_input_grad[1]:
            x = sources[0] if ctx.function is None else ctx.function(*sources)
            dweight = product(rows.mT, x.reshape(-1, x.shape[-1]).mT)
        if ctx.needs_input_grad[2]:
            dbias = rows.sum(0)
        return (dx, dweight, dbias, None, *(None for _ in sources))


def _matmul(x: Tensor, weight: Tensor) -> Tensor:
    return x @ weight.mT


def _any_requires_grad(*tensors: Tensor | None) -> bool:
    return any(tensor is not None and tensor.requires_grad for tensor in tensors)


def plainly_on_cpu(x: Tensor, weight: Tensor) -> bool:
    """Whether a product with a weight, or a norm's, may run as a CPU kernel that only autograd records."""
    return (
        recorded_by_autograd_alone(x)
        and x.is_cpu
        and weight.is_cpu
        and type(weight) in (Tensor, nn.Parameter)
        and without_transforms(x, weight)
    )


def without_transforms(*tensors: Tensor) -> bool:
    """Whether neither a torch.func transform nor forward-mode AD is at work on them."""
    return not torch_compat.transforms_active(tensors) and not (
        torch.is_grad_enabled() and torch_compat.dual_level_entered()
    )


def _suits_onednn(x: Tensor, weight: Tensor, repeated: bool) -> bool:
    return (
        plainly_on_cpu(x, weight)  # first: under tracing, comparing sizes adds a guard
        and x.dtype == weight.dtype == torch.float32
        and x.dim() >= 2
        and x.numel() > 0
        and x.shape[-1] == weight.shape[1]  # F.linear refuses anything else
        and (
            weight.numel() >= ONEDNN_MIN_WEIGHTS
            or (products := x.numel() * weight.shape[0]) >= torch_compat.ONEDNN_MIN_PRODUCTS
            or (
                repeated
                and products >= REPEATED_MIN_PRODUCTS
                and x.numel() >= REPEATED_MIN_ROWS * weight.shape[1]
            )
        )
    )


def recorded_by_autograd_alone(x: Tensor) -> bool:
    """Whether nothing but autograd sees the calls on a tensor."""
    return runs_eagerly(x) and not torch.is_autocast_enabled("cpu")


def runs_eagerly(x: Tensor) -> bool:
    """Whether nothing but autograd and autocast sees the calls on a tensor."""
    return (
        not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()  # type: ignore[attr-defined]
        and type(x) is Tensor
        and not torch_compat.dispatch_mode_active()  # FlopCounterMode and its like know F.linear only
    )
