"""Compiles every row of the tile tables ahead of time, without a GPU: registers, shared memory, spills and wgmma.

    python tests/kernels/compile_matrix.py --write -j 4             bring the table on file up to date
    python tests/kernels/compile_matrix.py --arch 90 --size 128 --bits 16 --kernel forward
    python tests/kernels/compile_matrix.py --stale                  list what changed since it was written

--write compiles what the table on file lacks or has from other code, tiles or another Triton, and stores
compile_table.json beside this file and docs/compile_table.md. The exit status is 1 where shared memory overflows, a
16-bit row without score features spills at all up to head dim 128 or lacks wgmma on sm_90, or a row spills more than
the table on file says (with the same Triton); --accept-spills stores such a row, which --write alone doesn't.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import compile_record
from compile_entries import (
    ARCHITECTURES,
    ATTENTION,
    DTYPES,
    KERNELS,
    ROW_KERNELS,
    Entry,
    entries,
    key_of,
    launch_of,
)
from compile_inspect import Report, compile_launch, intermediate

WRITTEN_AT_ONCE = 24  # rows compiled before the table is stored, so that an interruption loses little


def stale(chosen: Iterable[Entry], table: dict[str, Any]) -> list[Entry]:
    """The entries that a table on file lacks, or has from other code or tiles."""
    return [entry for entry in chosen if table["rows"].get(entry.name, {}).get("key") != key_of(entry)]


@dataclass(frozen=True)
class Made:
    """What came out of an entry, and the hash of the code it came from."""

    report: Report
    ir: str = ""
    compiled: bool = True  # or else the code is that of the row on file


def make_entry(entry: Entry, row: dict[str, Any] | None = None) -> Made:
    """Compile an entry, unless the row on file came from the same code."""
    try:
        launch = launch_of(entry)
        ir = intermediate(launch, entry.arch)
        if row is not None and row.get("ir") == ir:
            return Made(compile_record.report_of(row), ir, compiled=False)
        return Made(compile_launch(launch, entry.arch), ir)
    except Exception as error:
        return Made(Report(error=f"{type(error).__name__}: {str(error).splitlines()[0]}"))


def problem(entry: Entry, report: Report, allowance: int | None = None) -> str | None:
    """What is wrong with an entry, if anything; spills may not grow beyond an allowance."""
    if report.error:
        return report.error
    if report.shared > entry.shared_limit:
        return f"{report.shared} bytes of shared memory, limit {entry.shared_limit}"
    if entry.strict and report.local_ops:
        return f"{report.local_ops} loads and stores of local memory, none are allowed"
    if allowance is not None and report.local_ops > allowance:
        return f"{report.local_ops} loads and stores of local memory, {allowance} are on record"
    if not entry.strict or entry.kernel in ROW_KERNELS:
        return None
    if (
        entry.kernel in ATTENTION
        and entry.arch == "90"
        and entry.kernel != "sum_splits"
        and not report.async_mma
    ):
        return "no wgmma"
    if entry.kernel in ("forward", "dkdv", "dq", "decode") and not (report.wide_copies or report.tma_copies):
        return "operands are neither copied 16 bytes at a time nor by TMA"
    return None


def allowances(table: dict[str, Any]) -> dict[str, int]:
    """Loads and stores of local memory on record, by entry, if this is the Triton they were recorded with."""
    import triton

    if table["triton"] != triton.__version__:
        return {}
    return {name: row.get("local_ops", 0) for name, row in table["rows"].items()}


def run(
    chosen: list[Entry], pool: ProcessPoolExecutor, allowed: dict[str, int], rows: dict[str, Any]
) -> dict[Entry, Made]:
    """Make entries in parallel, printing each as it is done; `rows` on file spare what came from the same code."""
    made = {}
    known = [rows.get(entry.name) for entry in chosen]
    for entry, each in zip(chosen, pool.map(make_entry, chosen, known)):
        made[entry] = each
        report, wrong = each.report, problem(entry, each.report, allowed.get(entry.name))
        print(
            f"{entry.name:66} {entry.tile:18} reg {report.registers:3} smem {report.shared:6} "
            f"local {report.local_ops:4} mma {report.async_mma:3}{'' if each.compiled else '  same code'}"
            f"{'  <- ' + wrong if wrong else ''}",
            flush=True,
        )
    return made


def write(table: dict[str, Any], made: dict[Entry, Made], wrong: set[Entry]) -> None:
    """Store the table: what was made, but for what is wrong, and what is on file of rows still in use."""
    import triton

    current = list(entries())
    rows = {}
    if table["triton"] == triton.__version__:
        rows = {entry.name: table["rows"][entry.name] for entry in current if entry.name in table["rows"]}
    for entry, each in made.items():
        if entry not in wrong:
            rows[entry.name] = compile_record.row_of(key_of(entry), each.ir, each.report)
    compile_record.store(triton.__version__, rows, current)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    args = _parser().parse_args(arguments)
    import triton

    table = compile_record.load()
    chosen = [entry for entry in entries(args.arch or ARCHITECTURES) if _wanted(entry, args)]
    if (args.write or args.stale) and table["triton"] == triton.__version__:
        chosen = stale(chosen, table)
    if args.stale:
        print("\n".join([entry.name for entry in chosen] + [f"{len(chosen)} rows are stale"]))
        return 1 if chosen else 0
    allowed = {} if args.accept_spills else allowances(table)
    known = table["rows"] if args.write and table["triton"] == triton.__version__ else {}
    size = WRITTEN_AT_ONCE if args.write else max(len(chosen), 1)
    wrong: set[Entry] = set()
    with ProcessPoolExecutor(args.jobs) as pool:
        for start in range(0, len(chosen), size):
            made = run(chosen[start : start + size], pool, allowed, known)
            found = {e for e, each in made.items() if problem(e, each.report, allowed.get(e.name))}
            wrong |= found
            if args.write:
                write(compile_record.load(), made, found)
    if args.write and not chosen:
        write(table, {}, set())
    print(f"{len(chosen)} compiled, {len(wrong)} with problems")
    return 1 if wrong else 0


def _wanted(entry: Entry, args: argparse.Namespace) -> bool:
    return (
        entry.kernel in (args.kernel or KERNELS)
        and entry.bits in (args.bits or DTYPES)
        and entry.size in (args.size or [entry.size])
        and entry.features in (args.features or [entry.features])
        and (entry.strict or not args.strict)
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add(
        "--arch",
        action="append",
        choices=ARCHITECTURES,
        help="one architecture; may be repeated, as may the rest",
    )
    add("--kernel", action="append", choices=KERNELS)
    add("--bits", type=int, action="append", choices=(16, 32))
    add("--size", type=int, action="append", help="head dim, or columns")
    add("--features", action="append", help="as the table names them")
    add("--strict", action="store_true", help="only rows that must not spill, whichever Triton compiles them")
    add("-j", "--jobs", type=int, default=2, help="processes that compile")
    add("--write", action="store_true", help="compile what is stale and store the table")
    add("--accept-spills", action="store_true", help="with --write: let spills on record grow")
    add("--stale", action="store_true", help="list what --write would compile, compiling nothing")
    return parser


if __name__ == "__main__":
    sys.exit(main())
