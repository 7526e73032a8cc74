"""Products of a few rows with a weight, as decoding makes them: packed 16-bit and int8 weights, and fixed blocks.

A product of one row per sequence is bound by reading the weight: a narrower weight, in the order in which the kernel
reads it, makes it faster. Packed weights are copies, kept as long as the weight they were made from.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from fastattn import torch_compat
from fastattn.nn.linear import linear
from fastattn.nn.rows_table import FASTEST

# Block sizes for which a row's product has the same bits at any place of the block; other dtypes go row by row.
INVARIANT_ROWS = {torch.float32: 4, torch.bfloat16: 4}
# In float32 smaller weights stay in the caches, and a call for the packed one costs more than it saves.
PACK_MIN_WEIGHTS = {torch.float32: 1 << 19, torch.bfloat16: 0}
INT8_LEVELS = 127  # of weights, and of activations on CPUs whose sums of 8-bit products do not saturate
INT8_ROWS = 256  # at a time, so that temporaries stay in the cache
SAFE_LEVELS = 63  # of activations on other CPUs: the sum of two products of 7 and 8 bits fits 16 bits

ALIGNMENT = 64  # bytes, of a new tensor on a CPU
# Elements: a multiple of what torch's vectorised loops take at a time, for each half of a gated row too.
LOOP_STEP = 128
UNSPLIT_ELEMENTS = 32768  # from which on torch splits elementwise work between threads

# Elements of a temporary that is made at a time where it need not be whole: the C library takes larger ones from the
# system anew each time, and their pages are cleared.
PART_ELEMENTS = 1 << 22

Rows = Callable[[Tensor], Tensor]  # (N, I) -> (N, O)


class Elementwise(NamedTuple):
    """An elementwise function of rows that follows a product, and oneDNN's names of it, see `packed_linear`."""

    function: Rows
    fused: tuple[str, str] | None = None


Choice = tuple[tuple["int | None", str], ...]  # (most rows or None for any number, name in PRODUCTS)

_packs: WeakIdKeyDictionary = WeakIdKeyDictionary()  # weight -> {kind: (version, packed weight)}


def rows_of(
    weight: Tensor,
    bias: Tensor | None,
    kind: str | None = None,
    *,
    once: bool = False,
    then: Elementwise | None = None,
) -> Rows:
    """The fastest product of rows with a weight (O, I) on its device: x -> then(x @ weight.T + bias).

    Which is the fastest for how many rows is measured and kept in `rows_table.py`.

    Args:
        kind: "int8" for weights of 8 bits; None for the weight's own dtype.
        once: the product may be the only one, as for a prompt. In float32 a packed copy, which takes the time of about
            20 products of one row, then does not pay.
        then: what follows; None = nothing.
    """
    if kind == "int8":
        return _followed(Int8Rows(weight, bias), then)
    if not weight.is_cpu or (once and weight.dtype == torch.float32):
        return _followed(_linear(weight, bias), then)
    choice = choice_for(torch_compat.instructions(), weight.dtype)
    if len(choice) == 1:
        return _product(choice[0][1], weight, bias, then)
    made: dict[str, Rows] = {}  # once they are used: to pack a weight takes time and memory

    def product(x: Tensor) -> Tensor:
        name = next(name for most, name in choice if most is None or x.shape[0] <= most)
        if name not in made:
            made[name] = _product(name, weight, bias, then)
        return made[name](x)

    return product


def _product(name: str, weight: Tensor, bias: Tensor | None, then: Elementwise | None) -> Rows:
    """One of PRODUCTS, with what follows in the same kernel where that can."""
    if then is not None and then.fused is not None and name == "packed" and _packs_pay(weight):
        return _packed(weight, bias, then.fused)
    return _followed(PRODUCTS[name](weight, bias), then)


def _followed(product: Rows, then: Elementwise | None) -> Rows:
    return product if then is None else lambda x: then.function(product(x))


