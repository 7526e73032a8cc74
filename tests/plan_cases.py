"""Calls of every op that makes a plan, which the tests of plans share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import fastattn

Call = Callable[..., Any]
DTYPES = (torch.float32, torch.bfloat16, torch.float64)


def normal(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, dtype=torch.float32).to(dtype)


def heads(
    dtype: torch.dtype, seqlen_q: int = 12, seqlen_k: int = 12, kv: int = 2, dim: int = 8
) -> list[Tensor]:
    return [
        normal(2, 4, seqlen_q, dim, dtype=dtype),
        *(normal(2, kv, seqlen_k, dim, dtype=dtype) for _ in range(2)),
    ]


def in_order(tensors: list[Tensor]) -> list[Tensor]:
    """The same numbers as views of (B, S, H, D) memory."""
    return [t.transpose(1, 2).contiguous().transpose(1, 2) for t in tensors]


IDS = torch.tensor([[0] * 5 + [1] * 6 + [-1], [0] * 12])
MASK = torch.ones(12, 12, dtype=torch.bool).tril().index_fill(1, torch.tensor([3]), False)
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True},
    "top left": {"causal": "top_left"},
    "window": {"causal": True, "window": (3, 0)},
    "two-sided window": {"window": (3, 2)},
    "scale": {"scale": 0.3},
    "negative scale": {"scale": -0.3},
    "softcap": {"softcap": 5.0},
    "lse": {"return_lse": True, "causal": True},
    "mask": {"mask": MASK},
    "mask of a batch": {"mask": MASK.expand(2, 1, 12, 12)},
    "bias": {"bias": torch.randn(4, 12, 12)},
    "segments": {"segment_ids": IDS},
    "a pair of segments": {"segment_ids": (IDS, IDS.int())},
    "lengths": {"key_lengths": torch.tensor([7, 12])},
    "int32 lengths": {"key_lengths": torch.tensor([7, 0], dtype=torch.int32)},
    "slopes": {"alibi_slopes": torch.tensor([0.5, 0.25, 0.1, 0.05]), "causal": True},
    "slopes of a batch": {"alibi_slopes": torch.rand(2, 4).double()},
    "sinks": {"sinks": torch.randn(4)},
    "dropout": {"dropout_p": 0.25, "dropout_seed": 7},
    "dropout by a tensor": {"dropout_p": 0.25, "dropout_seed": torch.tensor(7)},
    "a drawn seed": {"dropout_p": 0.5},
    "a named backend": {"backend": "torch"},
}  # fmt: skip
CU_SEQLENS = torch.tensor([0, 5, 5, 24], dtype=torch.int32)
PACKED = (
    "plain",
    "causal",
    "top left",
    "window",
    "scale",
    "softcap",
    "lse",
    "sinks",
    "dropout",
    "a drawn seed",
)


def packed(tensors: list[Tensor], **options: Any) -> Any:
    query, key, value = (t.transpose(1, 2).flatten(0, 1) for t in tensors)
    return fastattn.attention_varlen(query, key, value, CU_SEQLENS, CU_SEQLENS, **options)


def cached(tensors: list[Tensor], **options: Any) -> Any:
    query, keys, values = tensors
    caches = [torch.cat((t, torch.zeros_like(t)), 2).detach() for t in (keys, values)]
    new = {"key": keys[:, :, :2].detach(), "value": values[:, :, :2].detach()}
    lengths = torch.tensor([4, options.pop("second", 4)], dtype=torch.int32)
    with torch.no_grad():
        result = fastattn.attention_kv_cache(query[:, :, :2], *caches, lengths, **new, **options)
    return (*(result if isinstance(result, tuple) else (result,)), *caches)


def attended(tensors: list[Tensor], **options: Any) -> Any:
    return fastattn.attention(*tensors, **options)


def rows(tensors: list[Tensor], **options: Any) -> Any:
    return fastattn.softmax(tensors[0], **options)


ROWS: dict[str, dict[str, Any]] = {
    "plain": {}, "log": {"log": True}, "scale": {"scale": 2.0}, "causal": {"causal": True}, "dim": {"dim": 1},
    "mask": {"mask": torch.arange(8) < 5},
}  # fmt: skip
CACHED: dict[str, dict[str, Any]] = {
    "plain": {}, "lengths": {"second": 9}, "window": {"window": (3, 0)}, "splits": {"num_splits": 2},
    "slopes": {"alibi_slopes": torch.rand(4)}, "sinks": {"sinks": torch.randn(4)}, "lse": {"return_lse": True},
    "rotary": {"rotary_cos": torch.rand(32, 4), "rotary_sin": torch.rand(32, 4), "rotary_interleaved": True},
}  # fmt: skip
TARGET = torch.arange(24) % 8


def loss(tensors: list[Tensor], **options: Any) -> Any:
    return fastattn.cross_entropy(tensors[0].flatten(0, 1).flatten(0, 1)[:24], TARGET, **options)


def loss_of_one_row(tensors: list[Tensor], **options: Any) -> Any:
    return fastattn.cross_entropy(tensors[0][0, 0, 0], TARGET[3], **options)


def every_loss_ignored(tensors: list[Tensor], **options: Any) -> Any:
    return fastattn.cross_entropy(tensors[0][0, 0], torch.full((12,), -100), **options).nan_to_num(0.0)


def linear_loss(tensors: list[Tensor], **options: Any) -> Any:
    hidden, weight = (t.flatten(0, 1).flatten(0, 1) for t in tensors[:2])
    return fastattn.linear_cross_entropy(hidden[:24], weight[:16], TARGET, **options)


LOSSES: dict[str, dict[str, Any]] = {
    "mean": {}, "none": {"reduction": "none"}, "sum": {"reduction": "sum"}, "ignored": {"ignore_index": 3},
    "smoothed": {"label_smoothing": 0.1}, "z": {"z_loss": 0.01},
}  # fmt: skip
WEIGHTED = {"class_weight": torch.linspace(0.5, 2, 8)}
CASES: dict[str, tuple[Call, dict[str, Any]]] = {
    **{f"attention, {name}": (attended, options) for name, options in OPTIONS.items()},
    **{f"varlen, {name}": (packed, OPTIONS[name]) for name in PACKED},
    "varlen, bounds": (packed, {"max_seqlen_q": 19, "max_seqlen_k": 24}),
    "varlen, slopes": (packed, {"alibi_slopes": torch.rand(3, 4)}),
    **{f"kv_cache, {name}": (cached, options) for name, options in CACHED.items()},
    **{f"softmax, {name}": (rows, options) for name, options in ROWS.items()},
    **{f"cross_entropy, {name}": (loss, options) for name, options in LOSSES.items()},
    "cross_entropy, weighted": (loss, WEIGHTED),
    "cross_entropy, weighted, z": (loss, {**WEIGHTED, "z_loss": 0.01, "label_smoothing": 0.1}),
    "cross_entropy, all ignored": (every_loss_ignored, {}),
    "cross_entropy, one row": (loss_of_one_row, {}),
    **{f"linear_cross_entropy, {name}": (linear_loss, options) for name, options in LOSSES.items()},
    "linear_cross_entropy, softcap": (linear_loss, {"softcap": 5.0}),
}


def with_grads(call: Call, tensors: list[Tensor], options: dict[str, Any]) -> list[Tensor]:
    """Results of a call, and their gradients to all that may have one."""
    options = dict(options)
    leaves = [t for t in tensors if t.requires_grad]
    for name in ("bias", "alibi_slopes", "sinks"):
        if leaves and call is not cached and name in options:
            options[name] = options[name].detach().clone().requires_grad_()
            leaves.append(options[name])
    torch.manual_seed(3)
    result = call(tensors, **options)
    results = list(result) if isinstance(result, tuple) else [result]
    if not results[0].requires_grad:
        return results
    sums = [
        (r.double() * torch.linspace(-1, 1, r.numel()).double().view(r.shape)).nan_to_num(0, 0, 0).sum()
        for r in results
    ]
    grads = torch.autograd.grad(sum(sums), leaves, allow_unused=True)
    return [*results, *(g for g in grads if g is not None)]


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected):
        assert (one.dtype, one.shape, one.stride()) == (other.dtype, other.shape, other.stride())
        assert one.requires_grad == other.requires_grad
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


BY_OP: dict[str, tuple[Call, dict[str, Any]]] = {
    "attention": (attended, {"causal": True}),
    "attention, sinks": (attended, OPTIONS["sinks"]),
    "varlen": (packed, {}),
    "kv_cache": (cached, {}),
    "softmax": (rows, {}),
    "cross_entropy": (loss, {}),
    "linear_cross_entropy": (linear_loss, {}),
}
