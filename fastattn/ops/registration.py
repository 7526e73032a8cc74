"""Registration of ops with torch: dispatch, fakes and autograd."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fastattn import backends, torch_compat
from fastattn.ops import composite
from fastattn.ops.autocast import autocasts, own_precision
from fastattn.spec import accumulation_dtype
from fastattn.strides import empty_in_order

Kernel = Callable[..., Any]


def define(
    library: torch.library.Library,
    name: str,
    schema: str,
    kernel: Kernel,
    fake: Kernel,
    gradient: tuple[Kernel, Kernel] | None = None,
    function: str | None = None,
) -> Kernel:
    """Register an op, its fake implementation and its gradient; return the function that calls it.

    The function calls the kernel directly where it can bypass the dispatcher. Dispatch costs as much as attention of
    one query, and the dispatcher's autograd several times that.

    gradient: keep(ctx, inputs, output), and backward(ctx, *grads) -> a gradient or None for every input.
    function: of backends that runs the op, where that has another name.
    """

    def run(*args: Any) -> Any:
        if autocasts(args[0].device.type):
            with own_precision(args[0]):
                return kernel(*args)
        return kernel(*args)

    library.define(f"{name}{schema}")
    library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastattn::{name}", checked(fake, function or name), lib=library)
    op = recorded = getattr(torch.ops.fastattn, name).default
    if gradient is not None:
        keep, backward = gradient
        torch.library.register_autograd(f"fastattn::{name}", backward, setup_context=keep, lib=library)

        def forward(ctx: Any, *args: Any) -> Any:
            output = run(*args)
            keep(ctx, args, output)
            return output

        methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
        recorder: Any = type(name, (torch.autograd.Function,), methods)
        recorded = recorder.apply

    def call(*args: Any) -> Any:
        if not torch_compat.can_bypass_dispatcher(args):
            return op(*args)
        if torch.is_grad_enabled() and torch_compat.any_requires_grad(args):
            return recorded(*args)
        return run(*args)

    return call


def checked(fake: Kernel, function: str) -> Kernel:
    """The fake of an op that refuses a named backend, the op's last argument, that has no `function` for it.

    A trace runs the fakes of all it records, those of a backward too, before anything is launched.
    """

    def refusing(*args: Any) -> Any:
        backends.check_has(args[-1], function)
        return fake(*args)

    return refusing


def out_and_lse_fake(*args: Any) -> tuple[Tensor, Tensor]:
    """The fake of an op on query (B, H, Sq, D), its first argument, and values (..., Dv), its third: (out, lse)."""
    query, value = args[0], args[2]
    batch, num_heads, seqlen_q, _ = query.shape
    out = empty_in_order(query, (batch, num_heads, seqlen_q, value.shape[3]))
    return out, query.new_empty((batch, num_heads, seqlen_q), dtype=accumulation_dtype(query.dtype))


def define_with_gradient(
    library: torch.library.Library,
    names: tuple[str, str],
    schema: str,
    results: Sequence[str],
    differentiable: dict[str, int],
    *,
    keeps_results: bool,
    forward: Kernel,
    forward_fake: Kernel,
    backward: Kernel,
    composed: Callable[[list[Any]], tuple[Tensor, ...]],
) -> Kernel:
    """Register an op, the op of its backward, and the gradients of both; return the function that calls the first.

    Args:
        names: of the op and of its backward.
        schema: of the op's inputs; it also takes the name of a backend, last.
        results: names of the tensors it returns. The backward takes a gradient of each, the results where
            `keeps_results`, the inputs, which gradients are needed, and the backend.
        differentiable: names and positions of the inputs that have gradients, in the order the backward returns them.
        composed: the results from the inputs in differentiable torch operations, for second derivatives.
    """
    positions = tuple(differentiable.values())
    kept = [f"Tensor {name}" for name in results] if keeps_results else []
    upstream_grads = [f"Tensor{'?' if i else ''} d{name}" for i, name in enumerate(results)]
    returned = ", ".join(f"Tensor {name}" for name in results)
    lead = len(upstream_grads) + len(kept)  # what a backward takes before the inputs

    def backward_fake(*args: Any) -> tuple[Tensor, ...]:
        *inputs, needs, _ = args[lead:]
        sources = {name: inputs[position] for name, position in differentiable.items()}
        return wanted_or_empty(_fake_grads(sources, needs), needs, inputs[positions[0]])

    def keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        save_inputs(ctx, inputs, output if keeps_results else ())

    def gradient(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        inputs, kept_results = saved(ctx)
        if all(grad is None for grad in grads):
            return (None,) * len(inputs)
        first, *others = grads
        first = torch.zeros_like(kept_results[0]) if first is None else first
        *op_inputs, backend = inputs
        needs = [ctx.needs_input_grad[position] for position in positions]
        found = call_backward(first, *others, *kept_results, *op_inputs, needs, backend)
        return tuple(at_positions(len(inputs), positions, found, needs))

    def second_gradient(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        inputs, _ = saved(ctx)
        *op_inputs, _, _ = inputs[lead:]

        def again(*tensors: Tensor | None) -> tuple[Tensor, ...]:
            replaced = list(op_inputs)
            for position, tensor in zip(positions, tensors):
                replaced[position] = tensor
            return composed(replaced)

        sources = [op_inputs[position] for position in positions]
        of_upstream_grads, of_inputs = composite.second_derivative(
            again, sources, inputs[: len(upstream_grads)], grads
        )
        found = (*of_upstream_grads, *of_inputs)
        at = (*range(len(upstream_grads)), *(lead + position for position in positions))
        return tuple(at_positions(len(inputs), at, found, (True,) * len(found)))

    call_backward = define(
        library,
        names[1],
        f"({', '.join((*upstream_grads, *kept))}, {schema}, bool[] needs, str backend)"
        f" -> ({', '.join(['Tensor'] * len(positions))})",
        backward,
        backward_fake,
        (keep_inputs, second_gradient),
    )
    return define(
        library,
        names[0],
        f"({schema}, str backend) -> ({returned})",
        forward,
        forward_fake,
        (keep, gradient),
        None if names[0].endswith("_fwd") else f"{names[0]}_fwd",
    )


def _fake_grads(sources: dict[str, Tensor], needs: Iterable[bool]) -> Iterator[Tensor | None]:
    """Gradients of operands have the operands' memory order; all others are contiguous."""
    for (name, source), need in zip(sources.items(), needs):
        if not need:
            yield None
        elif name in ("query", "key", "value"):
            yield empty_in_order(source, tuple(source.shape))
        else:
            yield source.new_empty(source.shape)


def keep_inputs(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """Keep every input of an op for its backward."""
    save_inputs(ctx, inputs, ())


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
    """Ops return tensors only: a gradient that is not needed is an empty tensor."""
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
