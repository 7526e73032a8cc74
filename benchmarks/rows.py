"""Products of a few rows, as decoding makes them: their times, and the blocks that `fastattn.nn.rows` can use.

python benchmarks/rows.py              print the table
"""

from __future__ import annotations

import argparse
import sys

import torch

import checkout
from measure import rows


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description="Times and bits of products of a few rows with a weight.")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    torch.set_num_threads(parser.parse_args().threads)
    checkout.make_importable()
    for line in rows.table():
        print(line, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
