"""Installs the CUDA extension in the cache: a prebuilt one that matches this environment, else one compiled here.

python benchmarks/gpu_build.py --prebuilt FOLDER     any _C*.so in it that is for this Python, torch and sources
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import checkout
from evidence import carried


def main() -> int:
    """The command line; the exit status of the build."""
    parser = argparse.ArgumentParser(description="Place or build the CUDA extension.")
    parser.add_argument("--prebuilt", type=Path, help="a folder or file to look for a built extension in")
    options = parser.parse_args()
    checkout.make_importable()
    if options.prebuilt is not None:
        placed, wrong = carried.place_extension(options.prebuilt)
        if placed is not None:
            print(f"the prebuilt extension is used: {placed.name}")
            return 0
        print("no prebuilt extension matches: " + "; ".join(wrong))
    from fastattn.cache import cache_dir
    from fastattn.extension.build import BuildError, build_here

    try:
        built = build_here(cache_dir())
    except BuildError as error:
        print(error)
        return 1
    print(f"built in {built.seconds:.0f} s for {', '.join(built.info.archs)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
