"""Charts from stored results, and the command that updates the charts and tables of the pages.

python benchmarks/plot.py --update-docs      rewrite the charts, and the tables between markers
python benchmarks/plot.py --check            say which pages and charts are stale
python benchmarks/plot.py RESULT.json --out FOLDER [--format png]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from report import charts, schema, tables


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description="Charts and tables from stored results.")
    parser.add_argument("result", nargs="?", type=Path, help="a result file to draw")
    parser.add_argument("--out", type=Path, default=Path("."), help="folder for its charts")
    parser.add_argument("--format", choices=("svg", "png"), default="svg")
    parser.add_argument("--update-docs", action="store_true", help="rewrite tables and charts of the pages")
    parser.add_argument("--check", action="store_true", help="fail when a page or a chart is stale")
    options = parser.parse_args()
    if options.check:
        stale = [*tables.stale_pages(), *charts.stale_charts()]
        how = "python benchmarks/plot.py --update-docs"
        print("\n".join(f"{name} is stale: {how}" for name in stale) or "up to date")
        return 1 if stale else 0
    if options.update_docs:
        print("\n".join(charts.update_docs()))
        return 0
    if options.result is None:
        parser.error("give a result file, --update-docs or --check")
    try:
        result = schema.load(options.result)
    except (OSError, ValueError) as error:
        print(f"plot.py: {error}", file=sys.stderr)
        return 2
    for chart in charts.draw(result, options.out, options.format):
        print(chart)
    return 0


if __name__ == "__main__":
    sys.exit(main())
