"""Products of a few rows, as decoding makes them: their times, and the blocks that `fastattn.nn.rows` can use.

python benchmarks/rows.py              print the table
python benchmarks/rows.py --write      measure which product is the fastest and put this CPU into the package's table
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

import checkout
from measure import rows


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description="Times and bits of products of a few rows with a weight.")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--write", action="store_true", help="write fastattn/nn/rows_table.py")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    checkout.make_importable()
    if options.write:
        from fastattn import torch_compat
        from fastattn.nn import rows_table

        choices = {str(dtype).removeprefix("torch."): rows.fastest(dtype) for dtype in rows.DTYPES}
        rows.write(Path(rows_table.__file__), torch_compat.instructions(), choices)
        print(torch_compat.instructions(), choices)
        return 0
    for line in rows.table():
        print(line, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
