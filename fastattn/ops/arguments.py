"""The arguments of the public ops: refused by name before any work, or put in the one form backends see."""

from __future__ import annotations

import numbers
from typing import Any

import torch
from torch import Tensor

from fastattn import backends
from fastattn.ops.autocast import autocast_qkv
from fastattn.ops.values import readable
from fastattn.philox import draw_seed
from fastattn.spec import FLOAT_DTYPES, MAX_HEAD_DIM, accumulation_dtype


class OverlapError(ValueError, RuntimeError):
    """An op would write one memory location twice, or one that it also reads: torch raises RuntimeError."""


class OutOfRangeError(ValueError, IndexError):
    """A class or an index that does not exist: torch raises IndexError."""


INT32 = torch.iinfo(torch.int32)
INTEGER_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def call_arguments(
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
    draw: bool = True,
) -> tuple[Any, ...]:
    """The public arguments of `attention`, checked and put in the order of AttentionCall's fields.

    draw: draw a dropout seed where none was given; if False the seed stays None, see `with_drawn_seed`.
    """
    query, key, value = autocast_qkv(query, key, value)
    check_qkv(query, key, value)
    batch, num_heads, seqlen_q, head_dim = query.shape
    seqlen_k = key.shape[2]
    full = (batch, num_heads, seqlen_q, seqlen_k)

    if mask is not None:
        check_tensor("mask", mask)
        if mask.dtype != torch.bool:
            raise TypeError(
                f"mask: got {mask.dtype}, needs bool (True = attend); additive masks are passed as bias"
            )
        mask = broadcastable_4d("mask", mask, full, query)
    if bias is not None:
        check_tensor("bias", bias)
        check_floating("bias", bias)
        bias = broadcastable_4d("bias", bias, full, query)
    query_segments = key_segments = None
    if segment_ids is not None:
        ids_q, ids_k = segment_pair(segment_ids, seqlen_q, seqlen_k)
        query_segments = check_integers("segment_ids", ids_q, (batch, seqlen_q), query)
        key_segments = check_integers("segment_ids", ids_k, (batch, seqlen_k), query)
    if key_lengths is not None:
        key_lengths = check_integers("key_lengths", key_lengths, (batch,), query)
    if alibi_slopes is not None:
        alibi_slopes = per_head_slopes(alibi_slopes, batch, num_heads, query)
    if sinks is not None:
        check_tensor("sinks", sinks)
        check_floating("sinks", sinks)
        check_device("sinks", sinks, query)
        if sinks.shape != (num_heads,):
            raise ValueError(f"sinks: got shape {shape_of(sinks)}, needs ({num_heads},)")
        sinks = as_sinks(sinks, query.dtype)
    dropout_p = probability("dropout_p", dropout_p)
    check_seed(dropout_seed)
    causal = causal_mode(causal)
    window_left, window_right = window_bounds(window)
    softcap = softcap_or_zero(softcap, query.dtype)
    scale = score_scale(scale, head_dim, query.dtype)
    seed = None
    if dropout_p > 0.0 and (draw or dropout_seed is not None):  # last: a refused call draws none
        seed = seed_tensor(dropout_seed, query)
    return (
        query, key, value, mask, bias, query_segments, key_segments, key_lengths, alibi_slopes, sinks, seed, causal,
        window_left, window_right, softcap, dropout_p, scale,
    )  # fmt: skip


def segment_pair(
    segment_ids: Tensor | tuple[Tensor, Tensor], seqlen_q: int, seqlen_k: int
) -> tuple[Tensor, Tensor]:
    if isinstance(segment_ids, (tuple, list)):
        if len(segment_ids) != 2:
            raise ValueError(
                f"segment_ids: got {len(segment_ids)} tensors, needs one or a pair (queries, keys)"
            )
        return segment_ids[0], segment_ids[1]
    if seqlen_q != seqlen_k:
        raise ValueError(
            f"segment_ids: got one tensor for {seqlen_q} queries and {seqlen_k} keys, needs a pair (queries, keys)"
        )
    return segment_ids, segment_ids


