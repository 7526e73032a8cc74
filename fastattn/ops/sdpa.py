"""`scaled_dot_product_attention`: torch.nn.functional's call, running on `attention`."""

from __future__ import annotations

import sys
from typing import Any, NoReturn, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.ops import arguments, spelling, symbolic
from fastattn.ops.attention import attention
from fastattn.ops.errors import ArgumentError, standing_in

_NAMES = {"mask": "attn_mask", "bias": "attn_mask"}  # what `attention` calls this call's arguments


@spelling.without_unknown
def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    backend: str = "auto",
    **unknown: NoReturn,
) -> Tensor:
    """softmax(scale * query @ key.T + attn_mask) @ value with dropout on the weights, as in torch.nn.functional.

    Args:
        query: (..., H, L, E), from two dimensions to any number; leading ones broadcast. float16, bfloat16, float32 or
            float64, cast by autocast as in `attention`.
        key: (..., H, S, E), or (..., Hkv, S, E) under `enable_gqa`; in the query's dtype.
        value: as key, with a last dimension of its own.
        attn_mask: broadcastable to (..., H, L, S): bool, True = attend, or any float dtype, added to the scores and
            differentiable; or torch's `causal_upper_left` / `causal_lower_right`, which stay structured.
        dropout_p: probability of dropping a weight, in [0, 1], applied whenever it is above 0; drawn from fastattn's
            generator, so the dropped weights agree with torch's in distribution only.
        is_causal: query i sees keys j <= i, counted from the first key whatever L and S; without attn_mask.
        scale: E**-0.5 by default.
        enable_gqa: key and value may have fewer heads, divisors of H.
        backend: "auto", "cuda", "triton" or "torch".

    Returns:
        (..., H, L, Ev) in the query's dtype; a row that sees no key is 0.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it. It is a RuntimeError, too, as torch's
            are. Unlike torch's, this call refuses head dims of 0 or over 256, nested tensors, and a value whose length
            is not the key's.
        RuntimeError: the named backend cannot run the call.
    """
    if symbolic.any_proxy(query, key, value):
        return cast(Tensor, symbolic.record(scaled_dot_product_attention, locals()))
    if unknown:
        raise spelling.unexpected(scaled_dot_product_attention, unknown)
    try:
        if (
            attn_mask is None
            and type(query) is type(key) is type(value) is Tensor
            and query.dim() == key.dim() == value.dim() == 4
            and query.shape[:2] == key.shape[:2] == value.shape[:2]
            and query.shape[1]
            and type(is_causal) is bool is type(enable_gqa)
            and type(dropout_p) is float
            and dropout_p == 0.0
            and (scale is None or type(scale) is float)
        ):  # as nearly every call is: `attention` checks the rest
            out: Tensor = attention(
                query, key, value, causal="top_left" if is_causal else False, scale=scale, backend=backend
            )
            return out
        return _attend(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, backend)
    except (ValueError, TypeError) as error:
        raise standing_in(error, _NAMES) from None


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    backend: str,
) -> Tensor:
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        arguments.check_tensor(name, tensor)
        if tensor.dim() < 2:
            raise ArgumentError(f"{name}: got {tensor.dim()} dimensions, needs at least 2")
    for name, flag in (("is_causal", is_causal), ("enable_gqa", enable_gqa)):
        if not isinstance(flag, bool):
            raise TypeError(f"{name}: got {type(flag).__name__}, needs a bool")
    if attn_mask is not None and is_causal:
        raise ArgumentError("attn_mask: got a tensor besides is_causal=True, needs one of them")
    causal: bool | str = "top_left" if is_causal else False
    if (alignment := _causal_bias(attn_mask)) is not None:
        causal, attn_mask = alignment, None
    rank = max(query.dim(), key.dim(), value.dim())
    outer: tuple[int, ...] = query.shape[:-3]
    if rank != 4 or not outer == key.shape[:-3] == value.shape[:-3]:
        outer, query, key, value = _with_batch_dim(query, key, value)
    query, key, value = _fit_heads(query, key, value, enable_gqa)
    mask = bias = None
    if attn_mask is not None:
        arguments.check_tensor("attn_mask", attn_mask)
        full = (*outer, query.shape[1], query.shape[2], key.shape[2])
        attn_mask = _mask_4d(attn_mask, rank, full)
        mask, bias = (attn_mask, None) if attn_mask.dtype == torch.bool else (None, attn_mask)
    dropout_p, scale = _plain_number(dropout_p), _plain_number(scale)
    drop_all = arguments.is_number(dropout_p) and dropout_p == 1.0
    headless = added = None
    if query.shape[1] == 0:  # `attention` needs a head, if only of no sequence
        headless = query, key, value
        query, key, value = (t.new_empty(0, 1, *t.shape[2:]) for t in headless)
        mask, bias, added = None, None, bias
    out = attention(
        query,
        key,
        value,
        causal=causal,
        mask=mask,
        bias=bias,
        dropout_p=0.0 if drop_all else dropout_p,
        scale=scale,
        backend=backend,
    )
    if headless is not None:
        out = _nothing(*headless, added)
    if drop_all:
        out = F.dropout(out, 1.0)
    return _of_rank(out, rank, outer)


