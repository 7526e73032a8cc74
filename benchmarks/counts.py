"""Counts of work that do not depend on the machine: operators, bytes, kernel launches, tiles.

python benchmarks/counts.py               what differs from counts.json
python benchmarks/counts.py --record      write counts.json again
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys

import checkout
from measure import counts


def main() -> int:
    """The command line; 1 if a count differs. Triton is interpreted, on the CPU."""
    parser = argparse.ArgumentParser(description="Counts of work that do not depend on the machine.")
    parser.add_argument("--record", action="store_true", help="write counts.json again")
    options = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") != "1":
        environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
        return subprocess.run([sys.executable, *sys.argv], env=environment, check=False).returncode
    checkout.make_importable()
    checkout.correct_interpreter()
    found = counts.measure()
    if options.record:
        counts.record(found)
        print(f"recorded {counts.FILE.name}")
        return 0
    lines = counts.differences(counts.recorded(), found)
    print("\n".join([*lines, f"if that is meant: {counts.RECORD}"] if lines else ["as recorded"]))
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
