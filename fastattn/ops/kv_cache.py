"""`attention_kv_cache`: attention against a growing cache of keys and values, and its registration."""

from __future__ import annotations

from dataclasses import fields
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NoReturn, cast, overload

import torch
from torch import Tensor

from fastattn import backends
from fastattn.backends import layout
from fastattn.ops import arguments, composite, flops, plain, plan, spelling, symbolic
from fastattn.ops.kv_cache_plan import KVCachePlan, check_memory, check_values, spec_of
from fastattn.ops.registration import define, out_and_lse_fake, schema_of
from fastattn.spec import KVCacheCall

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from fastattn.ops.options import KVCacheOptions


# fmt: off
@overload
def attention_kv_cache(
    query: Tensor, k_cache: Tensor, v_cache: Tensor, cache_lengths: Tensor, *, return_lse: Literal[False] = False,
    **options: Unpack[KVCacheOptions],
) -> Tensor: ...
@overload
def attention_kv_cache(
    query: Tensor, k_cache: Tensor, v_cache: Tensor, cache_lengths: Tensor, *, return_lse: Literal[True],
    **options: Unpack[KVCacheOptions],
) -> tuple[Tensor, Tensor]: ...
@overload
def attention_kv_cache(
    query: Tensor, k_cache: Tensor, v_cache: Tensor, cache_lengths: Tensor, *, return_lse: bool = False,
    **options: Unpack[KVCacheOptions],
) -> Tensor | tuple[Tensor, Tensor]: ...
# fmt: on
@spelling.without_unknown
def attention_kv_cache(
    query: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_lengths: Tensor,
    *,
    key: Tensor | None = None,
    value: Tensor | None = None,
    block_table: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    rotary_interleaved: bool = False,
    causal: bool | str = True,
    window: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    scale: float | None = None,
    num_splits: int | None = None,
    return_lse: bool = False,
    backend: str = "auto",
    **unknown: NoReturn,
) -> Tensor | tuple[Tensor, Tensor]:
    """`attention` of new queries to everything in a cache, after appending new keys and values to it.

    Args:
        query: (B, H, Sq, D), float16, bfloat16, float32 or float64: one token while decoding, more while a prompt is
            read in chunks.
        k_cache, v_cache: (B, Hkv, S, D) and (B, Hkv, S, Dv), or pages (P, Hkv, page, D) and (P, Hkv, page, Dv) with a
            block_table; in the query's dtype, any strides. New keys and values are written into them: then no two
            elements of the caches may share memory, nor may query, key and value share any with them. Views that
            interleave, as those of one (B, Hkv, S, 2, D) buffer, are fine. Where nothing is appended, all may share.
        cache_lengths: (B,) integers (int32 needs no conversion), tokens in the cache before this call; left as it is.
        key, value: (B, Hkv, Sn, D) and (B, Hkv, Sn, Dv), given together, in the caches' dtype; written at
            cache_lengths. Sequence b then has cache_lengths[b] + Sn keys, its Sk.
        block_table: (B, pages) integers (int32 needs no conversion); page i of sequence b is
            k_cache[block_table[b, i]]. Sequences may share pages, but not one that is appended to: a CPU refuses it; on
            a GPU, where looking would cost a synchronisation, the sequences' tokens mix.
        rotary_cos, rotary_sin: (positions, rotary_dim / 2), any float dtype, given together; rotate the first
            rotary_dim dimensions of the new keys to the positions they are written at, and of query i to position
            i + Sk - Sq.
        rotary_interleaved: rotate pairs (0, 1), (2, 3) ... rather than (0, rotary_dim / 2) ...
        causal, window, softcap, alibi_slopes, sinks, scale, backend: as in `attention`; causal is on by default.
        num_splits: equal pieces a GPU kernel cuts the keys into; None: pieces of a fixed number of keys. Either way a
            sequence's bits do not depend on its batch. The torch backend reads the keys in one piece.
        return_lse: also return the log-sum-exp, (B, H, Sq), natural log; float32, or float64 for a float64 query.

    Returns:
        out (B, H, Sq, Dv) in the query's dtype and memory order, and lse if asked for. No gradients.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it. Nothing is written then. Lengths and page
            numbers are checked on a CPU only. Shared memory raises an error that is both a ValueError and a
            RuntimeError.
        RuntimeError: the named backend cannot run the call, a tensor requires grad in grad mode, or a torch.func
            transform or forward-mode AD is active.

    Source: Dao, "FlashAttention-2" (2023), key/value cache interface; Kwon et al., "PagedAttention" (2023).
    """
    planned = None
    tensors: tuple[Any, ...] = (query, k_cache, v_cache, cache_lengths, key, value)
    if not (
        block_table is None and rotary_cos is None and rotary_sin is None and alibi_slopes is None and sinks is None
    ):  # fmt: skip
        tensors += (block_table, rotary_cos, rotary_sin, alibi_slopes, sinks)
    if not unknown:
        options: tuple[Any, ...] = (return_lse, backend)
        if not (
            causal is True and window is None and softcap is None and scale is None and num_splits is None
            and rotary_interleaved is False
        ):  # fmt: skip
            kinds = (type(causal), type(softcap), type(scale), type(num_splits))
            sides = None if window is None else plan.sides(window)
            options = (causal, sides, softcap, scale, num_splits, bool(rotary_interleaved), kinds, *options)
        planned, found = plan.look_up("kv_cache", tensors, options)
        if found is not None:
            return cast(Tensor, found(*tensors))
    if symbolic.any_proxy(query, k_cache, v_cache):
        return cast(Tensor, symbolic.record(attention_kv_cache, locals()))
    if unknown:
        raise spelling.unexpected(attention_kv_cache, unknown)
    in_torch = plain.wanted()
    make = partial(plain.quietly, call_arguments) if in_torch else call_arguments
    args = make(
        query, k_cache, v_cache, cache_lengths, key, value, block_table, rotary_cos, rotary_sin, alibi_slopes,
        sinks, rotary_interleaved, num_splits, causal=causal, window=window, softcap=softcap, scale=scale,
    )  # fmt: skip
    arguments.check_backend(backend)
    if in_torch:
        result: Tensor | tuple[Tensor, Tensor] = plain.quietly(
            plain.attention_kv_cache, KVCacheCall(*args), lse=return_lse
        )
        return result
    if (transform := composite.transform_in_use(args)) is not None:
        raise RuntimeError(
            f"attention_kv_cache writes to its caches and has no gradient, but {transform} is active"
        )
    out, lse = _run(*args, backend)
    if plan.wanted(planned):
        plan.keep(planned, KVCachePlan(args, backend, return_lse).runner())
    return (out, lse) if return_lse else out


