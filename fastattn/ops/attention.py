"""`attention`: the public call, and its registration as torch ops with fake implementations, gradients and FLOPs."""

from __future__ import annotations

from dataclasses import fields
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NoReturn, cast, overload

import torch
from torch import Tensor

from fastattn import backends
from fastattn.backends import layout
from fastattn.ops import arguments, composite, distributed, flops, padding, plain, plan, spelling, symbolic
from fastattn.ops.attention_plan import NAMES, AttentionPlan, backward, check_values, forward, kernel_call
from fastattn.ops.registration import (
    define_with_gradient,
    out_and_lse_fake,
    schema_of,
    wanted_or_empty,
)
from fastattn.ops.values import can_be_read, may_be_refused
from fastattn.spec import (
    AttentionCall,
    AttentionSpec,
    GradsNeeded,
    WeightsGradsNeeded,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from fastattn.ops.options import AttentionOptions


# fmt: off
@overload
def attention(
    query: Tensor, key: Tensor, value: Tensor, *,
    return_lse: Literal[False] = False, return_weights: Literal[False] = False,
    **options: Unpack[AttentionOptions],
) -> Tensor: ...
@overload
def attention(
    query: Tensor, key: Tensor, value: Tensor, *,
    return_lse: Literal[True], return_weights: Literal[False] = False,
    **options: Unpack[AttentionOptions],
) -> tuple[Tensor, Tensor]: ...
@overload
def attention(
    query: Tensor, key: Tensor, value: Tensor, *,
    return_lse: Literal[False] = False, return_weights: Literal[True, "mean"],
    **options: Unpack[AttentionOptions],
) -> tuple[Tensor, Tensor]: ...
@overload
def attention(
    query: Tensor, key: Tensor, value: Tensor, *,
    return_lse: Literal[True], return_weights: Literal[True, "mean"],
    **options: Unpack[AttentionOptions],
) -> tuple[Tensor, Tensor, Tensor]: ...
@overload
def attention(
    query: Tensor, key: Tensor, value: Tensor, *,
    return_lse: bool = False, return_weights: bool | Literal["mean"] = False,
    **options: Unpack[AttentionOptions],
) -> Tensor | tuple[Tensor, ...]: ...
# fmt: on
@spelling.without_unknown
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
    **unknown: NoReturn,
) -> Tensor | tuple[Tensor, ...]:
    """softmax(softcap(scale * query @ key.T) + alibi + bias, masked) @ value, fused.

    Args:
        query: (B, H, Sq, D), float16, bfloat16, float32 or float64; any strides. D and Dv are at most 256. Under
            autocast query, key and value are cast to its dtype, float64 excepted.
        key: (B, Hkv, Sk, D), in the query's dtype; Hkv divides H, query head h reads key/value head h // (H // Hkv).
        value: (B, Hkv, Sk, Dv), in the query's dtype.
        causal: True or "bottom_right" lets query i see keys j <= i + Sk - Sq; "top_left" keys j <= i.
        window: (left, right): query i sees pos(i) - left <= j <= pos(i) + right, where pos(i) is i + Sk - Sq, or i
            under "top_left". None or -1 is unbounded.
        mask: bool, True = attend, broadcastable to (B, H, Sq, Sk).
        bias: any float dtype, added to the scores, broadcastable to (B, H, Sq, Sk), differentiable; -inf masks.
        segment_ids: (B, S) integers, or a pair for queries and keys; only equal ids attend, negative ids nothing.
        key_lengths: (B,) integers, 0 to Sk (checked on a CPU only); keys at or beyond an entry's length are seen by no
            query.
        alibi_slopes: (H,) or (B, H), any float dtype, adds -slope * |pos(i) - j|, differentiable.
        softcap: scores become softcap * tanh(score / softcap); like the scale below 2**127 unless in float64.
        sinks: (H,), any float dtype, one more score per row that carries no value, differentiable; lse includes it.
        dropout_p: probability of dropping a weight, in [0, 1); rounded to a multiple of 2**-16.
        dropout_seed: int or one-element int64 tensor; the same seed drops the same weights on every backend. None
            draws one from torch's generator.
        scale: factor on query @ key.T, D**-0.5 by default.
        return_lse: also return the log-sum-exp of each row's scores, (B, H, Sq), natural log, differentiable; float32,
            or float64 for a float64 query.
        return_weights: also return what multiplies the values, (B, H, Sq, Sk), or its mean over heads, (B, Sq, Sk),
            for "mean"; in the query's dtype, differentiable. O(Sq * Sk) memory.
        backend: "auto", "cuda", "triton" or "torch"; a named backend that cannot run the call raises its reason.

    Returns:
        out (B, H, Sq, Dv) in the query's dtype and memory order; then lse and weights as asked for. A row that sees
        no key gives out 0, lse -inf (its sink, if it has one) and zero gradients.

    Keys hidden from every query of their batch entry may hold anything, NaN included, without effect on results or
    gradients, and their own gradients are 0. A key is hidden so if it is at or beyond `key_lengths`, has a negative
    segment id, or has a column that is False in the mask or -inf in the bias for all heads and queries. Keys that
    other masks, windows or causality hide have no effect if they are finite.
    A seen score of NaN or +inf, be it by overflow, gives NaN in out, lse and weights of its row; one of -inf has the
    weight 0. float64 terms of the scores of other dtypes (bias, alibi_slopes, sinks) count as the nearest number that
    float32 holds.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
        RuntimeError: the backend that `backend` or FASTATTN_BACKEND names cannot run the call.

    Source: Dao, "FlashAttention-2" (2023); dropout by Philox4x32-10 (Salmon et al., 2011), see `fastattn.philox`.
    """
    result: Tensor | tuple[Tensor, ...]
    others: tuple[Any, ...] = ()
    if not (
        mask is None and bias is None and segment_ids is None and key_lengths is None and alibi_slopes is None
        and sinks is None and type(dropout_p) is float and dropout_p == 0.0 and dropout_seed is None
    ):  # fmt: skip
        ids = segment_ids if isinstance(segment_ids, tuple) else (segment_ids, segment_ids)
        others = (mask, bias, *ids, key_lengths, alibi_slopes, sinks, dropout_seed)
    planned = None
    if return_weights is False and not unknown and len(others) in (0, 8):
        seen = (query, key, value, *plan.without_number(others)) if others else (query, key, value)
        kinds = None  # of numbers: True equals 1, but is refused
        if not (softcap is None and scale is None and (causal is False or causal is True) and not others):
            kinds = (type(causal), type(softcap), type(dropout_p), type(scale))
        sides = None if window is None else plan.sides(window)
        options = (causal, sides, softcap, dropout_p, scale, kinds, bool(return_lse), backend)
        planned, found = plan.look_up("attention", seen, options)
        if found is not None:
            both = found(query, key, value, *others) if others else found(query, key, value)
            result = both if return_lse else both[0]
            return result
    if symbolic.any_proxy(query, key, value):
        return cast(Tensor, symbolic.record(attention, locals()))
    if unknown:
        raise spelling.unexpected(attention, unknown)
    if distributed.is_dtensor(query):
        query, key, value = map(distributed.in_order, (query, key, value))
    in_torch = plain.wanted()
    make = partial(plain.quietly, arguments.call_arguments) if in_torch else arguments.call_arguments
    args = make(
        query, key, value, causal=causal, window=window, mask=mask, bias=bias, segment_ids=segment_ids,
        key_lengths=key_lengths, alibi_slopes=alibi_slopes, softcap=softcap, sinks=sinks, dropout_p=dropout_p,
        dropout_seed=dropout_seed, scale=scale, draw=False,
    )  # fmt: skip
    arguments.check_backend(backend)
    arguments.check_returned_weights(return_weights)
    if in_torch:
        result = plain.quietly(
            plain.attention, AttentionCall(*args), lse=return_lse, weights=return_weights,
            any_seed=dropout_seed is None,
        )  # fmt: skip
        return result
    if (transform := composite.transform_in_use(args)) is not None:
        composite.refuse_named(backend, transform)
        check_values(AttentionCall(*args))
    elif may_be_refused(args, backend, more=bool(return_weights) or dropout_p > 0.0):
        backends.select_all(_passes(AttentionCall(*args), bool(return_weights)), backend)
    if dropout_p > 0.0 and args[_SEED] is None:
        if can_be_read(args):
            check_values(AttentionCall(*args))
        args = arguments.with_drawn_seed(args, _SEED)
    if transform is not None:
        return composite.attention(args, return_lse, return_weights)
    out, lse = _run_attention(*args, backend)
    if plan.wanted(planned):
        plan.keep(planned, AttentionPlan(args, backend, not others, return_lse).runner())
    results = [out]
    if return_lse:
        results.append(lse)
    if return_weights:
        results.append(_run_weights(lse, *args, return_weights == "mean", backend))
    return results[0] if len(results) == 1 else tuple(results)


