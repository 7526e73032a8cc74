"""GPT-2 small with random weights beside transformers' GPT-2: training and evaluation steps.

python benchmarks/bench_train.py              every case of this machine's device, results stored
python benchmarks/bench_train.py --list       the cases
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from cases.train import BUDGET, cases_for
from measure import command


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; see --help."""
    return command.main("train", Path(__file__).resolve(), cases_for, {}, argv, BUDGET)


if __name__ == "__main__":
    sys.exit(main())
