"""Models before and after `fastattn.swap_attention`: the effect of adding that one line.

python benchmarks/bench_swap.py              every case of this machine's device, results stored
python benchmarks/bench_swap.py --list       the cases
"as it was" is the model as its library makes it, torch's own SDPA wherever the library calls it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from cases.swap import BUDGET, cases_for
from measure import command


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; see --help."""
    return command.main("swap", Path(__file__).resolve(), cases_for, {}, argv, BUDGET)


if __name__ == "__main__":
    sys.exit(main())
