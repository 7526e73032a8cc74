"""The host's time for a call of the Triton backend up to the launch, without a GPU: Triton's launcher does nothing.

python benchmarks/triton_host.py            microseconds of each op, median and spread of 15 rounds

The stand-in driver of the tests takes the place of CUDA's, so that specialisation, the look for the compiled kernel and
the call of the launcher are Triton's own. TRITON_INTERPRET must not be set.
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
from typing import Any

import torch

import checkout

ARCH = 90
ROUNDS, CALLS = 15, 50


def calls() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Ops of the backend by name, on small tensors."""
    from fastattn.backends import triton as backend
    from fastattn.spec import AttentionCall, AttentionSpec, GradsNeeded, SoftmaxCall, SoftmaxSpec

    rows = torch.randn(16, 256).to(torch.bfloat16)
    row_spec = replace(SoftmaxSpec.of(rows), device="cuda", arch=ARCH)
    row_call = SoftmaxCall(rows, None, 1, 1.0, False, False, rows.dtype)
    yield "softmax forward", lambda: backend.softmax_fwd(row_spec, row_call)
    query = torch.randn(1, 4, 64, 64).to(torch.bfloat16)
    call, needs = AttentionCall(query, query, query, causal="bottom_right", scale=0.125), GradsNeeded()
    forward, backward = (
        AttentionSpec.of(call, each).replace(device="cuda", arch=ARCH) for each in (None, needs)
    )
    yield "attention forward", lambda: backend.attention_fwd(forward, call)
    out, lse = torch.empty_like(query), torch.zeros(1, 4, 64)
    yield (
        "attention backward",
        lambda: backend.attention_bwd(backward, call, out, lse, out, None, needs),
    )


def measure(names: str, rounds: int = ROUNDS) -> Iterator[tuple[str, int, list[float]]]:
    """(op, launches of a call, microseconds of a call in each round), rounds interleaved over the ops named."""
    sys.path.append(str(checkout.ROOT / "tests" / "kernels"))
    from stand_in_driver import Driver, active

    launched = itertools.count()
    Driver.launcher_cls = lambda self, source, metadata: lambda *args: next(launched)
    with active(ARCH):
        chosen = {name: call for name, call in calls() if names in name}
        counts: dict[str, int] = {}
        for name, call in chosen.items():
            call()  # compiles
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
        parser.error("TRITON_INTERPRET: is set, and nothing would be launched")
    if given.rounds < 1:
        parser.error(f"--rounds: got {given.rounds}, needs 1 or more")
    checkout.make_importable()
    for name, launches, samples in measure(given.only, given.rounds):
        low, high = min(samples), max(samples)
        print(f"{name:20} {launches} launches {statistics.median(samples):8.1f} us ({low:.1f} to {high:.1f})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
