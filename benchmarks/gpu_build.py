"""Puts the CUDA extension where fastattn finds it: one that was carried here if it fits, else one that is compiled.

python benchmarks/gpu_build.py --prebuilt FOLDER     any _C*.so in it that is for this Python, torch and sources
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

import checkout


def place(folder: Path) -> tuple[Path | None, list[str]]:
    """Copy the library that fits into the cache: where it is, None if there is none, and what was wrong with others."""
    from fastattn.cache import cache_dir
    from fastattn.extension import load
    from fastattn.extension.info import BuildInfo, library_name

    here, wrong = load.info_here(), []
    found = [folder] if folder.is_file() else sorted(folder.rglob("_C*.so"))
    for path in found:
        info = BuildInfo.of_file(path)
        reason = "it is no build of fastattn" if info is None else info.mismatch(here)
        if reason is not None:
            wrong.append(f"{path.name}: {reason}")
            continue
        target = cache_dir() / "prebuilt" / library_name()
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
        return target, wrong
    return None, wrong or [f"there is no _C*.so in {folder.name}"]


def main() -> int:
    """The command line; the exit status of the build."""
    parser = argparse.ArgumentParser(description="Place or build the CUDA extension.")
    parser.add_argument("--prebuilt", type=Path, help="a folder or file to look for a built extension in")
    options = parser.parse_args()
    checkout.make_importable()
    if options.prebuilt is not None:
        placed, wrong = place(options.prebuilt)
        if placed is not None:
            print(f"the extension was carried here: {placed.name}")
            return 0
        print("nothing carried fits: " + "; ".join(wrong))
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
