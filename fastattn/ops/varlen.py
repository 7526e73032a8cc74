"""`attention_varlen`: attention on packed sequences, and its registration."""

from __future__ import annotations

from dataclasses import fields
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NoReturn, cast, overload

import torch
from torch import Tensor

from fastattn import backends, reference
from fastattn.backends import layout
from fastattn.ops import arguments, composite, flops, plain, plan, spelling, symbolic
from fastattn.ops.autocast import autocast_qkv
from fastattn.ops.registration import define_with_gradient, schema_of, wanted_or_empty
from fastattn.ops.values import can_be_read, may_be_refused
from fastattn.ops.varlen_plan import DIFFERENTIABLE, NAMES, VarlenPlan, backward, check_values, kernel_call
from fastattn.philox import keep_mask
from fastattn.spec import (
    AttentionSpec,
    GradsNeeded,
    VarlenCall,
    accumulation_dtype,
)
from fastattn.strides import empty_in_order

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from fastattn.ops.options import VarlenOptions


# fmt: off
@overload
def attention_varlen(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
    max_seqlen_q: int | None = None, max_seqlen_k: int | None = None, *,
    return_lse: Literal[False] = False, **options: Unpack[VarlenOptions],
) -> Tensor: ...
@overload
def attention_varlen(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
    max_seqlen_q: int | None = None, max_seqlen_k: int | None = None, *,
    return_lse: Literal[True], **options: Unpack[VarlenOptions],
) -> tuple[Tensor, Tensor]: ...
@overload
def attention_varlen(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
    max_seqlen_q: int | None = None, max_seqlen_k: int | None = None, *,
    return_lse: bool = False, **options: Unpack[VarlenOptions],
) -> Tensor | tuple[Tensor, Tensor]: ...
# fmt: on
@spelling.without_unknown
def attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    *,
    causal: bool | str = False,
    window: tuple[int | None, int | None] | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str = "auto",
    **unknown: NoReturn,
) -> Tensor | tuple[Tensor, Tensor]:
    """`attention` of every sequence in a packed batch by itself, without padding.

    Args:
        query: (T, H, D), the sequences' queries one after another: float16, bfloat16, float32 or float64, cast by
            autocast as in `attention`.
        key, value: (Tk, Hkv, D) and (Tk, Hkv, Dv), in the query's dtype; Hkv divides H.
        cu_seqlens_q, cu_seqlens_k: (B + 1,) int32, ascending from 0: sequence b owns tokens cu_seqlens[b] up to
            cu_seqlens[b + 1]. Sequences may be empty; tokens after the last belong to none. Other dtypes are a
            TypeError; values are checked on a CPU only.
        max_seqlen_q, max_seqlen_k: integers, upper bounds of the lengths. Left out, they are read from cu_seqlens where
            a kernel needs them, which costs a synchronisation and cannot happen while a CUDA graph is captured.
        causal, window, alibi_slopes, softcap, sinks, dropout_p, dropout_seed, scale, backend: as in `attention`,
            with each sequence's own lengths for Sq and Sk; alibi_slopes is (H,) or (B, H).
        return_lse: also return the log-sum-exp, (H, T), natural log, differentiable; float32, or float64 for a float64
            query.

    Returns:
        out (T, H, Dv) in the query's dtype and memory order, and lse if asked for. Tokens of no sequence, and rows
        that see no key, give out 0 and lse -inf.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
        RuntimeError: the named backend cannot run the call.

    Source: Dao, "FlashAttention-2" (2023), variable-length interface.
    """
    planned, others = None, (alibi_slopes, sinks, dropout_seed)
    if not unknown:
        seen = (query, key, value, cu_seqlens_q, cu_seqlens_k, *plan.without_number(others))
        kinds = tuple(map(type, (max_seqlen_q, max_seqlen_k, causal, softcap, dropout_p, scale)))
        sides = None if window is None else plan.sides(window)
        bounds = (max_seqlen_q, max_seqlen_k)
        options = (*bounds, causal, sides, softcap, dropout_p, scale, kinds, return_lse, backend)
        planned, found = plan.look_up("varlen", seen, options)
        if found is not None:
            return cast(Tensor, found(query, key, value, cu_seqlens_q, cu_seqlens_k, *others))
    if symbolic.any_proxy(query, key, value):
        return cast(Tensor, symbolic.record(attention_varlen, locals()))
    if unknown:
        raise spelling.unexpected(attention_varlen, unknown)
    in_torch = plain.wanted()
    make = partial(plain.quietly, call_arguments) if in_torch else call_arguments
    args = make(
        query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal=causal, window=window,
        alibi_slopes=alibi_slopes, softcap=softcap, sinks=sinks, dropout_p=dropout_p, dropout_seed=dropout_seed,
        scale=scale, draw=False,
    )  # fmt: skip
    arguments.check_backend(backend)
    if in_torch:
        result: Tensor | tuple[Tensor, Tensor] = plain.quietly(
            plain.attention_varlen, VarlenCall(*args), lse=return_lse, any_seed=dropout_seed is None
        )
        return result
    if (transform := composite.transform_in_use(args)) is not None:
        composite.refuse_named(backend, transform)
    elif may_be_refused(args, backend, more=dropout_p > 0.0):
        backends.select_all(_passes(VarlenCall(*args)), backend)
    if dropout_p > 0.0 and args[_SEED] is None:
        if can_be_read(args):
            check_values(VarlenCall(*args))
        args = arguments.with_drawn_seed(args, _SEED)
    out, lse = _run(*args, backend) if transform is None else _composite(VarlenCall(*args))
    if plan.wanted(planned):
        plan.keep(planned, VarlenPlan(args, backend, return_lse))
    return (out, lse) if return_lse else out