def choice_for(instructions: str, dtype: torch.dtype) -> Choice:
    """The line of the table for a CPU and a dtype.

    For a CPU that was not measured: that of the same instructions by another maker; else packed weights in bfloat16,
    torch's own products in other dtypes.
    """
    of_cpu = FASTEST.get(instructions) or FASTEST.get(instructions.partition(",")[0], {})
    measured = of_cpu.get(str(dtype).removeprefix("torch."))
    if measured is not None:
        return measured
    return ((None, "packed" if dtype == torch.bfloat16 else "linear"),)


def _linear(weight: Tensor, bias: Tensor | None) -> Rows:
    return lambda x: linear(x, weight, bias, repeated=True)


def _packed(weight: Tensor, bias: Tensor | None, then: tuple[str, str] = ("none", "")) -> Rows:
    """The product with a weight packed in oneDNN's order, where `_packs_pay`, and what follows in oneDNN's names."""
    if not _packs_pay(weight):
        return _linear(weight, bias)
    pack = _kept(weight, "packed", torch_compat.pack_linear)
    return lambda x: torch_compat.packed_linear(x, pack, bias, then)


def _packs_pay(weight: Tensor) -> bool:
    """Whether oneDNN has a product for a weight's dtype, and packing it pays."""
    least = PACK_MIN_WEIGHTS.get(weight.dtype)
    return least is not None and weight.numel() >= least and torch_compat.has_packed_linear(weight.dtype)


def _one_by_one(weight: Tensor, bias: Tensor | None) -> Rows:
    """A product of each row: float16 has a fast one of one row only."""
    return lambda x: (
        torch.cat([F.linear(row, weight, bias) for row in x.split(1)])
        if len(x) > 1
        else F.linear(x, weight, bias)
    )


def _vectors(weight: Tensor, bias: Tensor | None) -> Rows:
    """The product of the weight with each row as a vector: torch has a faster one in bfloat16 on some processors."""

    def product(x: Tensor) -> Tensor:
        rows = x.unbind()
        if not rows:
            return F.linear(x, weight, bias)
        found = [torch.mv(weight, row) if bias is None else torch.addmv(bias, weight, row) for row in rows]
        return found[0][None] if len(found) == 1 else torch.stack(found)

    return product


PRODUCTS: dict[str, Callable[[Tensor, Tensor | None], Rows]] = {
    "linear": _linear,  # torch's, or oneDNN's where that is faster
    "packed": _packed,
    "one by one": _one_by_one,
    "vectors": _vectors,
}


class Int8Rows:
    """x @ weight.T + bias with both rounded to 8 bits: one scale for each row of x, one for each row of the weight.

    Sums are exact, so a row's result does not depend on the other rows. An element of x is off by at most 1/254 of its
    row's largest magnitude (1/126 on CPUs without 8-bit dot products), and so is one of the weight.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.bias, self.outputs = bias, weight.shape[0]
        self.levels = INT8_LEVELS if torch_compat.has_int8_dot_products() else SAFE_LEVELS
        self.product: Callable[[Tensor], Tensor] = _kept(weight, "int8", _int8_product)

    def __call__(self, x: Tensor) -> Tensor:
        """(N, I) -> (N, O), in x's dtype."""
        if x.shape[0] <= INT8_ROWS:
            return self._product(x)
        out = x.new_empty(x.shape[0], self.outputs)
        for rows, place in zip(x.split(INT8_ROWS), out.split(INT8_ROWS)):
            place.copy_(self._product(rows))
        return out

    def _product(self, x: Tensor) -> Tensor:
        wide = x.float()
        scale = wide.abs().amax(-1, keepdim=True).div_(self.levels)  # faster than vector_norm of order inf
        scale.clamp_(min=torch.finfo(torch.float32).tiny)
        out = self.product(wide / scale).mul_(scale)
        if self.bias is not None:
            out.add_(self.bias)
        return out.to(x.dtype)


