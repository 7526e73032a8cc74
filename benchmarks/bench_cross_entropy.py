"""Cross-entropy of logits, and of a linear layer that never writes them, beside torch's and Liger's.

python benchmarks/bench_cross_entropy.py              every case of this machine's device, results stored
python benchmarks/bench_cross_entropy.py --list       the cases
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from cases.cross_entropy import BUDGET, cases_for
from measure import command


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; see --help."""
    return command.main("cross-entropy", Path(__file__).resolve(), cases_for, {}, argv, BUDGET)


if __name__ == "__main__":
    sys.exit(main())
