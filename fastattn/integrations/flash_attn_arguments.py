"""flash-attn's arguments: checked under their own names, and converted to those of fastattn's ops."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, cast

import torch
from torch import Tensor

from fastattn.ops import arguments
from fastattn.ops.errors import ArgumentConversionError, ArgumentError, standing_in

P = ParamSpec("P")
R = TypeVar("R")

Window = Any  # a pair of integers, as a tuple, list, tensor or numpy array; a tuple's may be 0-d tensors

_NAMES = {
    "query": "q",
    "key": "k",
    "value": "v",
    "cache_lengths": "cache_seqlens",
    "scale": "softmax_scale",
    "window": "window_size",
    "sinks": "s_aux",
}


def raising_as_flash_attn(function: Callable[P, R]) -> Callable[P, R]:
    """`function` with errors that name flash-attn's arguments and are also RuntimeError, which flash-attn raises."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except (ValueError, TypeError) as error:
            raise standing_in(error, _NAMES) from None

    return call


def heads_first(name: str, tensor: Tensor) -> Tensor:
    """A (B, H, S, D) view of (B, S, H, D)."""
    arguments.check_tensor(name, tensor)
    if tensor.dim() != 4:
        got = arguments.shape_of(tensor)
        raise ValueError(f"{name}: got shape {got}, needs 4 dimensions (batch, length, heads, dim)")
    return tensor.transpose(1, 2)


def unpack(name: str, tensor: Tensor, parts: int, rank: int) -> tuple[Tensor, ...]:
    """The tensors that are stacked in the dimension before the heads."""
    arguments.check_tensor(name, tensor)
    if tensor.dim() != rank or tensor.shape[rank - 3] != parts:
        got, leading = arguments.shape_of(tensor), "batch, length" if rank == 5 else "tokens"
        raise ValueError(f"{name}: got shape {got}, needs ({leading}, {parts}, heads, dim)")
    return tensor.unbind(rank - 3)


def options(
    softmax_scale: float | None,
    causal: bool,
    window_size: Window,
    softcap: float,
    alibi_slopes: Tensor | None,
) -> dict[str, Any]:
    """The options that all of `attention`, `attention_varlen` and `attention_kv_cache` take."""
    if not isinstance(causal, bool):
        raise TypeError(f"causal: got {type(causal).__name__}, needs a bool")
    return {
        "scale": softmax_scale,
        "causal": causal,
        "window": window_of(window_size),
        "softcap": None if isinstance(softcap, (int, float)) and softcap == 0 else softcap,
        "alibi_slopes": alibi_slopes,
    }


def window_of(window_size: Window) -> tuple[Any, Any]:
    """(left, right) of a pair of integers in whatever holds them; reading a CUDA tensor synchronises."""
    got = window_size
    if isinstance(window_size, Tensor) or (
        not isinstance(window_size, (tuple, list)) and hasattr(window_size, "tolist")  # a numpy array
    ):
        window_size = window_size.tolist()
    if not isinstance(window_size, (tuple, list)):
        raise ArgumentConversionError(f"window_size: got {got!r}, needs a pair of integers (left, right)")
    if len(window_size) != 2:
        raise ArgumentError(f"window_size: got {got!r}, needs a pair of integers (left, right)")
    left, right = (
        side.item() if isinstance(side, Tensor) and side.numel() == 1 else side for side in window_size
    )
    return left, right


def length(name: str, number: int | Tensor | None) -> int | None:
    """The longest length, a number or a tensor of one element."""
    value: Any = number.item() if isinstance(number, Tensor) and number.numel() == 1 else number
    if value is not None:
        check_int32(name, value)
    return cast("int | None", value)


def check_int32(name: str, number: Any) -> None:
    """An integer that 32 bits hold."""
    if not arguments.is_integer(number):
        raise TypeError(f"{name}: got {type(number).__name__}, needs an integer")
    if not arguments.INT32.min <= number <= arguments.INT32.max:
        raise ArgumentConversionError(f"{name}: got {number}, needs a 32-bit integer")


def batch_integers(name: str, tensor: Tensor, query: Tensor, batch: int) -> Tensor:
    """(B,) integers as int32."""
    return arguments.check_integers(name, tensor, (batch,), query)


def value_range(tensor: Tensor) -> tuple[int, int] | None:
    """The least and the greatest value, or None where reading them would synchronise or is not possible."""
    if tensor.device.type != "cpu" or not tensor.numel() or torch.compiler.is_compiling():
        return None
    lowest, highest = torch.aminmax(tensor)
    return int(lowest), int(highest)


def check_between(name: str, tensor: Tensor, highest: Tensor, needs: str) -> None:
    """Values from 0 to those of another tensor."""
    if value_range(tensor) is not None and bool(((tensor < 0) | (tensor > highest)).any()):
        raise ArgumentError(f"{name}: got {tensor.tolist()}, needs 0 to {needs}, {highest.tolist()}")
