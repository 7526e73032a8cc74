"""Linear layers that multiply weights and activations of 8 bits in eval mode."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastattn.nn.linear import Linear, without_transforms
from fastattn.nn.rows import forget, rows_of


class Int8Linear(Linear):
    """A linear layer that multiplies 8-bit numbers in eval mode, see `Int8Rows`.

    Its weight stays as it is, for training and for saving; the rounded copy is made at the first use and again where
    the weight has changed. Gradients in eval mode are those of the product without rounding. In training mode, under
    torch.compile and in torch.func's transforms the product itself is not rounded either.
    """

    def forward(self, input: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        if self.training or torch.compiler.is_compiling() or not without_transforms(input, self.weight):
            return super().forward(input)
        rows = input.reshape(-1, self.in_features)
        # a loaded model's parameters require gradients, whether or not its caller wants any
        out: Tensor = (
            _Rounded.apply(rows, self.weight, self.bias)
            if torch.is_grad_enabled()
            else rows_of(self.weight, self.bias, "int8")(rows)
        )
        return out.view(*input.shape[:-1], self.out_features)


class _Rounded(torch.autograd.Function):
    """The product of 8-bit numbers, with the gradients of x @ weight.T + bias."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return rows_of(weight, bias, "int8")(x)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        dx = dout @ weight.to(dout.dtype) if ctx.needs_input_grad[0] else None
        dweight = (dout.mT @ x).to(weight.dtype) if ctx.needs_input_grad[1] else None
        return dx, dweight, dout.sum(0).to(weight.dtype) if ctx.needs_input_grad[2] else None


def check_kind(name: str, kind: str | None) -> None:
    """Raise ValueError, which begins with the argument's name, unless kind is "int8" or None."""
    if kind not in (None, "int8"):
        raise ValueError(f"{name}: got {kind!r}, needs 'int8' or None")


def in_numbered_layer(name: str) -> bool:
    """Whether a module or parameter is in one of a model's stacked layers, which have numbers: "h.3.mlp.c_fc"."""
    return any(part.isdigit() for part in name.split("."))


def quantize_linears(model: nn.Module, kind: str | None) -> int:
    """Turn the `Linear` layers in a model's numbered layers into `Int8Linear`, or back with None; returns their number.

    Raises:
        ValueError: kind is neither "int8" nor None, or a layer is of a subclass of `Linear`, as with adapters.
    """
    check_kind("kind", kind)
    stacked = [(name, module) for name, module in model.named_modules() if in_numbered_layer(name)]
    for name, module in stacked:
        if kind is not None and isinstance(module, Linear) and type(module) not in (Linear, Int8Linear):
            raise ValueError(
                f"kind: got {kind!r}, but {name} is a {type(module).__name__}, needs {Linear.__name__}; merge or "
                f"detach adapters first"
            )
    forget(model)
    before, after = (Linear, Int8Linear) if kind else (Int8Linear, Linear)
    chosen = [module for _, module in stacked if type(module) is before]
    for module in chosen:
        module.__class__ = after
    return len(chosen)