def seed_tensor(seed: int | Tensor | None, query: Tensor) -> Tensor:
    if seed is None:
        return draw_seed(query.device)
    check_seed(seed)
    if isinstance(seed, Tensor):
        check_device("dropout_seed", seed, query)
        return seed.view(1)
    return torch.full((1,), seed if seed < 2**63 else seed - 2**64, dtype=torch.int64, device=query.device)


def with_drawn_seed(args: tuple[Any, ...], position: int) -> tuple[Any, ...]:
    """The arguments of a call with a seed of torch's generator at `position`."""
    return (*args[:position], draw_seed(args[0].device), *args[position + 1 :])


def check_seed(seed: int | Tensor | None) -> None:
    """An integer of 64 bits, one int64 element, or None."""
    if isinstance(seed, Tensor):
        check_tensor("dropout_seed", seed)
        if seed.dtype != torch.int64 or seed.numel() != 1:
            got = f"{seed.dtype} of shape {shape_of(seed)}"
            raise TypeError(f"dropout_seed: got {got}, needs an int or one int64 element")
    elif seed is not None:
        if not is_integer(seed):
            raise TypeError(f"dropout_seed: got {type(seed).__name__}, needs an int or one int64 element")
        if not -(2**63) <= seed < 2**64:
            raise ValueError(f"dropout_seed: got {seed}, needs a 64-bit integer")


def shape_of(tensor: Tensor) -> tuple[int, ...]:
    """A shape as messages print it."""
    return tuple(tensor.shape)


def check_qkv(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Ranks, sizes, dtypes and devices of (B, H, Sq, D), (B, Hkv, Sk, D), (B, Hkv, Sk, Dv)."""
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        check_tensor(name, tensor)
        if tensor.dim() != 4:
            raise ValueError(
                f"{name}: got shape {shape_of(tensor)}, needs 4 dimensions (batch, heads, length, dim)"
            )
        if tensor.dtype not in FLOAT_DTYPES:
            raise TypeError(f"{name}: got {tensor.dtype}, needs float16, bfloat16, float32 or float64")
        check_device(name, tensor, query)
    dtype = query.dtype
    (batch, heads, _, head_dim), (_, kv_heads, seqlen_k, key_dim) = query.shape, key.shape
    _, value_heads, value_length, value_dim = value.shape
    for name, tensor in (("key", key), ("value", value)):
        if tensor.dtype != dtype:
            raise TypeError(f"{name}: got {tensor.dtype}, needs the query's {dtype}; cast it or use autocast")
        if tensor.shape[0] != batch:
            raise ValueError(f"{name}: got batch size {tensor.shape[0]}, needs the query's {batch}")
    if key_dim != head_dim:
        raise ValueError(f"key: got head dim {key_dim}, needs the query's {head_dim}")
    if value_heads != kv_heads:
        raise ValueError(f"value: got {value_heads} heads, needs the key's {kv_heads}")
    if value_length != seqlen_k:
        raise ValueError(f"value: got length {value_length}, needs the key's {seqlen_k}")
    if kv_heads == 0 or heads % kv_heads != 0:
        raise ValueError(f"key: got {kv_heads} heads, which does not divide the query's {heads}")
    for name, dim in (("query", head_dim), ("value", value_dim)):
        if not 1 <= dim <= MAX_HEAD_DIM:
            raise ValueError(f"{name}: got head dim {dim}, needs 1 to {MAX_HEAD_DIM}")


def check_tensor(name: str, tensor: Any) -> None:
    """Refuse a value that is not a torch tensor."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: got {type(tensor).__name__}, needs a torch.Tensor")
    if tensor.is_nested:
        raise TypeError(f"{name}: got a nested tensor, needs a dense one; pad it and pass key_lengths")
    if tensor.layout != torch.strided:
        raise TypeError(f"{name}: got a tensor of layout {tensor.layout}, needs a dense one")


def check_device(name: str, tensor: Tensor, query: Tensor) -> None:
    """Refuse a tensor on another device than the query's."""
    if tensor.device != query.device:
        raise ValueError(f"{name}: got device {tensor.device}, needs the query's {query.device}")


def check_floating(name: str, tensor: Tensor) -> None:
    """A float dtype."""
    if tensor.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name}: got {tensor.dtype}, needs a float dtype")