def explain_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    *,
    backend: str = "auto",
    return_lse: bool = False,
    alibi_slopes: Tensor | None = None,
    **options: Any,
) -> backends.Explanation:
    """Which backend `attention_varlen` would use for these arguments, with which tiles, and why not the others.

    It runs nothing.

    Args:
        query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k: those of `attention_varlen`.
        backend, return_lse, alibi_slopes, options: those of `attention_varlen`.

    Returns:
        A `fastattn.backends.Explanation`; its `backward` is None where no input requires grad.

    Raises:
        ValueError, TypeError: an argument does not fit `attention_varlen`; the message names it.
        RuntimeError: the named backend cannot run the call.
    """
    spelling.check(options, attention_varlen, "explain_varlen")
    args = call_arguments(
        query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, alibi_slopes=alibi_slopes,
        **options, draw=False,
    )  # fmt: skip
    arguments.check_backend(backend)
    call = VarlenCall(*args)
    check_values(call)
    options["window"] = plan.sides(options.get("window"))
    outlook = plan.outlook(query, key, value, cu_seqlens_q, cu_seqlens_k, alibi_slopes, *options.values())
    return backends.explanation(_passes(call), backend, outlook)


def _passes(call: VarlenCall) -> dict[str, AttentionSpec]:
    """Specs of a call's passes, the backward's too where one may follow."""
    whole = call.as_one_sequence()
    passes = {"varlen_fwd": AttentionSpec.of(whole)}
    tensors = {name: getattr(call, name) for name in DIFFERENTIABLE}
    needs = {name: t is not None and t.requires_grad for name, t in tensors.items()}
    if torch.is_grad_enabled() and any(needs.values()):
        passes["varlen_bwd"] = AttentionSpec.of(whole, GradsNeeded(**needs))
    return passes


def kept_by_dropout(
    seed: Tensor, sequence: int, num_heads: int, seqlen_q: int, seqlen_k: int, dropout_p: float
) -> Tensor:
    """bool (H, Sq, Sk), True where dropout with this seed keeps a weight of a packed batch's sequence."""
    heads = torch.arange(sequence * num_heads, (sequence + 1) * num_heads, device=seed.device)
    return keep_mask(seed, heads, range(seqlen_q), range(seqlen_k), dropout_p)


