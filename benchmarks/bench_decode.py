"""One new token per sequence against a key/value cache, contiguous or paged, beside SDPA and FlexAttention.

python benchmarks/bench_decode.py              every case of this machine's device, results stored
python benchmarks/bench_decode.py --list       the cases
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from cases.decode import BUDGET, cases_for
from measure import command


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; see --help."""
    return command.main("decode", Path(__file__).resolve(), cases_for, {}, argv, BUDGET)


if __name__ == "__main__":
    sys.exit(main())