def check_integers(name: str, tensor: Tensor, shape: tuple[int, ...], query: Tensor) -> Tensor:
    """Integers of one shape, returned as contiguous int32."""
    check_tensor(name, tensor)
    if tensor.dtype not in INTEGER_DTYPES:
        raise TypeError(f"{name}: got {tensor.dtype}, needs integers")
    if shape_of(tensor) != shape:
        raise ValueError(f"{name}: got shape {shape_of(tensor)}, needs {shape}")
    check_device(name, tensor, query)
    return as_int32(name, tensor)


def as_int32(name: str, tensor: Tensor) -> Tensor:
    """Checked integers as contiguous int32; on a CPU values that do not fit are refused."""
    if tensor.dtype == torch.int32:
        return tensor.contiguous()
    if tensor.dtype == torch.int64 and tensor.device.type == "cpu" and tensor.numel() and readable(tensor):
        lowest, highest = (int(n) for n in torch.aminmax(tensor))
        if not (lowest >= INT32.min and highest <= INT32.max):
            raise ValueError(f"{name}: got values from {lowest} to {highest}, needs 32-bit integers")
    return tensor.to(torch.int32).contiguous()


def requires_grad(tensor: Tensor | None) -> bool:
    """Whether a tensor that may not be given requires grad."""
    return tensor is not None and tensor.requires_grad


def broadcastable_4d(name: str, tensor: Tensor, full: tuple[int, ...], query: Tensor) -> Tensor:
    """`tensor` with leading ones up to rank 4, each size 1 or that of `full`."""
    check_device(name, tensor, query)
    if tensor.dim() > 4 or any(
        size != 1 and size != whole for size, whole in zip(reversed(tensor.shape), reversed(full))
    ):
        raise ValueError(f"{name}: got shape {shape_of(tensor)}, needs one that broadcasts to {full}")
    return with_leading_ones(tensor, 4)


def with_leading_ones(tensor: Tensor, rank: int) -> Tensor:
    """`tensor` with dimensions of 1 in front, up to a rank."""
    return tensor[(None,) * (rank - tensor.dim())] if tensor.dim() < rank else tensor


def causal_mode(causal: bool | str) -> str:
    """The mode, "none", "bottom_right" or "top_left" from the public argument."""
    if causal is True or causal == "bottom_right":
        return "bottom_right"
    if causal is False:
        return "none"
    if isinstance(causal, str) and causal == "top_left":
        return "top_left"
    raise ValueError(f"causal: got {causal!r}, needs False, True (bottom right) or 'top_left'")


def window_bounds(window: tuple[int | None, int | None] | None) -> tuple[int, int]:
    """(left, right) with -1 for an unbounded side."""
    if window is None:
        return -1, -1
    if not isinstance(window, (tuple, list)) or len(window) != 2:
        raise ValueError(f"window: got {window!r}, needs None or a pair (left, right)")
    sides = []
    for side in window:
        if side is None:
            sides.append(-1)
        elif not is_integer(side):
            raise TypeError(f"window: got {window!r}, needs integers or None")
        elif side < -1:
            raise ValueError(f"window: got {window!r}, needs sides of 0 or more; None or -1 is unbounded")
        else:
            sides.append(side if side <= INT32.max else -1)  # no sequence is longer
    return sides[0], sides[1]


def is_integer(number: Any) -> bool:
    """A Python, numpy or symbolic integer; not a bool."""
    return isinstance(number, (int, numbers.Integral, torch.SymInt)) and not isinstance(number, bool)


def is_number(number: Any) -> bool:
    """A Python, numpy or symbolic real number; not a bool."""
    return (
        isinstance(number, float) or is_integer(number) or isinstance(number, (numbers.Real, torch.SymFloat))
    )


