"""The predicted times of dk and dv by split over queries: the table of docs/hopper.md.

python benchmarks/splits.py              print it
"""

from __future__ import annotations

import argparse
import sys

import checkout
from measure import splits


def main() -> int:
    """The command line."""
    argparse.ArgumentParser(description="Predicted times of dk and dv by split over queries.").parse_args()
    checkout.make_importable()
    print("\n".join(splits.table()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