def explain(
    query: Tensor, key: Tensor, value: Tensor, *, backend: str = "auto", **options: Any
) -> backends.Explanation:
    """Which backend `attention` would use for these arguments, with which tiles, and why not the others.

    It runs nothing. The other ops have `explain_varlen`, `explain_kv_cache`, `explain_softmax`,
    `explain_cross_entropy` and `explain_linear_cross_entropy`, each with the arguments of its op.

    Args:
        query, key, value, backend, options: those of `attention`.

    Returns:
        A `fastattn.backends.Explanation`, printable. Its `backward` names the backend of the backward pass where grad
        mode is on and an input requires grad, `weights` and `weights_backward` those of the weights under
        `return_weights`.

    Raises:
        ValueError, TypeError: an argument does not fit `attention`; the message names it.
        RuntimeError: the named backend cannot run the call.
    """
    spelling.check(options, attention, "explain")
    given = options | {"window": plan.sides(options.get("window"))}
    options.pop("return_lse", None)
    weights = options.pop("return_weights", False)
    arguments.check_returned_weights(weights)
    args = arguments.call_arguments(query, key, value, **options, draw=False)
    arguments.check_backend(backend)
    call = AttentionCall(*args)
    check_values(call)
    outlook = plan.outlook(query, key, value, *given.values())
    if weights and outlook == "planned":
        outlook = "not planned: weights are returned"
    return backends.explanation(_passes(call, bool(weights)), backend, outlook)


