"""Launches that are noted instead of made, and calls of every op that launches, which the tests of replays share."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import fastattn
from fastattn.spec import GradsNeeded

Tensors = dict[str, Tensor]
Call = Callable[..., Any]


class Noted:
    """The launches of Triton, described so that two calls on other memory can be compared."""

    def __init__(self) -> None:
        self.launches: list[Any] = []

    def start(self, launch: Any) -> None:
        """Note a launch."""
        self.launches.append(launch)

    def take(self, inputs: dict[str, Tensor]) -> list[Any]:
        """The launches since the last look: kernels, grids, arguments, options."""
        told = described([launch.args for launch in self.launches], inputs)
        found = [
            (launch.kernel.fn.__name__, launch.grid, args, launch.options)
            for launch, args in zip(self.launches, told)
        ]
        self.launches.clear()
        return found


def described(launches: Sequence[Sequence[Any]], inputs: dict[str, Tensor]) -> list[tuple[Any, ...]]:
    """Arguments of launches: numbers, and of each tensor the input whose memory it is, or which of those that were
    made, its place there, dtype and alignment."""
    places = {tensor.untyped_storage().data_ptr(): name for name, tensor in reversed(inputs.items())}
    made: dict[int, int] = {}

    def told(value: Any) -> Any:
        if isinstance(value, Tensor):
            start = value.untyped_storage().data_ptr()
            if not value.numel():
                return "empty", value.dtype
            name: Any = places.get(start)
            if name is None:
                name = made.setdefault(start, len(made))
            return name, value.data_ptr() - start, value.dtype, value.data_ptr() % 16
        if isinstance(value, tuple):
            return type(value).__name__, tuple(map(told, value))
        if hasattr(value, "base"):
            return told(value.base), value.shape, value.strides, value.block_shape
        return type(value).__name__, repr(value)

    return [tuple(map(told, args)) for args in launches]


@contextlib.contextmanager
def noted() -> Iterator[Noted]:
    """Inside, calls go to Triton, and its launches are noted."""
    from fastattn.kernels.arguments import Launch

    found = Noted()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Launch, "start", lambda launch: found.start(launch))
        patch.setenv("FASTATTN_BACKEND", "triton")
        yield found


def graded(call: Call, tensors: Tensors, upstream: Callable[[Tensor], Tensor] = torch.ones_like) -> Tensors:
    """A call, and its backward where something requires grad; the gradients that arrived, by name."""
    results = call(tensors)
    results = results if isinstance(results, tuple) else (results,)
    given = {f"upstream {n}": upstream(r) for n, r in enumerate(results) if r.requires_grad}
    leaves = [t for t in tensors.values() if t.requires_grad]
    if given:
        of = [r for r in results if r.requires_grad]
        torch.autograd.grad(of, leaves, list(given.values()), allow_unused=True)
    return given


def launched(found: Noted, call: Call, tensors: Tensors, **options: Any) -> Any:
    """What a call launches, or the error it raises."""
    try:
        given = graded(call, tensors, **options)
    except (ValueError, TypeError, RuntimeError) as error:
        found.take({})
        return type(error), str(error)
    return found.take({**tensors, **given})


def without_plan(found: Noted, call: Call, tensors: Tensors, **options: Any) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTATTN_DISABLE", "plan")
        return launched(found, call, tensors, **options)


def heads(dtype: torch.dtype = torch.float16, kv: int = 2, seqlen: int = 12, **dims: int) -> Tensors:
    dim, value_dim = dims.get("dim", 16), dims.get("value_dim", dims.get("dim", 16))
    return {
        "query": torch.zeros(2, 4, seqlen, dim, dtype=dtype),
        "key": torch.zeros(2, kv, 12, dim, dtype=dtype),
        "value": torch.zeros(2, kv, 12, value_dim, dtype=dtype),
    }


def attend(tensors: Tensors, precision: str | None = None, **options: Any) -> Any:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision or before)
    ids = (tensors["query_ids"], tensors["key_ids"]) if "key_ids" in tensors else None
    rest = {name: t for name, t in tensors.items() if not name.endswith("_ids")}
    try:
        return fastattn.attention(**rest, segment_ids=ids, return_lse=True, **options)
    finally:
        torch.set_float32_matmul_precision(before)


def requiring(tensors: Tensors, *names: str) -> Tensors:
    return {name: t.requires_grad_(name in names) for name, t in tensors.items()}


IDS = {"query_ids": torch.zeros(2, 12, dtype=torch.int32), "key_ids": torch.ones(2, 12, dtype=torch.int32)}
BIAS, SLOPES = torch.zeros(2, 4, 12, 12, dtype=torch.float16), torch.ones(2, 4)


def wider(tensor: Tensor, every: int, first: int = 0) -> Tensor:
    """The same shape with its last stride `every`, from the `first` element of other memory on."""
    memory = torch.zeros(tensor.numel() * every + first, dtype=tensor.dtype)
    strides = [stride * every for stride in torch.empty(tensor.shape, device="meta").stride()]
    return memory.as_strided(tensor.shape, strides, first).copy_(tensor)


# Memory of any tensor, by what differs from a contiguous one at a multiple of 16 bytes.
CLASSES: dict[str, Callable[[Tensor], Tensor]] = {
    "one element on": lambda t: wider(t, 1, 1),
    "columns apart": lambda t: wider(t, 2),
    "dims in another order": lambda t: t.transpose(0, -2).contiguous().transpose(0, -2) if t.dim() > 1 else t,
    "columns outermost": lambda t: t.movedim(-1, 0).contiguous().movedim(0, -1),
    "rows of a longer row": lambda t: torch.cat((t, t[..., :3]), -1)[..., : t.shape[-1]],
    "repeated": lambda t: t[:1].expand_as(t),
}  # fmt: skip


def everything() -> Tensors:
    """A call with every tensor that attention takes."""
    return {
        **heads(), "mask": torch.ones(2, 4, 12, 12, dtype=torch.bool), "bias": BIAS.clone(), **IDS,
        "key_lengths": torch.tensor([3, 4], dtype=torch.int32), "alibi_slopes": SLOPES.clone(),
        "sinks": torch.zeros(4), "dropout_seed": torch.tensor([3]),
    }  # fmt: skip


def packed(tensors: Tensors) -> Any:
    return fastattn.attention_varlen(**tensors, causal=True, return_lse=True)


def packed_tensors() -> Tensors:
    offsets = torch.tensor([0, 5, 12, 24], dtype=torch.int32)
    shapes = {"query": (24, 4, 16), "key": (24, 2, 16), "value": (24, 2, 16)}
    made = {name: torch.zeros(shape, dtype=torch.float16) for name, shape in shapes.items()}
    slopes = {"alibi_slopes": torch.ones(3, 4), "sinks": torch.zeros(4)}
    return {**made, "cu_seqlens_q": offsets, "cu_seqlens_k": offsets.clone(), **slopes}


def decode(tensors: Tensors) -> Any:
    return fastattn.attention_kv_cache(**tensors, return_lse=True, num_splits=2)


def cache_tensors() -> Tensors:
    shapes = {"query": (2, 4, 1, 16), "k_cache": (8, 2, 16, 16), "v_cache": (8, 2, 16, 16), "key": (2, 2, 1, 16),
              "value": (2, 2, 1, 16)}  # fmt: skip
    made = {name: torch.zeros(shape, dtype=torch.float16) for name, shape in shapes.items()}
    table = torch.arange(8, dtype=torch.int32).view(2, 4)
    rotary = {name: torch.ones(64, 8, dtype=torch.float16) for name in ("rotary_cos", "rotary_sin")}
    lengths = torch.tensor([17, 40], dtype=torch.int32)
    return {
        **made,
        "cache_lengths": lengths,
        "block_table": table,
        **rotary,
        "alibi_slopes": torch.ones(2, 4),
    }


def rows(tensors: Tensors) -> Any:
    return fastattn.softmax(**tensors, dim=1)


def loss(tensors: Tensors, reduction: str = "mean") -> Any:
    return fastattn.cross_entropy(**tensors, reduction=reduction, label_smoothing=0.1)


def loss_tensors() -> Tensors:
    return {
        "logits": torch.zeros(12, 32, dtype=torch.float16), "target": torch.zeros(12, dtype=torch.int64),
        "class_weight": torch.ones(32),
    }  # fmt: skip


OPS: dict[str, tuple[Call, Callable[[], Tensors], tuple[str, ...]]] = {
    "attention": (partial(attend, dropout_p=0.5), everything, GradsNeeded._fields),
    "varlen": (packed, packed_tensors, ("query", "key", "value", "alibi_slopes", "sinks")),
    "kv_cache": (decode, cache_tensors, ()),
    "softmax": (rows, lambda: {"x": torch.zeros(3, 32, 5), "mask": torch.ones(3, 32, 5, dtype=torch.bool)}, ("x",)),
    "cross_entropy": (loss, loss_tensors, ("logits",)),
    "cross_entropy, none": (partial(loss, reduction="none"), loss_tensors, ("logits",)),
}  # fmt: skip