def call_arguments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    *,
    alibi_slopes: Tensor | None,
    **options: Any,
) -> tuple[Any, ...]:
    """The public arguments, checked and put in the order of VarlenCall's fields."""
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        arguments.check_tensor(name, tensor)
        if tensor.dim() != 3:
            got = arguments.shape_of(tensor)
            raise ValueError(f"{name}: got shape {got}, needs 3 dimensions (tokens, heads, dim)")
    for name, tensor in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        arguments.check_tensor(name, tensor)
        if tensor.dtype != torch.int32:
            raise TypeError(f"{name}: got {tensor.dtype}, needs int32")
        if tensor.dim() != 1 or tensor.shape[0] == 0:
            raise ValueError(f"{name}: got shape {arguments.shape_of(tensor)}, needs (batch + 1,)")
        arguments.check_device(name, tensor, query)
    if cu_seqlens_k.shape != cu_seqlens_q.shape:
        got, needs = arguments.shape_of(cu_seqlens_k), arguments.shape_of(cu_seqlens_q)
        raise ValueError(f"cu_seqlens_k: got shape {got}, needs that of cu_seqlens_q, {needs}")
    batch, num_heads = cu_seqlens_q.shape[0] - 1, query.shape[1]
    slopes = None
    if alibi_slopes is not None:
        slopes = arguments.per_head_slopes(alibi_slopes, batch, num_heads, query)
    query, key, value = autocast_qkv(query, key, value)
    as_padded = (t.transpose(0, 1)[None] for t in (query, key, value))
    *_, sinks, seed, causal, left, right, softcap, dropout_p, scale = arguments.call_arguments(
        *as_padded, **options
    )
    bounds = []
    for name, bound in (("max_seqlen_q", max_seqlen_q), ("max_seqlen_k", max_seqlen_k)):
        if bound is not None and not arguments.is_integer(bound):
            raise TypeError(f"{name}: got {type(bound).__name__}, needs an integer or None")
        if bound is not None and bound < 0:
            raise ValueError(f"{name}: got {bound}, needs 0 or more")
        bounds.append(-1 if bound is None else bound)
    return (
        query, key, value, cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous(), slopes, sinks, seed, *bounds,
        causal, left, right, softcap, dropout_p, scale,
    )  # fmt: skip


def _composite(call: VarlenCall) -> tuple[Tensor, Tensor]:
    """(out, lse) in differentiable torch operations."""
    dtype = accumulation_dtype(call.query.dtype)
    operands = (call.query.to(dtype), call.key.to(dtype), call.value.to(dtype))
    options = composite.shared_options(call)
    out, lse = reference.attention_varlen(
        *operands, call.cu_seqlens_q, call.cu_seqlens_k, **options, return_lse=True
    )
    return out.to(call.query.dtype), lse


def _varlen_fwd(*args: Any) -> tuple[Tensor, Tensor]:
    *call_args, backend = args
    call = kernel_call(call_args)
    check_values(call)
    spec = AttentionSpec.of(call.as_one_sequence())
    chosen = backends.select(spec, backend, "varlen_fwd")
    return chosen.varlen_fwd(spec, layout.for_backend(chosen, call, spec))


def _varlen_fwd_fake(*args: Any) -> tuple[Tensor, Tensor]:
    query, value = args[0], args[2]
    tokens, num_heads, _ = query.shape
    out = empty_in_order(query, (tokens, num_heads, value.shape[2]))
    return out, query.new_empty((num_heads, tokens), dtype=accumulation_dtype(query.dtype))


def _varlen_bwd(
    dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, *args: Any
) -> tuple[Tensor, ...]:
    *call_args, needs, backend = args
    call = kernel_call(call_args)
    needed = GradsNeeded(**dict(zip(DIFFERENTIABLE, needs)))
    spec = AttentionSpec.of(call.as_one_sequence(), needed)
    chosen = backends.select(spec, backend, "varlen_bwd")
    grads = backward(spec, chosen, call, out, lse, dout, dlse, needed)
    return wanted_or_empty((getattr(grads, name) for name in DIFFERENTIABLE), needs, call.query)


_SEED = NAMES.index("dropout_seed")
_LIBRARY = torch.library.Library("fastattn", "FRAGMENT")
_run = define_with_gradient(
    _LIBRARY,
    ("varlen_fwd", "varlen_bwd"),
    schema_of(fields(VarlenCall)),
    ("out", "lse"),
    {name: NAMES.index(name) for name in DIFFERENTIABLE},
    keeps_results=True,
    forward=_varlen_fwd,
    forward_fake=_varlen_fwd_fake,
    backward=_varlen_bwd,
    composed=lambda call_args: _composite(VarlenCall(*call_args)),
)

flops.register(varlen_fwd=flops.packed_forward_flops, varlen_bwd=flops.packed_backward_flops)
