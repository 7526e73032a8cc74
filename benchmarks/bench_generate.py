"""GPT-2 small with random weights beside transformers' GPT-2: tokens generated greedily with a cache.

python benchmarks/bench_generate.py              every case of this machine's device, results stored
python benchmarks/bench_generate.py --list       the cases
The row floor-weight-products times the matrix products with the weights alone, once per token: a lower bound for every
library that reads the same bytes. The lookup cases first train a small model on code and on prose, a few minutes each,
until it reproduces the text, and continue parts of it with prompt lookup and without; --only lookup-code runs those of
one text.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from cases.generate import BUDGET, cases_for
from measure import command


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; see --help."""
    return command.main("generate", Path(__file__).resolve(), cases_for, {}, argv, BUDGET)


if __name__ == "__main__":
    sys.exit(main())
