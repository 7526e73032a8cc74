"""The predicted times of splits: of dk and dv over queries (docs/hopper.md), of decoding over keys (docs/decode.md).

python benchmarks/splits.py              print both tables
"""

from __future__ import annotations

import argparse
import sys

import checkout
from measure import decode_splits, splits


def main() -> int:
    """The command line."""
    argparse.ArgumentParser(description="Predicted times of splits over queries and keys.").parse_args()
    checkout.make_importable()
    print("\n".join([*splits.table(), "", *decode_splits.table()]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
