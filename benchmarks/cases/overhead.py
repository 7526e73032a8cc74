"""Host cost of a call: every op on inputs too small to compute anything, beside torch's nearest call."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from measure import calls
from measure.harness import Budget
from measure.protocols import Judgement, Step
from report import schema

BUDGET = Budget(seconds=0.7, most_rounds=200, memory=False)
BATCH, HEADS, LENGTH, HEAD_DIM, WIDTH, CLASSES = 1, 2, 16, 16, 32, 64
Calls = dict[str, calls.Call]
DIRECTIONS = {
    "forward": "forward",
    "forward-grad": "forward in grad mode",
    "forward+backward": "forward + backward",
}


@dataclass(frozen=True)
class OverheadCase:
    """One op on a few numbers; `direction` says whether gradients are computed."""

    op: str
    direction: str
    dtype: torch.dtype = torch.float32

    flops = bytes = target = axis = None

    @property
    def name(self) -> str:
        """The op and the direction."""
        return f"{self.op}-{self.direction}"

    @property
    def group(self) -> str:
        """The op."""
        return self.op

    @property
    def params(self) -> schema.Result:
        """The sizes, for the result."""
        return {"batch": BATCH, "heads": HEADS, "length": LENGTH, "head_dim": HEAD_DIM}

    @property
    def label(self) -> str:
        """The op in words."""
        return f"{self.op}, {DIRECTIONS[self.direction]}"

    def providers(self, device: torch.device) -> list[str]:
        """Ours, and torch's nearest."""
        return list(OPS[self.op].providers)

    def open(self, device: torch.device) -> OverheadWorkload:
        """Random inputs on the device."""
        return OverheadWorkload(self, device)

    def small(self) -> OverheadCase:
        """The case itself, which is small already."""
        return self


class OverheadWorkload:
    """The few numbers of one op."""

    def __init__(self, case: OverheadCase, device: torch.device) -> None:
        self.case, op = case, OPS[case.op]
        torch.manual_seed(7)
        made = {
            name: torch.randn(shape, device=device, dtype=case.dtype) for name, shape in op.shapes.items()
        }
        self.inputs = calls.leaves_of(made, case.direction)
        self.calls = op.calls(device)
        self.dout = None if op.scalar else torch.randn(op.out_shape, device=device, dtype=case.dtype)

    def step(self, provider: str) -> Step:
        """One forward, or one with its backward."""
        return calls.step_of(self.calls[provider], self.inputs, self.dout, self.case.direction)

    def judge(self, provider: str) -> Judgement | None:
        """None: the other benches compare results; this one only measures time."""
        return None


@dataclass(frozen=True)
class Op:
    """An op's inputs by the names of their gradients, its result, and its providers."""

    shapes: Mapping[str, tuple[int, ...]]
    out_shape: tuple[int, ...]
    providers: tuple[str, ...]
    calls: Callable[[torch.device], Calls]
    gradient: bool = True

    @property
    def scalar(self) -> bool:
        """Whether the result is a loss."""
        return not self.out_shape


PADDED, PACKED = (BATCH, HEADS, LENGTH, HEAD_DIM), (LENGTH, HEADS, HEAD_DIM)
QKV = {"dq": PADDED, "dk": PADDED, "dv": PADDED}


def _attention(device: torch.device) -> Calls:
    import fastattn

    return {
        "fastattn": lambda q, k, v: fastattn.attention(q, k, v, causal=True),
        "fastattn-sdpa": lambda q, k, v: fastattn.scaled_dot_product_attention(q, k, v, is_causal=True),
        "sdpa": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
    }


def _window(device: torch.device) -> Calls:
    import fastattn

    row = torch.arange(LENGTH, device=device)
    mask = (row[:, None] >= row) & (row[:, None] - row <= 4)
    return {
        "fastattn": lambda q, k, v: fastattn.attention(q, k, v, window=(4, 0)),
        "sdpa": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask),
    }


