"""Which directions of the CUDA extension run on this GPU, each tried in a process of its own.

python benchmarks/gpu_probes.py                       all of them, one after another
python benchmarks/gpu_probes.py --direction forward   one, in this process
"""

from __future__ import annotations

import argparse
import json
import sys

import torch

import checkout
from evidence import probes


def main() -> int:
    """The command line; 1 if a direction failed."""
    parser = argparse.ArgumentParser(description="Try every direction of the CUDA extension on this GPU.")
    parser.add_argument("--direction", choices=list(probes.DIRECTIONS), help="only this one, in this process")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    checkout.make_importable()
    if options.direction is None:
        findings = probes.probe_all(options.device)
    else:
        findings = [probes.probe_here(options.direction, torch.device(options.device))]
        print(json.dumps(findings[0]), flush=True)
    return 1 if any(item["status"] == "failed" for item in findings) else 0


if __name__ == "__main__":
    sys.exit(main())