def round_to_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A weight (O, I) as numbers of 8 bits (O, I) and a float32 scale for each output (O, 1)."""
    wide = weight.detach().float()
    scale = wide.abs().amax(1, keepdim=True).div_(INT8_LEVELS).clamp_(min=torch.finfo(torch.float32).tiny)
    return (wide / scale).round_().to(torch.int8), scale


def _int8_product(weight: Tensor) -> Callable[[Tensor], Tensor]:
    """The product of rows of integers, in float32, with a weight that is rounded to 8 bits per output."""
    rounded, scales = round_to_int8(weight)
    scale = scales[:, 0]
    if weight.is_cpu and torch_compat.has_int8_linear():
        pack = torch_compat.pack_int8_linear(rounded, scale)
        return lambda x: torch_compat.int8_linear(x, pack)
    exact = rounded.double()  # sums of products of integers are exact in float64
    return lambda x: F.linear(x.round().double(), exact).mul_(scale).float()


class InBlocks:
    """A product in blocks of a fixed number of rows, the last filled with zeros.

    A kernel's summation order may depend on the number of rows but not on a row's place in a block, so a row's bits do
    not depend on the other rows: benchmarks/rows.py measures which numbers have that property.
    """

    def __init__(self, product: Rows) -> None:
        self.product = product

    def __call__(self, x: Tensor) -> Tensor:
        """(N, I) -> (N, O)."""
        count, size = x.shape[0], INVARIANT_ROWS.get(x.dtype, 1)
        if count == 0:
            return self.product(x)
        block = F.pad(x, (0, 0, 0, -count % size))
        parts = [self.product(aligned(part)) for part in block.split(size)]
        return (parts[0] if len(parts) == 1 else torch.cat(parts))[:count]


def aligned(x: Tensor) -> Tensor:
    """x, or a copy, in memory that begins where a new tensor's does: some kernels go by the alignment."""
    return x if x.is_contiguous() and x.data_ptr() % ALIGNMENT == 0 else x.clone()


def in_parts(function: Rows, x: Tensor, width: int) -> Tensor:
    """function(x) of rows (N, I); on a CPU for so many at a time that `width` numbers of each are PART_ELEMENTS at
    most."""
    count = math.ceil(x.shape[0] * width / PART_ELEMENTS) if x.is_cpu else 1
    if count <= 1:
        return function(x)
    size = math.ceil(x.shape[0] / count)
    result: Tensor | None = None
    for start in range(0, x.shape[0], size):
        part = function(x[start : start + size])
        if result is None:
            result = part.new_empty(x.shape[0], part.shape[1])
        result[start : start + size] = part
    assert result is not None
    return result


def by_row(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """An elementwise function of rows (N, I), whose bits do not depend on the other rows.

    The vectorised loop and its remainder may round differently. Rows of whole steps of that loop leave no remainder, as
    long as they are so few that torch does not split them between threads; others go one at a time.
    """

    def apply(x: Tensor) -> Tensor:
        width = x.shape[1]
        step = 1 if width % LOOP_STEP else max(1, (UNSPLIT_ELEMENTS - 1) // max(width, 1))
        if x.shape[0] <= step:
            return function(x)
        return torch.cat([function(rows) for rows in x.split(step)])

    return apply


def _kept(weight: Tensor, kind: str, make: Callable[[Tensor], Any]) -> Any:
    """make(weight), cached until the weight changes or is freed."""
    version = torch_compat.version_of(weight)
    key = (version, weight.data_ptr(), weight.dtype)
    made = _packs.setdefault(weight, {})
    if kind not in made or version is None or made[kind][0] != key:
        made[kind] = (key, make(weight))
    return made[kind][1]


def forget(module: nn.Module) -> None:
    """Drop the copies of a module's weights; a write through `weight.data` makes them stale unnoticed."""
    for weight in module.parameters():
        _packs.pop(weight, None)