def _varlen(device: torch.device) -> Calls:
    import fastattn

    cu_seqlens = torch.tensor([0, LENGTH // 2, LENGTH], dtype=torch.int32, device=device)
    longest = LENGTH // 2

    def padded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        query, key, value = (t.view(2, longest, HEADS, HEAD_DIM).transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(PACKED)

    return {
        "fastattn": lambda q, k, v: fastattn.attention_varlen(
            q, k, v, cu_seqlens, cu_seqlens, longest, longest
        ),
        "sdpa": padded,
    }


def _kv_cache(device: torch.device) -> Calls:
    import fastattn

    lengths = torch.full((BATCH,), LENGTH - 1, dtype=torch.int32, device=device)

    def ours(query: Tensor, k_cache: Tensor, v_cache: Tensor, new: Tensor) -> Any:
        return fastattn.attention_kv_cache(query, k_cache, v_cache, lengths, key=new, value=new)

    def theirs(query: Tensor, k_cache: Tensor, v_cache: Tensor, new: Tensor) -> Tensor:
        k_cache[:, :, LENGTH - 1] = new[:, :, 0]
        v_cache[:, :, LENGTH - 1] = new[:, :, 0]
        return F.scaled_dot_product_attention(query, k_cache, v_cache)

    return {"fastattn": ours, "sdpa": theirs}


def _module(device: torch.device) -> Calls:
    import fastattn

    torch.manual_seed(7)
    ours: Any = fastattn.MultiHeadAttention(WIDTH, HEADS, batch_first=True).to(device)
    theirs = torch.nn.MultiheadAttention(WIDTH, HEADS, batch_first=True).to(device)
    theirs.load_state_dict(ours.state_dict())
    return {
        "fastattn": lambda x: ours(x, x, x, need_weights=False)[0],
        "torch": lambda x: theirs(x, x, x, need_weights=False)[0],
    }


def _softmax(device: torch.device) -> Calls:
    import fastattn

    return {"fastattn": lambda x: fastattn.softmax(x), "torch": lambda x: x.softmax(-1)}


def _cross_entropy(device: torch.device) -> Calls:
    import fastattn

    target = torch.arange(LENGTH, device=device)
    return {
        "fastattn": lambda x: fastattn.cross_entropy(x, target),
        "torch": lambda x: F.cross_entropy(x, target),
    }


def _linear_cross_entropy(device: torch.device) -> Calls:
    import fastattn

    target = torch.arange(LENGTH, device=device)
    return {
        "fastattn": lambda x, w: fastattn.linear_cross_entropy(x, w, target),
        "torch": lambda x, w: F.cross_entropy(x @ w.T, target),
    }


ONE_TOKEN = (BATCH, HEADS, 1, HEAD_DIM)
DECODE_SHAPES = {"query": ONE_TOKEN, "k_cache": PADDED, "v_cache": PADDED, "new": ONE_TOKEN}
ROWS = (LENGTH, CLASSES)
OPS = {
    "attention": Op(QKV, PADDED, ("fastattn", "fastattn-sdpa", "sdpa"), _attention),
    "attention-window": Op(QKV, PADDED, ("fastattn", "sdpa"), _window),
    "attention-varlen": Op(dict.fromkeys(QKV, PACKED), PACKED, ("fastattn", "sdpa"), _varlen),
    "attention-kv-cache": Op(
        DECODE_SHAPES, DECODE_SHAPES["query"], ("fastattn", "sdpa"), _kv_cache, gradient=False
    ),
    "multi-head-attention": Op(
        {"dx": (BATCH, LENGTH, WIDTH)}, (BATCH, LENGTH, WIDTH), ("fastattn", "torch"), _module
    ),
    "softmax": Op({"dx": ROWS}, ROWS, ("fastattn", "torch"), _softmax),
    "cross-entropy": Op({"dx": ROWS}, (), ("fastattn", "torch"), _cross_entropy),
    "linear-cross-entropy": Op(
        {"dx": (LENGTH, WIDTH), "dw": (CLASSES, WIDTH)}, (), ("fastattn", "torch"), _linear_cross_entropy
    ),
}


def cases_for(device: torch.device) -> list[OverheadCase]:
    """Every op without gradients, in grad mode, and with its backward where it has one; half precision on a GPU."""
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    directions = {name: tuple(DIRECTIONS) if op.gradient else ("forward",) for name, op in OPS.items()}
    return [OverheadCase(name, each, dtype) for name, every in directions.items() for each in every]
