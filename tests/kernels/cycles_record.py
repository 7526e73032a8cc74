"""The cycle model's figures on file, for every 16-bit attention row of sm_90 and every CUDA kernel of attention.

    python tests/kernels/cycles_record.py --write -j 2       redo what is stale, store the file and the pages
    python tests/kernels/cycles_record.py --stale            list what changed since it was written

A row's key is a hash of its kernel's code and of the model; of a Triton kernel the compile table, which is written
first, has the code. cycles_baseline.json keeps the fewest cycles that each row has had since it was last accepted by
name, so that small losses do not add up: a row more than 3 % above those is refused, and the exit status is 1, unless
it is named: --accept-cycles NAME. CUDA kernels are redone where nvcc is.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import re
import sys
from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

from fastattn.extension.compiling import with_headers
from fastattn.extension.info import csrc_folder
from fastattn.tune import ahead, cycles, extension
from fastattn.tune.cycles.report import Prediction

HERE = Path(__file__).parent
STORED = HERE / "cycles_table.json"
BASELINE = HERE / "cycles_baseline.json"
REGENERATE = "python tests/kernels/cycles_record.py --write -j 2"
WORSE = 1.03  # of the cycles on file: less is noise
Rows = dict[str, dict[str, Any]]
# A job is (kind, name): a row of the compile table, or a source of the CUDA kernels.
Job = tuple[str, str]


@cache
def model_key() -> str:
    """A hash of the model's own code, without comments and docstrings."""
    trees = [ast.parse(path.read_text("utf-8")) for path in sorted(Path(cycles.__file__).parent.glob("*.py"))]
    for tree in trees:
        for node in ast.walk(tree):
            if (
                isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
                and ast.get_docstring(node) is not None
            ):
                node.body = node.body[1:] or [ast.Pass()]
    return hashlib.sha256("".join(map(ast.unparse, trees)).encode()).hexdigest()


@cache
def triton_entries() -> dict[str, Any]:
    """The rows of the compile table that the model knows, by name."""
    from compile_entries import entries

    return {e.name: e for e in entries(["90"]) if e.bits == 16 and e.kernel in ahead.MODELLED}


@cache
def sources() -> dict[str, Path]:
    """The sources of the CUDA kernels of attention, of both 16-bit types, by name."""
    found = [path for dtype in ("bfloat16", "half") for path in extension.attention_sources(dtype=dtype)]
    return {path.stem: path for path in found}


def jobs() -> list[Job]:
    """Everything on file, in order."""
    return [("triton", name) for name in triton_entries()] + [("cuda", stem) for stem in sources()]


@cache
def key_of(job: Job) -> str:
    """What a job's figures follow from: the code and the model."""
    kind, name = job
    code = triton_code(name) if kind == "triton" else source_key(sources()[name])
    return hashlib.sha256((code + model_key()).encode()).hexdigest()[:16]


def source_key(source: Path) -> str:
    """A hash of a source and its headers without comments and white space."""
    text = "\0".join(path.read_text("utf-8") for path in with_headers(source, csrc_folder()))
    code = re.sub(r"\s+", " ", re.sub(r"//[^\n]*", "", text))
    return hashlib.sha256(code.encode()).hexdigest()[:16]


def triton_code(name: str) -> str:
    """The hash of what Triton's front end makes of a row, from the compile table; what it is made from if that is
    newer than the table."""
    from compile_entries import key_of as row_key

    made_from = row_key(triton_entries()[name])
    row = compiled_rows().get(name, {})
    return str(row["ir"]) if row.get("key") == made_from else made_from


@cache
def compiled_rows() -> Mapping[str, Mapping[str, Any]]:
    """The rows of the compile table."""
    import compile_record

    rows: Mapping[str, Mapping[str, Any]] = compile_record.load()["rows"]
    return rows


def load() -> dict[str, Any]:
    """The file: {"triton": version, "rows": {name: {"job", "key", figures}}}."""
    if not STORED.exists():
        return {"triton": None, "rows": {}}
    table: dict[str, Any] = json.loads(STORED.read_text(encoding="utf-8"))
    return table


def stale(chosen: Iterable[Job], rows: Mapping[str, Mapping[str, Any]]) -> list[Job]:
    """The jobs that a file lacks, or has from other code or another model."""
    keys = {tuple(row["job"]): row["key"] for row in rows.values()}
    return [job for job in chosen if keys.get(job) != key_of(job)]


def make(job: Job) -> Rows:
    """The rows of a job."""
    kind, name = job
    if kind == "cuda":
        found = extension.predict_source(sources()[name])
        return {prediction.name: row_of(job, prediction) for prediction in found}
    from compile_entries import launch_of

    entry = triton_entries()[name]
    return {name: row_of(job, ahead.predict_launch(launch_of(entry), name, entry.kernel, entry.size))}


def row_of(job: Job, made: Prediction) -> dict[str, Any]:
    """A row for the file."""
    return {
        "job": list(job), "key": key_of(job), "cycles": round(made.cycles), "bound": made.bound,
        "share": round(made.share, 2), "tflops": round(made.tflops), "registers": made.registers,
        "spills": made.spills, "instructions": made.instructions,
    }  # fmt: skip


