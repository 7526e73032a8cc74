"""`attention`: the public call, and its registration as torch ops with fake implementations, gradients and FLOPs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from fastattn import backends
from fastattn.ops import arguments, composite, flops
from fastattn.ops.registration import (
    at_positions,
    in_own_precision,
    save_inputs,
    saved,
    schema_of,
    wanted_or_empty,
)
from fastattn.spec import (
    AttentionCall,
    AttentionGrads,
    AttentionSpec,
    GradsNeeded,
    WeightsGradsNeeded,
    accumulation_dtype,
    empty_in_order,
    with_unit_last_stride,
)

_DIFFERENTIABLE = (
    GradsNeeded._fields
)  # the tensors of a call that can have gradients, in the order ops return them


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    causal: bool | str = False,
    window: tuple[int | None, int | None] | None = None,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    segment_ids: Tensor | tuple[Tensor, Tensor] | None = None,
    key_lengths: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    return_weights: bool | str = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, ...]:
    """softmax(softcap(scale * query @ key.T) + alibi + bias, masked) @ value, fused.

    Args:
        query: (B, H, Sq, D), float16, bfloat16, float32 or float64; any strides. D and Dv are at most 256.
        key: (B, Hkv, Sk, D); Hkv divides H, query head h reads key/value head h // (H // Hkv).
        value: (B, Hkv, Sk, Dv).
        causal: True lets query i see keys j <= i + Sk - Sq (bottom right); "top_left" keys j <= i.
        window: (left, right): query i sees pos(i) - left <= j <= pos(i) + right, where pos(i) is i + Sk - Sq, or i
            under "top_left". None or -1 is unbounded.
        mask: bool, True = attend, broadcastable to (B, H, Sq, Sk).
        bias: float, added to the scores, broadcastable to (B, H, Sq, Sk), differentiable; -inf masks.
        segment_ids: (B, S) integers, or a pair for queries and keys; only equal ids attend, negative ids nothing.
        key_lengths: (B,) integers; keys at or beyond a row's length never influence anything, even if NaN.
        alibi_slopes: (H,) or (B, H), adds -slope * |pos(i) - j|, differentiable.
        softcap: scores become softcap * tanh(score / softcap).
        sinks: (H,), one more score per row that carries no value, differentiable; lse includes it.
        dropout_p: probability of dropping a weight, in [0, 1); rounded to a multiple of 2**-16.
        dropout_seed: int or one-element int64 tensor; the same seed drops the same weights on every backend. None
            draws one from torch's generator.
        scale: factor on query @ key.T, D**-0.5 by default.
        return_lse: also return the log-sum-exp of each row's scores, (B, H, Sq) float32, natural log, differentiable.
        return_weights: also return what multiplies the values, (B, H, Sq, Sk), or its mean over heads, (B, Sq, Sk),
            for "mean"; differentiable. O(Sq * Sk) memory.
        backend: "auto" or the name of one; a named backend that cannot run the call raises its reason.

    Returns:
        out (B, H, Sq, Dv) in the query's dtype and memory order; then lse and weights as asked for. A row that sees
        no key gives out 0, lse -inf (its sink, if it has one) and zero gradients.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
        RuntimeError: the named backend cannot run the call.

    Source: Dao, "FlashAttention-2" (2023); dropout by Philox4x32-10 (Salmon et al., 2011), see `fastattn.philox`.
    """
    args = arguments.call_arguments(
        query, key, value, causal=causal, window=window, mask=mask, bias=bias, segment_ids=segment_ids,
        key_lengths=key_lengths, alibi_slopes=alibi_slopes, softcap=softcap, sinks=sinks, dropout_p=dropout_p,
        dropout_seed=dropout_seed, scale=scale,
    )  # fmt: skip
    arguments.check_backend(backend)
    arguments.check_returned_weights(return_weights)
    if (transform := composite.transform_in_use(args)) is not None:
        _check_values(AttentionCall(*args))
        return composite.attention(args, transform, return_lse, return_weights, backend)
    out, lse = torch.ops.fastattn.attention_fwd(*args, backend)
    results = [out]
    if return_lse:
        results.append(lse)
    if return_weights:
        results.append(torch.ops.fastattn.attention_weights(lse, *args, return_weights == "mean", backend))
    return results[0] if len(results) == 1 else tuple(results)


def explain(
    query: Tensor, key: Tensor, value: Tensor, *, backend: str = "auto", **options: Any
) -> backends.Explanation:
    """Which backend `attention` would use for these arguments, with which tiles, and why not the others.

    Takes the arguments of `attention`; runs nothing. `backward` names the backend of the backward pass where an input
    requires grad. Raises as `attention` does for arguments that do not fit or a named backend that cannot run them.
    """
    options.pop("return_lse", None)
    arguments.check_returned_weights(options.pop("return_weights", False))
    arguments.check_seed(options.get("dropout_seed"))
    if options.get("dropout_seed") is None:
        options["dropout_seed"] = 0  # a call draws one; to explain it must not
    args = arguments.call_arguments(query, key, value, **options)
    arguments.check_backend(backend)
    call = AttentionCall(*args)
    _check_values(call)
    spec = AttentionSpec.of(call)
    chosen = backends.select(spec, backend)
    needs = GradsNeeded(*(_requires_grad(getattr(call, name)) for name in _DIFFERENTIABLE))
    backward = None
    if any(needs):
        backward = backends.select(AttentionSpec.of(call, needs), backend, "attention_bwd").NAME
    return backends.Explanation(
        backend=chosen.NAME,
        tiles=chosen.tiles(spec) if hasattr(chosen, "tiles") else None,
        refusals=tuple(backends.refusals(spec, backend)),
        spec=spec,
        backward=backward,
    )


def _check_values(call: AttentionCall) -> None:
    """What only real data shows, and a CPU shows without a synchronisation."""
    lengths = call.key_lengths
    if lengths is None or lengths.device.type != "cpu" or lengths.numel() == 0:
        return
    if torch._C._functorch.is_functorch_wrapped_tensor(lengths) or torch.compiler.is_compiling():
        return
    shortest, longest = (int(n) for n in torch.aminmax(lengths))
    if shortest < 0 or longest > call.key.shape[2]:
        raise ValueError(
            f"key_lengths: got values from {shortest} to {longest}, needs 0 to {call.key.shape[2]} (the key length)"
        )


def _requires_grad(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.requires_grad


_CALL_NAMES = tuple(field.name for field in fields(AttentionCall))
_POSITIONS = tuple(_CALL_NAMES.index(name) for name in _DIFFERENTIABLE)
_WEIGHTS_POSITIONS = tuple(  # behind lse, which is the first input of the weights
    0 if name == "lse" else 1 + _CALL_NAMES.index(name) for name in WeightsGradsNeeded._fields
)
_CALL_SCHEMA = schema_of(fields(AttentionCall))
_LIBRARY = torch.library.Library("fastattn", "DEF")
_GRADS_SCHEMA = "(" + ", ".join(["Tensor"] * len(_DIFFERENTIABLE)) + ")"

_LIBRARY.define(f"attention_fwd({_CALL_SCHEMA}, str backend) -> (Tensor out, Tensor lse)")
_LIBRARY.define(
    f"attention_bwd(Tensor dout, Tensor? dlse, Tensor out, Tensor lse, {_CALL_SCHEMA}, bool[] needs, str backend)"
    f" -> {_GRADS_SCHEMA}"
)
_LIBRARY.define(f"attention_weights(Tensor lse, {_CALL_SCHEMA}, bool mean, str backend) -> Tensor")
_LIBRARY.define(
    f"attention_weights_bwd(Tensor dweights, Tensor lse, {_CALL_SCHEMA}, bool mean, bool[] needs, str backend)"
    f" -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def _kernel_call(call_args: list[Any]) -> AttentionCall:
    """The call as backends get it: operands whose last stride is 1."""
    query, key, value, *rest = call_args
    return AttentionCall(
        with_unit_last_stride(query), with_unit_last_stride(key), with_unit_last_stride(value), *rest
    )


def _attention_fwd(*args: Any) -> tuple[Tensor, Tensor]:
    *call_args, backend = args
    call = _kernel_call(call_args)
    _check_values(call)
    spec = AttentionSpec.of(call)
    return backends.select(spec, backend).attention_fwd(spec, call)


def _attention_fwd_fake(*args: Any) -> tuple[Tensor, Tensor]:
    query, value = args[0], args[2]
    batch, num_heads, seqlen_q, _ = query.shape
    out = empty_in_order(query, (batch, num_heads, seqlen_q, value.shape[3]))
    return out, query.new_empty((batch, num_heads, seqlen_q), dtype=accumulation_dtype(query.dtype))


def _attention_bwd(
    dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, *args: Any
) -> tuple[Tensor, ...]:
    *call_args, needs, backend = args
    call, needed = _kernel_call(call_args), GradsNeeded(*needs)
    spec = AttentionSpec.of(call, needed)
    run = backends.select(spec, backend, "attention_bwd").attention_bwd
    grads: AttentionGrads = run(spec, call, out, lse, with_unit_last_stride(dout), dlse, needed)
    return wanted_or_empty(grads, needed, call.query)


def _attention_bwd_fake(
    dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, *args: Any
) -> tuple[Tensor, ...]:
    *call_args, needs, _ = args
    call = AttentionCall(*call_args)
    sources = {name: getattr(call, name) for name in _DIFFERENTIABLE}
    return wanted_or_empty(_fake_grads(sources, needs), needs, call.query)


def _attention_weights(lse: Tensor, *args: Any) -> Tensor:
    *call_args, mean, backend = args
    call = _kernel_call(call_args)
    spec = AttentionSpec.of(call)
    return backends.select(spec, backend, "attention_weights_fwd").attention_weights_fwd(
        spec, call, lse, mean
    )


def _attention_weights_fake(lse: Tensor, *args: Any) -> Tensor:
    query, key, mean = args[0], args[1], args[-2]
    batch, num_heads, seqlen_q, _ = query.shape
    heads = () if mean else (num_heads,)
    return query.new_empty((batch, *heads, seqlen_q, key.shape[2]))


def _attention_weights_bwd(dweights: Tensor, lse: Tensor, *args: Any) -> tuple[Tensor, ...]:
    *call_args, mean, needs, backend = args
    call, needed = _kernel_call(call_args), WeightsGradsNeeded(*needs)
    spec = AttentionSpec.of(call, GradsNeeded(bias=needed.bias, alibi_slopes=needed.alibi_slopes))
    run = backends.select(spec, backend, "attention_weights_bwd").attention_weights_bwd
    grads = run(spec, call, lse, dweights, mean, needed)
    return wanted_or_empty(grads, needed, call.query)


def _attention_weights_bwd_fake(dweights: Tensor, lse: Tensor, *args: Any) -> tuple[Tensor, ...]:
    *call_args, _, needs, _ = args
    call = AttentionCall(*call_args)
    sources = {name: lse if name == "lse" else getattr(call, name) for name in WeightsGradsNeeded._fields}
    return wanted_or_empty(_fake_grads(sources, needs), needs, call.query)


def _fake_grads(sources: dict[str, Tensor], needs: Iterable[bool]) -> Iterator[Tensor | None]:
    """Operands' gradients lie in memory as the operands do, all others contiguously."""
    for (name, source), need in zip(sources.items(), needs):
        if not need:
            yield None
        elif name in ("query", "key", "value"):
            yield empty_in_order(source, tuple(source.shape))
        else:
            yield source.new_empty(source.shape)


