"""Runs calls of every op on the stand-in for a Hopper GPU and prints what was launched; run by test_stand_in_driver.py.

python tests/kernels/stand_in_report.py NAME ...      those of CALLS
python tests/kernels/stand_in_report.py --fill DIR    compile them into a cache of Triton's, to be carried to a GPU
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from compile_entries import FEATURES, call_with
from decode_compile import FEATURES as CACHE_FEATURES
from decode_compile import cache_call
from stand_in_driver import Driver, active

from fastattn.backends import triton as backend
from fastattn.backends.replay import Replay
from fastattn.spec import (
    AttentionCall,
    AttentionSpec,
    CrossEntropyCall,
    GradsNeeded,
    SoftmaxCall,
    SoftmaxSpec,
    VarlenCall,
)

ARCH = 90
REPEATS = 3
LENGTHS = (2, 17, 1000, 1024)
BF16 = torch.bfloat16


def _on_gpu(spec: Any) -> Any:
    if isinstance(spec, SoftmaxSpec):
        return replace(spec, device="cuda", arch=ARCH)
    return spec.replace(device="cuda", arch=ARCH)


def attention(dim: int, dtype: torch.dtype, tma: bool | None = None, group: int = 1, **options: Any) -> None:
    """Forward and backward at several lengths, batches and numbers of heads."""
    from fastattn.kernels.tuned import tiles_for

    for length in LENGTHS:
        batch, kv_heads = (1, 4 // min(group, 4)) if length % 2 else (2, 2)
        query = torch.randn(batch, kv_heads * group, length, dim).to(dtype)
        key = query[:, ::group]
        call = AttentionCall(query, key, key, scale=0.125, **options)
        needs = GradsNeeded()
        forward, backward = (_on_gpu(AttentionSpec.of(call, each)) for each in (None, needs))
        chosen = [tiles_for(spec) for spec in (forward, backward)]
        if tma is not None:
            names = ("forward", "dkdv", "dq")
            chosen = [replace(t, **{n: replace(getattr(t, n), tma=tma) for n in names}) for t in chosen]
        out, lse = backend.attention_fwd(forward, call, chosen[0])
        backend.attention_bwd(backward, call, out, lse, torch.randn_like(out), None, needs, chosen[1])


def featured(dim: int, features: str) -> None:
    """Forward and backward, with every gradient, of a row's features as the compile table names them."""
    for length in LENGTHS:
        call = call_with(features, dim, 16, length)
        needs = GradsNeeded(
            bias=call.bias is not None,
            sinks=call.sinks is not None,
            alibi_slopes=call.alibi_slopes is not None,
        )
        forward, backward = (_on_gpu(AttentionSpec.of(call, each)) for each in (None, needs))
        out, lse = backend.attention_fwd(forward, call)
        backend.attention_bwd(backward, call, out, lse, torch.randn_like(out), None, needs)


def kv_cache(dim: int, features: str) -> None:
    """Calls on a cache, to which they append, in one split and in several."""
    for batch, capacity, splits in ((1, 256, 1), (2, 4096, 4), (2, 192, 1), (3, 1024, 3)):
        call = replace(cache_call(features, dim, 16, batch=batch, capacity=capacity), num_splits=splits)
        spec = AttentionSpec.of(call.attending(call.query, call.k_cache, call.v_cache, call.alibi_slopes))
        backend.kv_cache_fwd(_on_gpu(spec), call)


def one_query(dim: int) -> None:
    """Padded calls with one query for each head, which decode from their keys in one split and in several."""
    for keys in (*LENGTHS, 4096, 5000):
        query, key = torch.randn(2, 8, 1, dim).to(BF16), torch.randn(2, 2, keys, dim).to(BF16)
        call = AttentionCall(query, key, key, scale=0.125)
        backend.attention_fwd(_on_gpu(AttentionSpec.of(call)), call)


def packed(dim: int, **options: Any) -> None:
    """Packed sequences, forward and backward."""
    for lengths in ((1, 63, 65, 129), (1000,), (5, 0, 17)):
        tokens = sum(lengths)
        query = torch.randn(tokens, 4, dim).to(BF16)
        cu_seqlens = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
        call = VarlenCall(
            query,
            query[:, :2],
            query[:, :2],
            cu_seqlens,
            cu_seqlens,
            causal="bottom_right",
            scale=0.125,
            **options,
        )
        needs = GradsNeeded()
        forward, backward = (
            _on_gpu(AttentionSpec.of(call.as_one_sequence(), each)) for each in (None, needs)
        )
        out, lse = backend.varlen_fwd(forward, call)
        backend.varlen_bwd(backward, call, out, lse, torch.randn_like(out), None, needs)


def packed_with_scores(dim: int) -> None:
    """Packed sequences with what changes scores."""
    seed = torch.zeros(1, dtype=torch.int64)
    packed(dim, softcap=5.0, alibi_slopes=torch.ones(1, 4), dropout_p=0.1, dropout_seed=seed)


