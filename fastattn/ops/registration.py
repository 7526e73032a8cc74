"""What the registration of every op shares: inputs saved whole, gradients handed out by position, no None results."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import Any

import torch
from torch import Tensor


def own_precision(tensor: Tensor) -> AbstractContextManager[Any]:
    """Autocast off for a tensor's device: operands are cast before an op, what follows chooses its own precision."""
    device = tensor.device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()


def in_own_precision(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """`kernel` with autocast off for the device of its first tensor."""

    @wraps(kernel)
    def run(*args: Any) -> Any:
        with own_precision(next(arg for arg in args if isinstance(arg, Tensor))):
            return kernel(*args)

    return run


def save_inputs(ctx: Any, inputs: tuple[Any, ...], results: Sequence[Tensor]) -> None:
    """Keep every input of an op, and some of its results, for its backward."""
    ctx.set_materialize_grads(False)
    ctx.inputs = tuple(None if isinstance(arg, Tensor) else arg for arg in inputs)
    ctx.tensor_positions = tuple(i for i, arg in enumerate(inputs) if isinstance(arg, Tensor))
    ctx.save_for_backward(*(inputs[i] for i in ctx.tensor_positions), *results)


def saved(ctx: Any) -> tuple[list[Any], tuple[Tensor, ...]]:
    """The inputs and the results that `save_inputs` kept."""
    inputs, tensors = list(ctx.inputs), ctx.saved_tensors
    for position, tensor in zip(ctx.tensor_positions, tensors):
        inputs[position] = tensor
    return inputs, tensors[len(ctx.tensor_positions) :]


def wanted_or_empty(
    grads: Iterable[Tensor | None], needs: Iterable[bool], like: Tensor
) -> tuple[Tensor, ...]:
    """Ops return tensors only: a gradient nobody asked for is an empty one."""
    return tuple(grad if grad is not None and need else like.new_empty(0) for grad, need in zip(grads, needs))


def at_positions(
    length: int, positions: Iterable[int], grads: Iterable[Tensor | None], needs: Iterable[bool]
) -> list[Tensor | None]:
    """The result of a backward: `grads` at the inputs they belong to where needed, None elsewhere."""
    result: list[Tensor | None] = [None] * length
    for position, grad, need in zip(positions, grads, needs):
        if need:
            result[position] = grad
    return result


def schema_of(fields: Iterable[Any], mutated: Iterable[str] = ()) -> str:
    """The schema of a call dataclass's fields, in order; `mutated` names the tensors an op writes to."""
    kinds = {
        "Tensor": "Tensor",
        "Tensor | None": "Tensor?",
        "str": "str",
        "int": "SymInt",
        "float": "float",
        "bool": "bool",
    }
    aliases = dict(zip(mutated, "abcdef"))
    arguments = []
    for field in fields:
        alias = f"({aliases[field.name]}!)" if field.name in aliases else ""
        arguments.append(f"{kinds[str(field.type)]}{alias} {field.name}")
    return ", ".join(arguments)