def load_baseline() -> dict[str, int]:
    """The fewest cycles of each row since it was last accepted by name."""
    found: dict[str, int] = json.loads(BASELINE.read_text(encoding="utf-8")) if BASELINE.exists() else {}
    return found


def baseline_of(kept: Mapping[str, int], rows: Rows, accepted: Collection[str]) -> dict[str, int]:
    """What is kept for rows that are stored: of a row accepted by name its cycles now, of the others the fewest."""
    return {
        name: row["cycles"] if name in accepted else min(row["cycles"], kept.get(name, row["cycles"]))
        for name, row in rows.items()
    }


def refused(kept: Mapping[str, int], made: Rows, accepted: Collection[str]) -> dict[str, str]:
    """Rows more than 3 % above their baseline and not accepted by name, with what is wrong."""
    return {
        name: f"{row['cycles']} cycles, the fewest on file are {kept[name]}"
        for name, row in made.items()
        if name in kept and name not in accepted and row["cycles"] > WORSE * kept[name]
    }


def merged(before: Rows, made: Rows, wrong: Collection[str]) -> Rows:
    """What is stored: what was made, but for what is refused, and what is on file of jobs that still exist."""
    current = set(jobs())
    redone = {tuple(row["job"]) for row in made.values()}
    kept = {
        name: row
        for name, row in before.items()
        if tuple(row["job"]) in current and (tuple(row["job"]) not in redone or name in wrong)
    }
    return kept | {name: row for name, row in made.items() if name not in wrong}


def store(triton: str, rows: Rows, accepted: Collection[str] = ()) -> None:
    """Write the file, one line per row, and the baseline."""
    lines = [f"  {json.dumps(name)}: {json.dumps(rows[name])}" for name in sorted(rows)]
    text = f'{{\n "triton": {json.dumps(triton)},\n "rows": {{\n' + ",\n".join(lines) + "\n }\n}\n"
    STORED.write_text(text, encoding="utf-8")
    kept = baseline_of(load_baseline(), rows, accepted)
    BASELINE.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def cell(name: str, rows: Mapping[str, Mapping[str, Any]]) -> str:
    """What the page's cell of a configuration says of its cycles; nothing where the model has none."""
    row = rows.get(name)
    return "" if row is None else f"{row['cycles']} cycles, {row['bound']} {row['share']:.2f}"


def cuda_lines(rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The page's section on the CUDA kernels."""
    lines = [
        "", "## CUDA kernels of attention, sm_90a, by the cycle model", "",
        "| kernel, queries x keys | cycles | bound by | share | TFLOP/s | registers | spills |",
        "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    return lines + [cuda_line(name, row) for name, row in sorted(rows.items()) if row["job"][0] == "cuda"]


def cuda_line(name: str, row: Mapping[str, Any]) -> str:
    """The page's line on a CUDA kernel."""
    figures = (row[each] for each in ("cycles", "bound", "share", "tflops", "registers", "spills"))
    return f"| {' | '.join(map(str, [name.removeprefix('cuda '), *figures]))} |"


def main() -> int:
    """The command line."""
    args = _parser().parse_args()
    import triton

    table = load()
    rows = table["rows"] if table["triton"] == triton.__version__ else {}
    chosen = stale(jobs(), rows)
    if args.stale:
        print("\n".join([name for _, name in chosen] + [f"{len(chosen)} are stale"]))
        return 1 if chosen else 0
    unknown = set(args.accept_cycles) - set(table["rows"])
    if unknown:
        sys.exit(f"--accept-cycles: no row on file is called {', '.join(sorted(unknown))}")
    if extension.why_not() is not None:
        left = [name for kind, name in chosen if kind == "cuda"]
        chosen = [job for job in chosen if job[0] != "cuda"]
        print(f"left as they are, {extension.why_not()}: {len(left)} CUDA sources" if left else "")
    wrong: dict[str, str] = {}
    before, kept = dict(table["rows"]), load_baseline()
    made: Rows = {}
    with ProcessPoolExecutor(args.jobs) as pool:
        for found in pool.map(make, chosen):
            new = refused(kept, found, args.accept_cycles)
            wrong |= new
            made |= found
            for name, row in found.items():
                print(
                    f"{name:66} {cell(name, {name: row})}{'  <- ' + new[name] if name in new else ''}",
                    flush=True,
                )
            if args.write:
                store(triton.__version__, merged(before, made, wrong), args.accept_cycles)
    if args.write:
        store(triton.__version__, merged(before, made, wrong), args.accept_cycles)
        import compile_entries
        import compile_record
        import cycles_page

        compile_record.DOCUMENT.write_text(
            compile_record.render(compile_record.load(), compile_entries.entries()), encoding="utf-8"
        )
        page = cycles_page.PAGE.read_text("utf-8")
        made = cycles_page.updated(page, load()["rows"], triton_entries().values())
        cycles_page.PAGE.write_text(made, encoding="utf-8")
    print(f"{len(chosen)} redone, {len(wrong)} worse")
    return 1 if wrong else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("-j", "--jobs", type=int, default=2, help="processes that compile")
    parser.add_argument("--write", action="store_true", help="redo what is stale and store it")
    parser.add_argument(
        "--stale", action="store_true", help="list what --write would redo, compiling nothing"
    )
    parser.add_argument(
        "--accept-cycles", nargs="+", default=[], metavar="NAME", help="rows that may get worse"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