def _passes(call: AttentionCall, weights: bool) -> dict[str, AttentionSpec]:
    """Specs of a call's passes by the backend function that runs each; the backward's too where one may
    follow."""
    spec = AttentionSpec.of(call)
    passes = {"attention_fwd": spec}
    if weights:
        passes["attention_weights_fwd"] = spec
    needs = GradsNeeded(*(arguments.requires_grad(getattr(call, name)) for name in GradsNeeded._fields))
    if torch.is_grad_enabled() and any(needs):
        passes["attention_bwd"] = AttentionSpec.of(call, needs)
        if weights:
            of_scores = GradsNeeded(bias=needs.bias, alibi_slopes=needs.alibi_slopes)
            passes["attention_weights_bwd"] = AttentionSpec.of(call, of_scores)
    return passes


_CALL_SCHEMA = schema_of(fields(AttentionCall))
_SEED = NAMES.index("dropout_seed")
_LIBRARY = torch.library.Library("fastattn", "DEF")


def _attention_fwd(*args: Any) -> tuple[Tensor, Tensor]:
    *call_args, backend = args
    call = kernel_call(call_args)
    check_values(call)
    spec = AttentionSpec.of(call)
    return forward(spec, backends.select(spec, backend), call)


def _attention_bwd(
    dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, *args: Any
) -> tuple[Tensor, ...]:
    *call_args, needs, backend = args
    call, needed = kernel_call(call_args), GradsNeeded(*needs)
    spec = AttentionSpec.of(call, needed)
    chosen = backends.select(spec, backend, "attention_bwd")
    grads = backward(spec, chosen, call, out, lse, dout, dlse, needed)
    return wanted_or_empty(grads, needed, call.query)


def _attention_weights(lse: Tensor, *args: Any) -> Tensor:
    *call_args, mean, backend = args
    call = kernel_call(call_args)
    chosen = backends.select(AttentionSpec.of(call), backend, "attention_weights_fwd")
    call, _ = padding.cleaned(chosen, call, call.query, call.key)
    spec, lse = AttentionSpec.of(call), layout.contiguous(chosen, lse)
    weights: Tensor = chosen.attention_weights_fwd(spec, layout.for_backend(chosen, call, spec), lse, mean)
    return weights


def _attention_weights_fake(lse: Tensor, *args: Any) -> Tensor:
    query, key, mean = args[0], args[1], args[-2]
    batch, num_heads, seqlen_q, _ = query.shape
    heads = () if mean else (num_heads,)
    return query.new_empty((batch, *heads, seqlen_q, key.shape[2]))


def _attention_weights_bwd(dweights: Tensor, lse: Tensor, *args: Any) -> tuple[Tensor, ...]:
    *call_args, mean, needs, backend = args
    call, needed = kernel_call(call_args), WeightsGradsNeeded(*needs)
    of_scores = GradsNeeded(bias=needed.bias, alibi_slopes=needed.alibi_slopes)
    chosen = backends.select(AttentionSpec.of(call, of_scores), backend, "attention_weights_bwd")
    call, hidden = padding.cleaned(chosen, call, call.query, call.key)
    spec, lse = AttentionSpec.of(call, of_scores), layout.contiguous(chosen, lse)
    call = layout.for_backend(chosen, call, spec)
    dquery, dkey, *others = chosen.attention_weights_bwd(spec, call, lse, dweights, mean, needed)
    padding.zero_hidden((dkey,), hidden)
    return wanted_or_empty((dquery, dkey, *others), needed, call.query)


def _composed_weights(inputs: list[Any]) -> tuple[Tensor]:
    lse, *call_args, mean = inputs
    return (composite.weights(AttentionCall(*call_args), lse, mean),)


_run_attention = define_with_gradient(
    _LIBRARY,
    ("attention_fwd", "attention_bwd"),
    _CALL_SCHEMA,
    ("out", "lse"),
    {name: NAMES.index(name) for name in GradsNeeded._fields},
    keeps_results=True,
    forward=_attention_fwd,
    forward_fake=out_and_lse_fake,
    backward=_attention_bwd,
    composed=lambda call_args: composite.out_and_lse(AttentionCall(*call_args)),
)
_run_weights = define_with_gradient(
    _LIBRARY,
    ("attention_weights", "attention_weights_bwd"),
    f"Tensor lse, {_CALL_SCHEMA}, bool mean",
    ("weights",),
    {name: ("lse", *NAMES).index(name) for name in WeightsGradsNeeded._fields},
    keeps_results=False,
    forward=_attention_weights,
    forward_fake=_attention_weights_fake,
    backward=_attention_weights_bwd,
    composed=_composed_weights,
)

flops.register(
    attention_fwd=flops.forward_flops,
    attention_bwd=flops.backward_flops,
    attention_weights=flops.weights_flops,
    attention_weights_bwd=flops.weights_backward_flops,
)
