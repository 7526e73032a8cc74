"""Attention against its peers: time, error and peak memory, on the CPU or on a GPU.

python benchmarks/bench_attention.py                      every case of this machine's device, results stored
python benchmarks/bench_attention.py --list               the cases
python benchmarks/bench_attention.py --only window --quick --csv window.csv
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from cases.attention import cases_for, import_case
from measure import command


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; see --help."""
    return command.main("attention", Path(__file__).resolve(), cases_for, {"import": import_case}, argv)


if __name__ == "__main__":
    sys.exit(main())
