"""Packed sequences of unequal length beside padded calls, one call per sequence, and packed kernels of others.

python benchmarks/bench_varlen.py              every case of this machine's device, results stored
python benchmarks/bench_varlen.py --list       the cases
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from cases.varlen import BUDGET, cases_for
from measure import command


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; see --help."""
    return command.main("varlen", Path(__file__).resolve(), cases_for, {}, argv, BUDGET)


if __name__ == "__main__":
    sys.exit(main())