def explain_kv_cache(
    query: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_lengths: Tensor,
    *,
    key: Tensor | None = None,
    value: Tensor | None = None,
    block_table: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    rotary_interleaved: bool = False,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    num_splits: int | None = None,
    causal: bool | str = True,
    return_lse: bool = False,
    backend: str = "auto",
    **options: Any,
) -> backends.Explanation:
    """Which backend `attention_kv_cache` would use for these arguments, with which tiles, and why not the others.

    It runs nothing and writes nothing.

    Args:
        query, k_cache, v_cache, cache_lengths, key, value, block_table: those of `attention_kv_cache`.
        rotary_cos, rotary_sin, rotary_interleaved, alibi_slopes, sinks: those of `attention_kv_cache`.
        num_splits, causal, return_lse, backend, options: those of `attention_kv_cache`.

    Returns:
        A `fastattn.backends.Explanation`, without a backward pass.

    Raises:
        ValueError, TypeError: an argument does not fit `attention_kv_cache`; the message names it.
        RuntimeError: the named backend cannot run the call, or a tensor requires grad in grad mode.
    """
    spelling.check(options, attention_kv_cache, "explain_kv_cache")
    args = call_arguments(
        query, k_cache, v_cache, cache_lengths, key, value, block_table, rotary_cos, rotary_sin, alibi_slopes,
        sinks, rotary_interleaved, num_splits, causal=causal, **options,
    )  # fmt: skip
    arguments.check_backend(backend)
    call = KVCacheCall(*args)
    check_memory(call)
    check_values(call)
    options["window"] = plan.sides(options.get("window"))
    tensors = (query, k_cache, v_cache, cache_lengths, key, value, block_table, rotary_cos, rotary_sin)
    outlook = plan.outlook(*tensors, alibi_slopes, sinks, *options.values())
    return backends.explanation({"kv_cache_fwd": spec_of(call)}, backend, outlook)


