"""GPT-2 small with random weights beside transformers' GPT-2: training and evaluation steps; and training as it is run.

python benchmarks/bench_train.py              every case of this machine's device, results stored
python benchmarks/bench_train.py --list       the cases
On a CPU also: fine-tuning beside transformers' Trainer (which needs accelerate), packed and padded documents and pairs
beside a padded loop, rows of tokens from text beside the tokenizer alone, and a new process to its first step.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from cases.first_step import first_step_case
from cases.train import BUDGET, cases_for
from measure import command

EXTRAS = {"first-step": first_step_case}


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; see --help."""
    return command.main("train", Path(__file__).resolve(), cases_for, EXTRAS, argv, BUDGET)


if __name__ == "__main__":
    sys.exit(main())
