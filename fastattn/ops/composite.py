"""Attention in differentiable torch operations, for transforms and second derivatives.

It materialises the scores, which a warning says once for each reason.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastattn import backends, reference, torch_compat
from fastattn.ops.arguments import saturated
from fastattn.ops.autocast import own_precision
from fastattn.reference.attention import masked_scores, weights_from_lse, without_padding
from fastattn.spec import AttentionCall, VarlenCall, accumulation_dtype


def transform_in_use(args: tuple[Any, ...]) -> str | None:
    """The active transform that the fused op does not see, if any: the op would drop its tangents silently."""
    if torch_compat.transforms_active(args):
        return "a torch.func transform"
    if torch_compat.dual_level_entered():
        if torch.compiler.is_compiling():  # a traced tensor does not tell whether it is a dual
            return "forward-mode AD"
        tensors = (arg for arg in args if isinstance(arg, Tensor))
        if any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors):
            return "forward-mode AD"
    return None


def reference_options(call: AttentionCall) -> dict[str, Any]:
    """The options of `reference.attention` that mean the same as `call`."""
    return {
        **shared_options(call),
        "mask": call.mask,
        "bias": None if call.bias is None else saturated(call.bias, call.query.dtype),
        "segment_ids": None if call.query_segments is None else (call.query_segments, call.key_segments),
        "key_lengths": call.key_lengths,
    }


def shared_options(call: AttentionCall | VarlenCall) -> dict[str, Any]:
    """The options that packed sequences have too."""
    return {
        "causal": {"none": False, "bottom_right": True, "top_left": "top_left"}[call.causal],
        "window": (call.window_left, call.window_right),
        "alibi_slopes": call.alibi_slopes,
        "softcap": call.softcap or None,
        "sinks": call.sinks,
        "dropout_p": call.dropout_p,
        "dropout_seed": call.dropout_seed,
        "scale": call.scale,
    }


_SCORES = "the scores, O(Sq * Sk) memory"


def refuse_named(backend: str, transform: str, materialised: str = _SCORES) -> None:
    """Refuse a named kernel, which cannot run under a transform; warn that others take the composite path."""
    backend = backends.resolve(backend)
    if backend not in ("auto", "torch"):
        raise RuntimeError(
            f"backend={backend!r} cannot run this call: {transform} is active; use 'auto' or 'torch'"
        )
    backends.warn_once(f"fastattn materialises {materialised}: {transform} is active")


def attention(
    args: tuple[Any, ...], return_lse: bool, return_weights: bool | str
) -> Tensor | tuple[Tensor, ...]:
    """The call in differentiable torch operations, for transforms a fused kernel has no rule for."""
    call = AttentionCall(*args)
    out, lse = out_and_lse(call)
    results = [out]
    if return_lse:
        results.append(lse)
    if return_weights:
        results.append(weights(call, lse, return_weights == "mean"))
    return results[0] if len(results) == 1 else tuple(results)


def out_and_lse(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """(out, lse) of a call in the accumulation dtype, out cast back."""
    with own_precision(call.query):
        out, lse = reference.attention(*_operands(call), **reference_options(call), return_lse=True)
        return out.to(call.query.dtype), lse


def weights(call: AttentionCall, lse: Tensor, mean: bool) -> Tensor:
    """The weights of a call whose lse is given."""
    options = reference_options(call)
    dropout = options.pop("dropout_p"), options.pop("dropout_seed")
    options.pop("sinks")
    with own_precision(call.query):
        hiding = {name: options[name] for name in ("mask", "bias", "segment_ids", "key_lengths")}
        query, key, _ = without_padding(*_operands(call), **hiding)
        scores = masked_scores(query, key, **options)
        result = weights_from_lse(scores, lse, *dropout)
        return (result.mean(dim=1) if mean else result).to(call.query.dtype)


def _operands(call: AttentionCall) -> tuple[Tensor, Tensor, Tensor]:
    dtype = accumulation_dtype(call.query.dtype)
    return call.query.to(dtype), call.key.to(dtype), call.value.to(dtype)


def second_derivative(
    forward: Callable[..., tuple[Tensor, ...]],
    inputs: Sequence[Tensor | None],
    upstream_grads: Sequence[Tensor | None],
    grad_outputs: Sequence[Tensor | None],
    materialised: str = _SCORES,
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """Differentiate a first derivative: the backward of a backward op.

    Args:
        forward: differentiable function of `inputs` with one result per upstream gradient.
        inputs, upstream_grads: what the backward op was given; None where absent.
        grad_outputs: the incoming gradient of each input's gradient; None where there is none.
        materialised: what this costs, for the warning.

    Returns:
        Gradients of the upstream gradients and of the inputs, None where nothing flows.
    """
    backends.warn_once(f"fastattn materialises {materialised}: a second derivative was asked for")
    create_graph = torch.is_grad_enabled()
    device = next(t for t in inputs if t is not None)
    with torch.enable_grad(), own_precision(device):
        fresh_inputs = [_fresh(t) for t in inputs]
        fresh_upstream_grads = [_fresh(t) for t in upstream_grads]
        results = forward(*fresh_inputs)
        used = [(r, c) for r, c in zip(results, fresh_upstream_grads) if c is not None]
        wanted = [(t, g) for t, g in zip(fresh_inputs, grad_outputs) if t is not None and g is not None]
        nothing: tuple[list[Tensor | None], list[Tensor | None]] = (
            [None] * len(upstream_grads),
            [None] * len(inputs),
        )
        if not used or not wanted:
            return nothing
        first = torch.autograd.grad(
            [r for r, _ in used],
            [t for t, _ in wanted],
            [c for _, c in used],
            create_graph=True,
            allow_unused=True,
        )
        pairs = [(f, g) for f, (_, g) in zip(first, wanted) if f is not None]
        if not pairs:
            return nothing
        sources = [t for t in (*fresh_upstream_grads, *fresh_inputs) if t is not None]
        second = iter(
            torch.autograd.grad(
                [f for f, _ in pairs],
                sources,
                [g for _, g in pairs],
                create_graph=create_graph,
                allow_unused=True,
            )
        )
    return (
        [None if t is None else next(second) for t in fresh_upstream_grads],
        [None if t is None else next(second) for t in fresh_inputs],
    )


def _fresh(tensor: Tensor | None) -> Tensor | None:
    """A new tensor object with the same values: q and k may be one tensor but need two gradients."""
    if tensor is None:
        return None
    return tensor.view_as(tensor) if tensor.requires_grad else tensor.detach().requires_grad_()