def _setup_attention(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    save_inputs(ctx, inputs, output)


def _attention_backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    inputs, (out, lse) = saved(ctx)
    *call_args, backend = inputs
    if dout is None and dlse is None:
        return (None,) * len(inputs)
    dout = torch.zeros_like(out) if dout is None else dout
    needs = [ctx.needs_input_grad[position] for position in _POSITIONS]
    grads = torch.ops.fastattn.attention_bwd(dout, dlse, out, lse, *call_args, needs, backend)
    return tuple(at_positions(len(inputs), _POSITIONS, grads, needs))


def _setup_weights(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    save_inputs(ctx, inputs, ())


def _weights_backward(ctx: Any, dweights: Tensor | None) -> tuple[Tensor | None, ...]:
    inputs, _ = saved(ctx)
    lse, *call_args, mean, backend = inputs
    if dweights is None:
        return (None,) * len(inputs)
    needs = [ctx.needs_input_grad[position] for position in _WEIGHTS_POSITIONS]
    grads = torch.ops.fastattn.attention_weights_bwd(dweights, lse, *call_args, mean, needs, backend)
    return tuple(at_positions(len(inputs), _WEIGHTS_POSITIONS, grads, needs))


def _setup_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    save_inputs(ctx, inputs, ())


def _attention_double_backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
    inputs, _ = saved(ctx)
    dout, dlse, _, _, *call_args, _, _ = inputs

    def forward(*tensors: Tensor | None) -> tuple[Tensor, Tensor]:
        return composite.out_and_lse(_with_tensors(call_args, _POSITIONS, tensors))

    sources = [call_args[position] for position in _POSITIONS]
    of_cotangents, of_inputs = composite.second_derivative(forward, sources, (dout, dlse), grad_outputs)
    positions = (0, 1, *(4 + position for position in _POSITIONS))
    grads = (*of_cotangents, *of_inputs)
    return tuple(at_positions(len(inputs), positions, grads, (True,) * len(grads)))


def _weights_double_backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
    inputs, _ = saved(ctx)
    dweights, *arguments, mean, _, _ = inputs  # arguments: lse and the call's

    def forward(*tensors: Tensor | None) -> tuple[Tensor]:
        _, *call_args = arguments
        replaced = dict(zip(_WEIGHTS_POSITIONS, tensors))
        lse = replaced.pop(0)
        assert lse is not None
        call = _with_tensors(call_args, [position - 1 for position in replaced], replaced.values())
        return (composite.weights(call, lse, mean),)

    sources = [arguments[position] for position in _WEIGHTS_POSITIONS]
    of_cotangents, of_inputs = composite.second_derivative(forward, sources, (dweights,), grad_outputs)
    positions = (0, *(1 + position for position in _WEIGHTS_POSITIONS))
    grads = (*of_cotangents, *of_inputs)
    return tuple(at_positions(len(inputs), positions, grads, (True,) * len(grads)))


def _with_tensors(
    call_args: list[Any], positions: Iterable[int], tensors: Iterable[Tensor | None]
) -> AttentionCall:
    replaced = list(call_args)
    for position, tensor in zip(positions, tensors):
        replaced[position] = tensor
    return AttentionCall(*replaced)


for _name, _kernel, _fake in (
    ("attention_fwd", _attention_fwd, _attention_fwd_fake),
    ("attention_bwd", _attention_bwd, _attention_bwd_fake),
    ("attention_weights", _attention_weights, _attention_weights_fake),
    ("attention_weights_bwd", _attention_weights_bwd, _attention_weights_bwd_fake),
):
    _LIBRARY.impl(_name, in_own_precision(_kernel), "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastattn::{_name}", _fake, lib=_LIBRARY)

for _name, _setup, _backward in (
    ("attention_fwd", _setup_attention, _attention_backward),
    ("attention_bwd", _setup_backward, _attention_double_backward),
    ("attention_weights", _setup_weights, _weights_backward),
    ("attention_weights_bwd", _setup_backward, _weights_double_backward),
):
    torch.library.register_autograd(f"fastattn::{_name}", _backward, setup_context=_setup, lib=_LIBRARY)

flops.register(
    attention_fwd=flops.forward_flops,
    attention_bwd=flops.backward_flops,
    attention_weights=flops.weights_flops,
    attention_weights_bwd=flops.weights_backward_flops,
)
