"""All checks and benchmarks that need a GPU, in one command and a given number of minutes, without a network.

    python benchmarks/gpu_evidence.py --minutes 9 --out evidence
    python benchmarks/gpu_evidence.py --dry-run                  on a CPU: every section in its small form, or why not
    python benchmarks/gpu_evidence.py --sections forward flex --resume
    python benchmarks/gpu_evidence.py --resume --minutes 9 --publish
    python benchmarks/gpu_evidence.py --archive OUT --triton-cache kernels.tar.gz --prebuilt built

Sections run in order of importance, each in a process of its own with a time limit of its own, so that a crash or a
hang loses one section. Right after the build each direction of the CUDA extension is probed; one that hangs is switched
off in every later section by FASTATTN_DISABLE. Results are stored as they are found: evidence.json (sections and
findings), BENCH.json (measurements), log.txt (all output). The run ends with a table one screen long and the charts.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from evidence import run, sections


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; 0 if no section that ran failed."""
    options = _parser().parse_args(argv)
    import torch

    if options.publish and options.dry_run:
        print("--publish: needs a GPU run, --dry-run measures nothing", file=sys.stderr)
        return 2
    if not torch.cuda.is_available() and not options.dry_run:
        print("no CUDA GPU on this machine; --dry-run runs every section in its small form", file=sys.stderr)
        return 2
    return run.run_all(options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Check and measure fastattn on this machine's GPU.")
    names = [section.name for section in sections.SECTIONS]
    parser.add_argument("--minutes", type=float, default=9.0, help="time for everything (default 9)")
    parser.add_argument("--out", type=Path, default=Path("evidence"), help="folder for the results")
    parser.add_argument(
        "--sections", nargs="+", choices=names, metavar="NAME", help=f"only these: {', '.join(names)}"
    )
    parser.add_argument(
        "--resume", action="store_true", help="keep the sections of an earlier run that finished well"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="without a GPU: run every section in its small form"
    )
    parser.add_argument(
        "--publish",
        action="store_true",
        help="then copy the results to benchmarks/results/DEVICE and update the pages",
    )
    parser.add_argument(
        "--archive",
        type=Path,
        metavar="FOLDER",
        help="write FOLDER/evidence.tar.gz and table.txt after each section",
    )
    parser.add_argument(
        "--unpack",
        type=Path,
        metavar="ARCHIVE",
        help="first unpack an earlier run's archive into --out, to resume it",
    )
    parser.add_argument(
        "--triton-cache", type=Path, metavar="PATH",
        help="compiled Triton kernels, a folder or a .tar.gz of one; with --archive they are archived too",
    )  # fmt: skip
    parser.add_argument(
        "--prebuilt", type=Path, metavar="PATH", help="a built _C*.so to use instead of a build, if it fits"
    )
    parser.add_argument("--revision", help="commit to record where the checkout has no git folder")
    return parser


if __name__ == "__main__":
    sys.exit(main())