def finite_number(
    name: str, number: Any, dtype: torch.dtype | None = None, *, or_none: bool = False
) -> float:
    """A number that stays finite where scores of `dtype` operands are kept; without a dtype, any finite number.

    Scores are kept in float32, in float64 for float64, and the factors on them are multiplied by log2(e) for
    exponentials of base 2, so a number may be up to half the largest. The scores themselves may still overflow: +inf
    gives NaN, -inf the weight 0.
    """
    if isinstance(number, bool) or not is_number(number):
        raise TypeError(f"{name}: got {type(number).__name__}, needs a number{' or None' if or_none else ''}")
    if not abs(number) < 2.0**1023:  # NaN too; math.isfinite takes no symbolic number
        raise ValueError(f"{name}: got {number}, needs a finite number{' or None' if or_none else ''}")
    if dtype not in (None, torch.float64) and not abs(number) < 2.0**127:
        raise ValueError(f"{name}: got {number}, needs less than 2**127: {dtype} is computed in float32")
    return float(number)


def softcap_or_zero(softcap: float | None, dtype: torch.dtype | None) -> float:
    """The softcap, which neither overflows nor underflows in the dtype that scores of `dtype` operands are kept in; 0.0
    for None. Without a dtype any positive finite number."""
    if softcap is None:
        return 0.0
    if is_number(softcap) and not (softcap > 0 and abs(softcap) < 2.0**1023):
        raise ValueError(f"softcap: got {softcap}, needs a positive finite number or None")
    softcap = finite_number("softcap", softcap, dtype, or_none=True)
    if dtype is not None and softcap < (least := torch.finfo(accumulation_dtype(dtype)).tiny):
        raise ValueError(
            f"softcap: got {softcap}, needs at least {least:.3g}, a normal number where scores are kept"
        )
    return softcap


def saturated(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A term of the scores of operands of `dtype`, its finite values within the range of the dtype scores are kept in:
    the largest float64 must not become an infinity."""
    kept = accumulation_dtype(dtype)
    if tensor.dtype != torch.float64 or kept == torch.float64:
        return tensor
    largest = torch.finfo(kept).max
    return torch.where(tensor.isinf(), tensor, tensor.clamp(-largest, largest))


def probability(name: str, number: float) -> float:
    """A number in [0, 1)."""
    if isinstance(number, bool) or not is_number(number):
        raise TypeError(f"{name}: got {type(number).__name__}, needs a number")
    if not 0.0 <= number < 1.0:
        raise ValueError(f"{name}: got {number}, needs 0 <= p < 1")
    return float(number)


def score_scale(scale: float | None, head_dim: int, dtype: torch.dtype) -> float:
    """The factor on q.k: D**-0.5 unless given."""
    return head_dim**-0.5 if scale is None else finite_number("scale", scale, dtype, or_none=True)


def check_returned_weights(kind: bool | str) -> None:
    """False, True or "mean"."""
    if not isinstance(kind, (bool, str)) or kind not in (False, True, "mean"):
        raise ValueError(f"return_weights: got {kind!r}, needs False, True or 'mean'")


def per_head_slopes(slopes: Tensor, batch: int, num_heads: int, query: Tensor) -> Tensor:
    """ALiBi slopes (H,) or (B, H) as (1 or B, H) in the accumulation dtype."""
    check_tensor("alibi_slopes", slopes)
    check_floating("alibi_slopes", slopes)
    check_device("alibi_slopes", slopes, query)
    if slopes.shape != (num_heads,) and slopes.shape != (batch, num_heads):
        raise ValueError(
            f"alibi_slopes: got shape {shape_of(slopes)}, needs ({num_heads},) or ({batch}, {num_heads})"
        )
    return as_slopes(slopes, query.dtype)


def as_slopes(slopes: Tensor, dtype: torch.dtype) -> Tensor:
    """Checked slopes as (1 or B, H) in the accumulation dtype of operands of `dtype`."""
    slopes = saturated(slopes, dtype)
    return (slopes[None] if slopes.dim() == 1 else slopes).to(accumulation_dtype(dtype))


def as_sinks(sinks: Tensor, dtype: torch.dtype) -> Tensor:
    """Checked sinks in the accumulation dtype of operands of `dtype`."""
    return saturated(sinks, dtype).to(accumulation_dtype(dtype))


def check_backend(name: str) -> None:
    """A known backend or "auto"."""
    if name != "auto" and name not in backends.NAMES:
        *names, last = ("auto", *backends.NAMES)
        raise ValueError(f"backend: got {name!r}, needs {', '.join(names)} or {last}")
