"""One timed call of a bench: its forward, its backward or both, on inputs by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from measure.protocols import REFUSED, CannotRun, Judgement, Step, Tensors

Call = Callable[..., Any]  # takes the inputs in their order, returns out


def results_of(call: Call, inputs: Mapping[str, Tensor], dout: Tensor | None, direction: str) -> Tensors:
    """out, and with "forward+backward" the gradient of each input under the input's name.

    "forward" runs under no_grad, "forward-grad" records the graph of a backward.
    """
    if direction == "forward":
        with torch.no_grad():
            return {"out": call(*inputs.values())}
    out = call(*inputs.values())
    if direction == "forward-grad":
        return {"out": out.detach()}
    upstream = None if dout is None else dout.to(out.dtype)
    grads = torch.autograd.grad(out, tuple(inputs.values()), upstream)
    return {"out": out.detach(), **dict(zip(inputs, grads))}


def step_of(call: Call, inputs: Mapping[str, Tensor], dout: Tensor | None, direction: str) -> Step:
    """The step that a bench times."""
    return lambda: results_of(call, inputs, dout, direction)


def leaves_of(
    tensors: Mapping[str, Tensor], direction: str, dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Fresh leaves with the tensors' values, that require grad where the direction has a backward."""
    wants_grad = direction != "forward"
    return {n: t.detach().to(dtype or t.dtype).requires_grad_(wants_grad) for n, t in tensors.items()}


def judge_by(
    formula: Call,
    few: Mapping[str, Tensor],
    dout: Tensor | None,
    direction: str,
    dtype: torch.dtype,
    part: Callable[[str, Tensor], Tensor],
    over: str,
    names: Sequence[str] | None = None,
) -> Judgement:
    """The formula's results on `few` inputs in float64 and in `dtype`; `names` are those compared (None = all)."""
    if names is not None and set(names) == {"out"}:
        direction = "forward"

    def run(precision: torch.dtype) -> Tensors:
        upstream = None if dout is None else dout.to(precision)
        found = results_of(formula, leaves_of(few, direction, precision), upstream, direction)
        return {n: t for n, t in found.items() if names is None or n in names}

    return Judgement(part, run(torch.float64), partial(run, dtype), over)


def unless_refused(call: Callable[[], Any]) -> None:
    """Make the call once without gradients; a named backend's refusal becomes the provider's reason."""
    try:
        with torch.no_grad():
            call()
    except RuntimeError as refusal:
        if REFUSED not in str(refusal):
            raise
        raise CannotRun(str(refusal)) from None


def our_backends() -> list[str]:
    """A provider for each of our backends that has kernels; "fastattn" alone is the one the call chooses."""
    from fastattn import backends

    return [f"fastattn-{backend.NAME}" for backend in backends.BACKENDS if backend.NAME != "torch"]
