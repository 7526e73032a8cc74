"""Correctness of fastattn on the device at hand: random calls against float64, known traps, repetition, huge offsets.

    python benchmarks/gpu_checks.py random --seconds 60 --seed 3      one check
    python benchmarks/gpu_checks.py                                   all of them
    python benchmarks/gpu_checks.py random --backends triton torch    without the CUDA extension
Every check prints one JSON object per finding, a line each; the last line of a check is its summary. Each check runs in
processes of its own: after a call that never ends, only the rest of that check on that backend is lost. The exit status
is 1 if any check failed.
"""

from __future__ import annotations

import argparse
import json
import sys

import torch

import checkout
from evidence import checks
from evidence.findings import only_backends


def main() -> int:
    """The command line."""
    options = _parser().parse_args()
    names: list[str] = []
    for name in options.check or checks.CHECKS:
        names += checks.GROUPS.get(name, [name])
    unknown = [name for name in names if name not in checks.CHECKS]
    if unknown:
        known = ", ".join([*checks.GROUPS, *checks.CHECKS])
        print(f"unknown check {unknown[0]!r}: choose from {known}", file=sys.stderr)
        return 2
    checkout.make_importable()
    checkout.correct_interpreter()
    only_backends(options.backends)
    failed = False
    for item in checks.run(names, options):
        print(json.dumps(item), flush=True)
        failed = failed or item["status"] == "failed"
    return 1 if failed else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Correctness of fastattn on this machine's device.")
    parser.add_argument(
        "check", nargs="*", help=f"which checks: {', '.join([*checks.GROUPS, *checks.CHECKS])} (default: all)"
    )
    parser.add_argument("--seconds", type=float, default=60.0, help="time for the checks that repeat")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1, help="processes for the random calls")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--backends",
        nargs="+",
        default=[],
        choices=("cuda", "triton", "torch"),
        help="only these (default: all)",
    )
    parser.add_argument("--here", action="store_true", help="in this process, as under compute-sanitizer")
    return parser


if __name__ == "__main__":
    sys.exit(main())
