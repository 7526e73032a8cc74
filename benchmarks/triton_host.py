"""The host's time for a call of the Triton backend up to the launch, without a GPU: the launcher is an empty function.

python benchmarks/triton_host.py            microseconds of each op, median and spread of 15 rounds

The tests' stand-in replaces CUDA's driver, so that specialisation, the search for the compiled kernel and the call of
the launcher are Triton's own. "replayed" is a replay of a recorded plan. TRITON_INTERPRET must not be set.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

import checkout

ARCH = 90
ROUNDS, CALLS = 15, 50


def calls() -> Iterator[tuple[str, Callable[..., Any], tuple[Tensor, ...]]]:
    """Ops of the backend by name, as functions of small tensors."""
    from fastattn.backends import triton as backend
    from fastattn.spec import (
        AttentionCall,
        AttentionSpec,
        CrossEntropyCall,
        GradsNeeded,
        KVCacheCall,
        SoftmaxCall,
        SoftmaxSpec,
        VarlenCall,
    )

    def on_gpu(spec: Any) -> Any:
        return replace(spec, device="cuda", arch=ARCH)

    rows = torch.randn(16, 256).to(torch.bfloat16)
    row_spec, target = on_gpu(SoftmaxSpec.of(rows)), torch.zeros(16, dtype=torch.int64)
    yield (
        "softmax forward",
        lambda x: backend.softmax_fwd(row_spec, SoftmaxCall(x, None, 1, 1.0, False, False, x.dtype)),
        (rows,),
    )
    yield (
        "cross-entropy forward",
        lambda x, t: backend.cross_entropy_fwd(row_spec, CrossEntropyCall(x, t, -100, 0.0)),
        (rows, target),
    )
    query, needs = torch.randn(1, 4, 64, 64).to(torch.bfloat16), GradsNeeded()

    def call_of(q: Tensor) -> AttentionCall:
        return AttentionCall(q, q, q, causal="bottom_right", scale=0.125)

    forward, backward = (on_gpu(AttentionSpec.of(call_of(query), each)) for each in (None, needs))
    yield "attention forward", lambda q: backend.attention_fwd(forward, call_of(q)), (query,)
    yield (
        "attention backward",
        lambda q, out, lse: backend.attention_bwd(backward, call_of(q), out, lse, out, None, needs),
        (query, torch.empty_like(query), torch.zeros(1, 4, 64)),
    )
    tokens, offsets = query[0].transpose(0, 1).contiguous(), torch.tensor([0, 20, 64], dtype=torch.int32)
    yield (
        "varlen forward",
        lambda q, cu: backend.varlen_fwd(forward, VarlenCall(q, q, q, cu, cu, scale=0.125)),
        (tokens, offsets),
    )
    one, lengths = query[:, :, :1].contiguous(), torch.tensor([40], dtype=torch.int32)
    decode = on_gpu(AttentionSpec.of(AttentionCall(one, query, query)))
    yield (
        "kv_cache step",
        lambda q, k, v, n: backend.kv_cache_fwd(decode, KVCacheCall(q, k, v, n, q, q, scale=0.125)),
        (one, query, query.clone(), lengths),
    )


def measure(names: str, rounds: int = ROUNDS) -> Iterator[tuple[str, int, list[float]]]:
    """(op, launches of a call, microseconds of a call in each round), rounds interleaved over the ops named.

    Each op is timed as a call of its backend function and as a replay of its recorded plan.
    """
    from fastattn.backends.replay import Replay

    sys.path.append(str(checkout.ROOT / "tests" / "kernels"))
    from stand_in_driver import Driver, active

    launched = itertools.count()
    Driver.launcher_cls = lambda self, source, metadata: lambda *args: next(launched)
    with active(ARCH):
        chosen: dict[str, Callable[[], Any]] = {}
        for name, function, tensors in calls():
            if names in name:
                chosen[name] = partial(function, *tensors)
                chosen[f"{name}, replayed"] = partial(Replay(function), *tensors)
        counts: dict[str, int] = {}
        for name, call in chosen.items():
            call()  # compiles, records
            before = next(launched)
            call()
            counts[name] = next(launched) - before - 1
        seconds: dict[str, list[float]] = {name: [] for name in chosen}
        for _ in range(rounds):
            for name, call in chosen.items():
                started = time.perf_counter()
                for _ in range(CALLS):
                    call()
                seconds[name].append((time.perf_counter() - started) / CALLS)
    for name, samples in seconds.items():
        yield name, counts[name], [1e6 * each for each in samples]


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", help="ops whose name contains this")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    given = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET: must not be set, because nothing would be launched")
    if given.rounds < 1:
        parser.error(f"--rounds: got {given.rounds}, needs 1 or more")
    checkout.make_importable()
    for name, launches, samples in measure(given.only, given.rounds):
        low, high = min(samples), max(samples)
        print(f"{name:32} {launches} launches {statistics.median(samples):8.1f} us ({low:.1f} to {high:.1f})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
