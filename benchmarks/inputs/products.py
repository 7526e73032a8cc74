"""The products with a model's weights, which every library has to compute: a floor below a call of the model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from measure.protocols import Step, Tensors
from report import figures

PRODUCTS = figures.FLOOR + "weight-products"
MOST_ROWS = 2048  # of a product, so that its result stays small


@dataclass(frozen=True)
class Product:
    """A weight (O, I) that `rows` rows are multiplied with, `times` times in a call."""

    weight: Tensor
    rows: int
    times: int = 1


def matrices(module: torch.nn.Module) -> list[Tensor]:
    """The weights of a module's products."""
    return [parameter.detach() for parameter in module.parameters() if parameter.dim() == 2]


def products_step(products: Iterable[Product], kind: str | None = None, *, training: bool = False) -> Step:
    """A step that computes all products in their order; in training also those of the gradients of both factors.

    kind: "int8" for weights that are rounded to 8 bits before the step; None for the weights' own dtype.
    """
    from fastattn.nn.linear import linear
    from fastattn.nn.rows import rows_of

    calls = []
    inputs: dict[tuple[int, int], Tensor] = {}
    for product in products:
        weight, sizes = product.weight, [MOST_ROWS] * (product.rows // MOST_ROWS)
        sizes += [product.rows % MOST_ROWS] if product.rows % MOST_ROWS else []
        multiply = rows_of(weight, None, kind) if kind else None
        for rows in sizes:
            for width in weight.shape if training else weight.shape[1:]:
                inputs.setdefault((rows, width), torch.randn(rows, width).to(weight.device, weight.dtype))
            calls.append((weight, multiply, rows, product.times))

    def step() -> Tensors:
        out = None
        with torch.no_grad():
            for weight, multiply, rows, times in calls:
                x = inputs[rows, weight.shape[1]]
                for _ in range(times):
                    out = linear(x, weight) if multiply is None else multiply(x)
                    if training:
                        dout = inputs[rows, weight.shape[0]]
                        linear(dout, weight.mT)
                        out = linear(dout.mT, x.mT)
        assert out is not None
        return {"out": out}

    return step