def call_arguments(
    query: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_lengths: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    block_table: Tensor | None,
    rotary_cos: Tensor | None,
    rotary_sin: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    rotary_interleaved: bool,
    num_splits: int | None,
    **options: Any,
) -> tuple[Any, ...]:
    """The public arguments, checked and put in the order of KVCacheCall's fields."""
    operands = {"query": query, "k_cache": k_cache, "v_cache": v_cache}
    operands |= {name: t for name, t in (("key", key), ("value", value)) if t is not None}
    for name, operand in operands.items():
        arguments.check_tensor(name, operand)
        if operand.dim() != 4:
            raise ValueError(f"{name}: got shape {arguments.shape_of(operand)}, needs 4 dimensions")
    tensors: dict[str, Tensor | None] = {
        **operands,
        "rotary_cos": rotary_cos,
        "rotary_sin": rotary_sin,
        "alibi_slopes": alibi_slopes,
        "sinks": sinks,
    }
    for name, tensor in tensors.items() if torch.is_grad_enabled() else ():
        if isinstance(tensor, Tensor) and tensor.requires_grad:
            raise RuntimeError(
                f"{name}: requires grad, but attention_kv_cache has no gradient; use torch.no_grad()"
            )
    batch, num_heads = query.shape[:2]
    if (key is None) != (value is None):
        missing = "key" if key is None else "value"
        raise ValueError(f"{missing}: got None, needs a tensor: keys and values are appended together")
    if v_cache.shape[:3] != k_cache.shape[:3]:
        got, needs = arguments.shape_of(v_cache), tuple(k_cache.shape[:3])
        raise ValueError(f"v_cache: got shape {got}, needs the k_cache's {needs} in front")
    cache_lengths = arguments.check_integers("cache_lengths", cache_lengths, (batch,), query)
    if block_table is None:
        if k_cache.shape[0] != batch:
            raise ValueError(f"k_cache: got batch size {k_cache.shape[0]}, needs the query's {batch}")
    else:
        arguments.check_tensor("block_table", block_table)
        if block_table.dim() != 2:
            got = arguments.shape_of(block_table)
            raise ValueError(f"block_table: got shape {got}, needs ({batch}, pages)")
        block_table = arguments.check_integers(
            "block_table", block_table, (batch, block_table.shape[1]), query
        )
    # heads, dims, dtypes and options are those of a padded call; of none, as a batch or a page table may hold none
    none = (t[:0] for t in (query, k_cache, v_cache))
    *_, sinks, _, causal, left, right, softcap, _, scale = arguments.call_arguments(
        *none, sinks=sinks, **options
    )
    if key is not None and value is not None:
        for name, tensor, cache in (("key", key, k_cache), ("value", value, v_cache)):
            expected = (batch, cache.shape[1], key.shape[2], cache.shape[3])
            if arguments.shape_of(tensor) != expected:
                raise ValueError(f"{name}: got shape {arguments.shape_of(tensor)}, needs {expected}")
            if tensor.dtype != cache.dtype:
                raise TypeError(f"{name}: got {tensor.dtype}, needs the cache's {cache.dtype}")
            arguments.check_device(name, tensor, query)
    check_rotary(rotary_cos, rotary_sin, query)
    slopes = None
    if alibi_slopes is not None:
        slopes = arguments.per_head_slopes(alibi_slopes, batch, num_heads, query)
    if num_splits is not None and (not arguments.is_integer(num_splits) or num_splits < 1):
        raise ValueError(f"num_splits: got {num_splits!r}, needs a positive integer or None")
    return (
        query, k_cache, v_cache, cache_lengths, key, value, block_table, rotary_cos, rotary_sin, slopes, sinks,
        bool(rotary_interleaved), causal, left, right, softcap, scale, num_splits or 0,
    )  # fmt: skip


def check_rotary(cos: Tensor | None, sin: Tensor | None, query: Tensor) -> None:
    """Tables (positions, half the rotated dims) of one shape that fit the query's head dim."""
    if cos is None and sin is None:
        return
    for name, table in (("rotary_cos", cos), ("rotary_sin", sin)):
        if table is None:
            raise ValueError(f"{name}: got None, needs a tensor: cosines and sines come together")
        arguments.check_tensor(name, table)
        arguments.check_floating(name, table)
        arguments.check_device(name, table, query)
        if table.dim() != 2 or not 1 <= table.shape[1] <= query.shape[3] // 2:
            got, most = arguments.shape_of(table), query.shape[3] // 2
            raise ValueError(
                f"{name}: got shape {got}, needs (positions, 1 to {most}): half the rotated dims"
            )
    assert cos is not None
    assert sin is not None
    if cos.shape != sin.shape:
        got, needs = arguments.shape_of(sin), arguments.shape_of(cos)
        raise ValueError(f"rotary_sin: got shape {got}, needs that of rotary_cos, {needs}")


def _kv_cache_fwd(*args: Any) -> tuple[Tensor, Tensor]:
    *call_args, backend = args
    call = layout.operands(KVCacheCall(*call_args))
    check_memory(call)
    check_values(call)
    spec = spec_of(call)
    chosen = backends.select(spec, backend, "kv_cache_fwd")
    return chosen.kv_cache_fwd(spec, layout.for_backend(chosen, call, spec))


_LIBRARY = torch.library.Library("fastattn", "FRAGMENT")
_run = define(
    _LIBRARY,
    "kv_cache_fwd",
    f"({schema_of(fields(KVCacheCall), mutated=('k_cache', 'v_cache'))}, str backend) -> (Tensor out, Tensor lse)",
    _kv_cache_fwd,
    out_and_lse_fake,
)

flops.register(kv_cache_fwd=flops.cache_flops)