def _of_rank(out: Tensor, rank: int, outer: tuple[int, ...]) -> Tensor:
    """(B, H, L, Ev) with the leading dimensions restored."""
    if rank == 4:
        return out
    if rank < 4:
        return out.view(out.shape[4 - rank :])
    return out.unflatten(0, outer)


def _plain_number(number: Any) -> Any:
    """A 0-d tensor without a gradient is a number to torch's call, too."""
    return (
        number.item()
        if isinstance(number, Tensor) and not number.dim() and not number.requires_grad
        else number
    )


def _causal_bias(attn_mask: Any) -> bool | str | None:
    """The alignment of one of torch's causal mask objects; None for other masks."""
    # slow to import, and already loaded where such a mask exists
    bias = sys.modules.get("torch.nn.attention.bias")
    if attn_mask is None or bias is None or not isinstance(attn_mask, bias.CausalBias):
        return None
    return True if attn_mask.variant == bias.CausalVariant.LOWER_RIGHT else "top_left"


def _nothing(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
    """The result for no heads, (B, 0, L, Ev), from which every input gets its gradient of zeros."""
    scores = query @ key.mT
    return ((scores if bias is None else scores + bias.to(scores.dtype)) @ value).to(query.dtype)


def _with_batch_dim(
    query: Tensor, key: Tensor, value: Tensor
) -> tuple[tuple[int, ...], Tensor, Tensor, Tensor]:
    """(outer, q, k, v): what lies before the heads, broadcast, and the tensors with that as one dimension."""
    tensors = [t[(None,) * (4 - t.dim())] if t.dim() < 4 else t for t in (query, key, value)]
    try:
        outer = tuple(torch.broadcast_shapes(*(t.shape[:-3] for t in tensors)))
    except RuntimeError:
        got = ", ".join(str(arguments.shape_of(t)) for t in (query, key, value))
        raise ArgumentError(f"query, key, value: got shapes {got}, whose batches do not broadcast") from None
    q, k, v = (t.expand(*outer, *t.shape[-3:]).flatten(0, len(outer) - 1) for t in tensors)
    return outer, q, k, v


def _fit_heads(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The tensors with heads as `attention` takes them: as many keys as values, a divisor of the queries."""
    heads, key_heads, value_heads = query.shape[1], key.shape[1], value.shape[1]
    if heads == key_heads == value_heads:
        return query, key, value
    got = f"got {heads}, {key_heads} and {value_heads} heads"
    if enable_gqa:
        if any(n == 0 or heads % n for n in (key_heads, value_heads)):
            raise ArgumentError(f"query, key, value: {got}, needs divisors of the query's")
        if key_heads != value_heads:
            key = key.repeat_interleave(heads // key_heads, dim=1)
            value = value.repeat_interleave(heads // value_heads, dim=1)
        return query, key, value
    widest = max(heads, key_heads, value_heads)
    if any(n not in (1, widest) for n in (heads, key_heads, value_heads)):
        raise ArgumentError(
            f"query, key, value: {got}, which do not broadcast; enable_gqa=True allows fewer keys"
        )
    if key_heads != value_heads:
        key, value = (t.expand(-1, widest, -1, -1) for t in (key, value))
    return query.expand(-1, widest, -1, -1), key, value


def _mask_4d(attn_mask: Tensor, rank: int, full: tuple[int, ...]) -> Tensor:
    """`attn_mask`, broadcastable to `full` (..., H, L, S), with one dimension before the heads."""
    if attn_mask.dim() > rank or any(
        size not in (1, whole) for size, whole in zip(reversed(attn_mask.shape), reversed(full))
    ):
        got, needs = arguments.shape_of(attn_mask), full[len(full) - rank :]
        raise ArgumentError(f"attn_mask: got shape {got}, needs one that broadcasts to {needs}")
    if attn_mask.dtype != torch.bool:
        arguments.check_floating("attn_mask", attn_mask)
    mask = attn_mask[(None,) * (len(full) - attn_mask.dim())]
    outer = len(full) - 3
    if outer == 1:
        return mask
    if any(size != 1 for size in mask.shape[:outer]):
        mask = mask.expand(*full[:outer], *mask.shape[outer:])
    return mask.flatten(0, outer - 1)
