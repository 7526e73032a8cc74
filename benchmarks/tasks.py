"""Models trained for real tasks, and docs/results.md, which is made of what their runs left.

python benchmarks/tasks.py --list
python benchmarks/tasks.py NAME --data DIR --encoder DIR --out DIR [--minutes M]      run a row and store its record
python benchmarks/tasks.py NAME --resume --data DIR --encoder DIR --out DIR            what a run cut short left to do
python benchmarks/tasks.py NAME --quick --out DIR                                     the same on a few generated lines
python benchmarks/tasks.py --page                                                     write docs/results.md

--data is the folder of the data sets, which come with neither the package nor this repository; docs/results.md says
what it holds. --encoder is the folder of all-MiniLM-L6-v2. A run that its --minutes, Ctrl-C or SIGTERM cuts leaves what
it has; so does one that is killed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import checkout


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; 1 where a step of the row failed."""
    parser = argparse.ArgumentParser(description="Rows of docs/results.md, and the page.")
    parser.add_argument("name", nargs="?", help="the row")
    parser.add_argument("--data", type=Path, help="folder of the data sets")
    parser.add_argument("--encoder", type=Path, help="folder of all-MiniLM-L6-v2")
    parser.add_argument("--out", type=Path, help="folder for everything that is trained")
    parser.add_argument("--minutes", type=float, help="most time of the row; its own time by default")
    parser.add_argument(
        "--quick", action="store_true", help="a few generated lines and steps, to see that it works"
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on after the last step that ended by itself, in --minutes more",
    )
    parser.add_argument("--conditions", help="what else the machine does meanwhile, a sentence for the page")
    parser.add_argument("--list", action="store_true", help="the rows, and the minutes that they take")
    parser.add_argument("--page", action="store_true", help="write docs/results.md from the stored records")
    options = parser.parse_args(argv)
    checkout.make_importable()
    from trained import page
    from trained.recipes import ROWS

    if options.list:
        print("\n".join(f"{row.name:<20} {row.minutes:>5g} min  {row.title}" for row in ROWS.values()))
        return 0
    if options.page:
        print("\n".join(page.update()))
        return 0
    if options.name not in ROWS:
        parser.error(f"needs --list, --page or one of {', '.join(ROWS)}")
    needed = ("out",) if options.quick else ("data", "encoder", "out")
    for name in needed:
        if getattr(options, name) is None:
            parser.error(f"--{name}: is missing")
    for name in needed[:-1]:
        if not getattr(options, name).is_dir():
            parser.error(f"--{name}: {getattr(options, name)} is no folder")
    if options.minutes is not None and not 0 < options.minutes < 1e6:
        parser.error(f"--minutes: got {options.minutes}, needs a number above 0")
    from trained import runs

    store = None if options.quick else page.STORED / f"{options.name}.json"
    try:
        record = runs.start(
            options.name, ROWS, options.out, data=options.data, encoder=options.encoder, minutes=options.minutes,
            quick=options.quick, store=store, conditions=options.conditions, resume=options.resume,
        )  # fmt: skip
    except (OSError, ValueError) as error:
        print(f"tasks.py: {error}", file=sys.stderr)
        return 2
    failed = [step for step in record["steps"] if step["status"] == "failed"]
    for step in failed:
        print(f"{step['name']}, {step['kind']}: {step['reason']}", file=sys.stderr)
    print(f"{options.name}: {record['status']}, {record['seconds']:.0f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
