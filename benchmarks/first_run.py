"""The first run of the CUDA extension on a GPU: nine steps, the riskiest assumption first, each in its own process.

    python benchmarks/first_run.py                     all steps, in order
    python benchmarks/first_run.py --steps 1 2 4       only these
    python benchmarks/first_run.py --step 3            one, in this process
    python benchmarks/first_run.py --forward           only what launches no backward
    python benchmarks/first_run.py --backend triton    another backend's kernels

Every step has a limit of seconds, so that a kernel that never ends loses only its own step. Each prints a JSON object
per finding; the exit status is 1 if a step failed. On a CPU the same code runs at small sizes on the torch backend, as
a rehearsal.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator

import torch

import checkout
from evidence import first_run
from evidence.findings import Finding
from evidence.first_run_steps import Scale


def main() -> int:
    """The command line; 1 if a step failed."""
    parser = argparse.ArgumentParser(description="The first run of the CUDA extension on a GPU.")
    numbers = sorted({name.rstrip("b") for name in first_run.STEPS})
    parser.add_argument("--steps", nargs="+", choices=numbers, metavar="N", help="only these steps")
    parser.add_argument("--forward", action="store_true", help="only the steps that launch no backward")
    parser.add_argument("--backward", action="store_true", help="only the steps that launch one")
    parser.add_argument(
        "--step", action="append", choices=list(first_run.STEPS), help="this step, in this process"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--backend", choices=("cuda", "triton", "torch"), default="cuda", help="(default cuda)"
    )
    parser.add_argument("--launches", type=int, default=1000, help="launches of step 9 (default 1000)")
    parser.add_argument(
        "--seconds", type=float, default=1500.0, help="time limit for all steps (default 1500)"
    )
    options = parser.parse_args()
    checkout.make_importable()
    failed = False
    if options.step:
        device = torch.device(options.device)
        scale = Scale.of(device, options.launches)
        made: Iterator[Finding] = (
            item for name in options.step for item in first_run.run_step(name, device, scale, options.backend)
        )
    else:
        made = first_run.run_all(
            first_run.chosen_steps(options),
            options.device,
            options.launches,
            options.seconds,
            options.backend,
        )
    for item in made:
        print(json.dumps(item), flush=True)
        failed = failed or item["status"] == "failed"
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
