"""Host cost of a call: every op on inputs so small that a call is nearly all overhead, beside torch's nearest call; and
a decoding step against caches of a real size, where that cost should not matter."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from measure import calls
from measure.harness import Budget
from measure.protocols import Judgement, Step
from report import schema

BUDGET = Budget(seconds=0.7, most_rounds=200, memory=False, launches=True)
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
    target: schema.Result | None = None

    flops = bytes = axis = None

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
        return {"batch": BATCH, **OPS[self.op].sizes}

    @property
    def label(self) -> str:
        """The op in words."""
        return f"{self.op}, {DIRECTIONS[self.direction]}"

    def providers(self, device: torch.device) -> list[str]:
        """Ours, and torch's nearest; on a GPU torch's FlexAttention too where it has the op."""
        op = OPS[self.op]
        return [*op.providers, *(("flex",) if op.flex and device.type == "cuda" else ())]

    def open(self, device: torch.device) -> OverheadWorkload:
        """Random inputs on the device."""
        return OverheadWorkload(self, device)

    def small(self) -> OverheadCase:
        """The case itself, which is small already, without its target."""
        return replace(self, target=None)


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
    flex: bool = False
    sizes: Mapping[str, int] = field(
        default_factory=lambda: {"heads": HEADS, "length": LENGTH, "head_dim": HEAD_DIM}
    )

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
        "flex": _flex(device, lambda batch, head, row, column: row >= column),
    }


def _flex(device: torch.device, sees: Callable[..., Tensor]) -> calls.Call:
    """torch's FlexAttention, compiled at the first call."""

    @cache
    def compiled() -> tuple[Any, Any]:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        mask = create_block_mask(sees, None, None, LENGTH, LENGTH, device=device)
        return torch.compile(flex_attention, dynamic=False), mask

    def call(q: Tensor, k: Tensor, v: Tensor) -> Any:
        attend, mask = compiled()
        return attend(q, k, v, block_mask=mask)

    return call


def _window(device: torch.device) -> Calls:
    import fastattn

    row = torch.arange(LENGTH, device=device)
    mask = (row[:, None] >= row) & (row[:, None] - row <= 4)
    return {
        "fastattn": lambda q, k, v: fastattn.attention(q, k, v, window=(4, 0)),
        "sdpa": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask),
        "flex": _flex(device, lambda batch, head, row, column: (row >= column) & (row - column <= 4)),
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


def _kv_cache(device: torch.device, length: int = LENGTH) -> Calls:
    import fastattn

    held = length - 1
    lengths = torch.full((BATCH,), held, dtype=torch.int32, device=device)

    def ours(query: Tensor, k_cache: Tensor, v_cache: Tensor, key: Tensor, value: Tensor) -> Any:
        return fastattn.attention_kv_cache(query, k_cache, v_cache, lengths, key=key, value=value)

    def theirs(query: Tensor, k_cache: Tensor, v_cache: Tensor, key: Tensor, value: Tensor) -> Tensor:
        k_cache.narrow(2, held, 1).copy_(key)
        v_cache.narrow(2, held, 1).copy_(value)
        return F.scaled_dot_product_attention(
            query, k_cache.narrow(2, 0, length), v_cache.narrow(2, 0, length)
        )

    return {"fastattn": ours, "sdpa": theirs}


def _decode_op(heads: int, length: int, head_dim: int) -> Op:
    """One token appended to caches of which `FREE_TOKENS` tokens are free, and attention to all tokens."""
    one, cache = (BATCH, heads, 1, head_dim), (BATCH, heads, length + FREE_TOKENS, head_dim)
    shapes = {"query": one, "k_cache": cache, "v_cache": cache, "key": one, "value": one}
    sizes = {"heads": heads, "length": length, "head_dim": head_dim}
    calls_of = partial(_kv_cache, length=length)
    return Op(shapes, one, ("fastattn", "sdpa"), calls_of, gradient=False, sizes=sizes)


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


FREE_TOKENS = 16  # tokens of a cache that are free
ROWS = (LENGTH, CLASSES)
OPS = {
    "attention": Op(QKV, PADDED, ("fastattn", "fastattn-sdpa", "sdpa"), _attention, flex=True),
    "attention-window": Op(QKV, PADDED, ("fastattn", "sdpa"), _window, flex=True),
    "attention-varlen": Op(dict.fromkeys(QKV, PACKED), PACKED, ("fastattn", "sdpa"), _varlen),
    "attention-kv-cache": _decode_op(HEADS, LENGTH, HEAD_DIM),
    "attention-kv-cache-128": _decode_op(12, 128, 64),
    "attention-kv-cache-2048": _decode_op(12, 2048, 64),
    "multi-head-attention": Op(
        {"dx": (BATCH, LENGTH, WIDTH)}, (BATCH, LENGTH, WIDTH), ("fastattn", "torch"), _module
    ),
    "softmax": Op({"dx": ROWS}, ROWS, ("fastattn", "torch"), _softmax),
    "cross-entropy": Op({"dx": ROWS}, (), ("fastattn", "torch"), _cross_entropy),
    "linear-cross-entropy": Op(
        {"dx": (LENGTH, WIDTH), "dw": (CLASSES, WIDTH)}, (), ("fastattn", "torch"), _linear_cross_entropy
    ),
}


# On a CPU: the least speed, one over the allowed multiple of the peer's time.
TARGETS = {
    "attention-forward": 0.4,
    "attention-forward-grad": 0.4,
    "attention-forward+backward": 0.4,
    "attention-varlen-forward": 0.286,
    "attention-kv-cache-forward": 0.667,
    "attention-kv-cache-128-forward": 0.87,
    "attention-kv-cache-2048-forward": 0.952,
}


def cases_for(device: torch.device) -> list[OverheadCase]:
    """Every op without gradients, in grad mode, and with its backward where it has one; half precision on a GPU."""
    on_gpu = device.type == "cuda"
    cases = [
        OverheadCase(name, each, torch.float16 if on_gpu else torch.float32)
        for name, op in OPS.items()
        for each in (tuple(DIRECTIONS) if op.gradient else ("forward",))
    ]
    if on_gpu:
        return cases
    return [
        replace(
            case,
            target={"provider": "fastattn", "against": "sdpa", "speed": TARGETS[case.name]},
        )
        if case.name in TARGETS
        else case
        for case in cases
    ]
