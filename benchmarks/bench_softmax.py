"""Softmax of rows of every length beside torch's, eager and compiled, and other kernels where they are installed.

python benchmarks/bench_softmax.py              every case of this machine's device, results stored
python benchmarks/bench_softmax.py --list       the cases
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from cases.softmax import BUDGET, cases_for
from measure import command


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; see --help."""
    return command.main("softmax", Path(__file__).resolve(), cases_for, {}, argv, BUDGET)


if __name__ == "__main__":
    sys.exit(main())