def rows(columns: int) -> None:
    """Softmax of rows, forward and backward, and the loss of as many classes."""
    for number in (1, 17, 1000):
        x = torch.randn(number, columns).to(BF16)
        out = backend.softmax_fwd(
            _on_gpu(SoftmaxSpec.of(x)), SoftmaxCall(x, None, 1, 1.0, False, False, BF16)
        )
        backend.softmax_bwd(_on_gpu(SoftmaxSpec.of(x, backward=True)), x, out, 1, 1.0, BF16)
        call = CrossEntropyCall(x, torch.zeros(number, dtype=torch.int64), -100, 0.0)
        losses, norms = backend.cross_entropy_fwd(_on_gpu(SoftmaxSpec.of(x)), call)
        backend.cross_entropy_bwd(_on_gpu(SoftmaxSpec.of(x, backward=True)), call, losses, norms)


def replayed() -> None:
    """A softmax, and attention forward and backward, REPEATS times as replays."""
    x, query = torch.randn(17, 1000).to(BF16), torch.randn(2, 2, 17, 64).to(BF16)
    needs, lse = GradsNeeded(), torch.zeros(2, 2, 17)

    def call_of(q: torch.Tensor) -> AttentionCall:
        return AttentionCall(q, q, q, causal="bottom_right", scale=0.125)

    forward, backward = (_on_gpu(AttentionSpec.of(call_of(query), each)) for each in (None, needs))
    rows = _on_gpu(SoftmaxSpec.of(x))
    for function, tensors in (
        (lambda x: backend.softmax_fwd(rows, SoftmaxCall(x, None, 1, 1.0, False, False, BF16)), (x,)),
        (lambda q: backend.attention_fwd(forward, call_of(q)), (query,)),
        (
            lambda q, out, lse, dout: backend.attention_bwd(
                backward, call_of(q), out, lse, dout, None, needs
            ),
            (query, query, lse, query),
        ),
    ):
        replay = Replay(function)
        for _ in range(REPEATS):
            replay(*(t.clone() for t in tensors))


def held() -> None:
    """The kernel by which a part of the multiprocessors is held."""
    sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))
    from evidence import hold

    flags = torch.zeros(1, dtype=torch.int32)
    hold.hold_kernel[(66,)](flags, flags, hold.MOST_LOOKS, num_warps=hold.WARPS)


CALLS: dict[str, Callable[[], None]] = {
    "causal D64": lambda: attention(64, BF16, causal="bottom_right"),
    "full D128 by TMA": lambda: attention(128, BF16, tma=True),
    "softcap D80 float16": lambda: attention(80, torch.float16, softcap=5.0, window_left=100),
    "few key heads D128": lambda: attention(128, BF16, group=6, causal="bottom_right"),
    "packed D64": lambda: packed(64),
    "rows of 1000": lambda: rows(1000),
    "cache D128": lambda: kv_cache(128, "8 heads, pages of 16, rotary"),
    "one query D64": lambda: one_query(64),
    "held": held,
    "replayed": replayed,
}


DIMS = (64, 128, 256)
# The rows of the tables of tiles, each with every set of features that it serves.
ROWS: dict[str, Callable[[], None]] = {
    **{
        f"{features} D{dim}": partial(featured, dim, features)
        for dim in DIMS
        for features in (*FEATURES[False], *FEATURES[True])
        if "packed" not in features
    },
    **{f"softcap, alibi, dropout, packed D{dim}": partial(packed_with_scores, dim) for dim in DIMS},
    **{
        f"cache, {features} D{dim}": partial(kv_cache, dim, features)
        for dim in DIMS
        for features in CACHE_FEATURES[16]
    },
}
# What the first minutes on a GPU launch beside those: the grids of the attention bench.
FILL = CALLS | {
    f"grid {causal} D{dim}": partial(attention, dim, BF16, causal=causal)
    for dim in DIMS
    for causal in ("none", "bottom_right")
}


def described(driver: Driver) -> dict[str, Any]:
    """What was launched, in plain types."""
    return {
        "loaded": driver.loaded,
        "launches": [
            {
                "name": each.name,
                "grid": each.grid,
                "arguments": len(each.arguments),
                "numbers": [v for v in each.arguments.values() if isinstance(v, (int, float))],
                "direct": each.direct,
                "maps": sum(kind.startswith("tensordesc") for kind in each.types.values()),
                "shared": each.metadata.shared,
                "volatile": "ld.volatile" in each.ptx,
                "problems": each.problems(),
            }
            for each in driver.launched
        ],
    }


def main(arguments: list[str]) -> None:
    """The command line."""
    if arguments[:1] == ["--fill"]:
        os.environ["TRITON_CACHE_DIR"] = arguments[1]
        arguments = arguments[2:] or list(FILL)
    found = {}
    for name in arguments or CALLS:
        with active(ARCH) as driver:
            (FILL | ROWS)[name]()
        found[name] = described(driver)
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
