"""`fastattn serve` under load: throughput beside transformers, the time between tokens, and clients that misbehave.

python benchmarks/bench_serve.py               every case, results stored; 15 minutes at most on two cores
python benchmarks/bench_serve.py --list        the cases
python benchmarks/bench_serve.py --only faults --out FILE --merge    some of them, added to a stored run of the same
                                               revision
Models have random weights; the server is a process of its own and listens on the loopback address while a case runs.
A case ends with exit status 1 where the server fails; targets are judged in the output.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from cases.serve import CASES
from measure import command
from measure.protocols import Case


def cases_for(device: torch.device) -> list[Case]:
    """None: every case measures a process, see `cases.serve.CASES`."""
    return []


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; see --help."""
    return command.main("serve", Path(__file__).resolve(), cases_for, CASES, argv)


if __name__ == "__main__":
    sys.exit(main())
