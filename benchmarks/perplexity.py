"""Perplexity of a GPT trained by this script, with its weights in float32, rounded to 8 bits, and in bfloat16.

python benchmarks/perplexity.py              train and print, in about two minutes on two cores
"""

from __future__ import annotations

import argparse
import sys

import checkout
from measure import perplexity


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Perplexity of a small trained GPT by the dtype of its weights."
    )
    parser.add_argument("--steps", type=int, default=300, help="training steps")
    steps = parser.parse_args().steps
    checkout.make_importable()
    for line in perplexity.lines(steps):
        print(line, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
